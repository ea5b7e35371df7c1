"""Quantized modules of both backends against ``mx.dequantize``, which defines the formats, and against each other."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx import nn as mlx_nn
from torch import nn as torch_nn

from mlx_diffgemma.backends.mlx import model as mlx_model
from mlx_diffgemma.backends.mlx import quantized as mlx_quantized
from mlx_diffgemma.backends.torch import model as torch_model
from mlx_diffgemma.backends.torch import packing
from mlx_diffgemma.backends.torch import quantized as torch_quantized
from mlx_diffgemma.checkpoint import Quantization
from mlx_diffgemma.errors import CheckpointError
from support.comparing import assert_close
from support.packed import FORMATS, Packed, as_torch, identifier, pack, unpack

IN, OUT, VOCABULARY = 128, 70, 75
COUNTS = np.array([0, 3, 0, 9, 1, 0])  # rows of each expert
SHAPES = {"embed_tokens": (VOCABULARY, IN), "layers.1.q_proj": (OUT, IN), "layers.1.experts": (len(COUNTS), OUT, IN)}
OUTPUTS = ("rows", "as_linear", "weighted_rows", "linear", "experts")

# Every format with scales in BF16, as published, and one format with each other stored type.
CASES = [(quantization, mx.bfloat16) for quantization in FORMATS]
CASES += [(Quantization(64, bits), dtype) for bits in (4, 5) for dtype in (mx.float16, mx.float32)]
each_case = pytest.mark.parametrize(
    ("quantization", "scales"), CASES, ids=[f"{identifier(q)}-{str(dtype).rpartition('.')[2]}" for q, dtype in CASES]
)
each_format = pytest.mark.parametrize("quantization", FORMATS, ids=identifier)


def torch_graph(quantization: Quantization, dtype: torch.dtype) -> torch_nn.Module:
    """An embedding, a linear map and experts, quantized on the meta device as in loading."""
    with torch.device("meta"):
        graph, layer = torch_nn.Module(), torch_nn.Module()
        graph.embed_tokens = torch_model.Embedding(SimpleNamespace(vocab_size=VOCABULARY, hidden_size=IN))
        layer.q_proj, layer.experts = torch_nn.Linear(IN, OUT, bias=False), torch_model.ExpertLinear(len(COUNTS), IN, OUT)
        graph.layers = torch_nn.ModuleList([torch_nn.Identity(), layer])
    torch_quantized.quantize_modules(graph, dict.fromkeys(SHAPES, quantization), dtype)
    return graph


def mlx_graph(quantization: Quantization, dtype: mx.Dtype) -> mlx_nn.Module:
    graph, layer = mlx_nn.Module(), mlx_nn.Module()
    graph.embed_tokens = mlx_model.Embedding(SimpleNamespace(vocab_size=VOCABULARY, hidden_size=IN))
    layer.q_proj, layer.experts = mlx_nn.Linear(IN, OUT, bias=False), mlx_model.ExpertLinear(len(COUNTS), IN, OUT)
    graph.layers = [mlx_nn.Identity(), layer]
    mlx_quantized.quantize_modules(graph, dict.fromkeys(SHAPES, quantization), dtype)
    return graph


def packed_weights(quantization: Quantization, scales: mx.Dtype) -> dict[str, Packed]:
    return {path: pack(quantization, *shape, seed=seed, dtype=scales) for seed, (path, shape) in enumerate(SHAPES.items())}


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {
        "tokens": rng.integers(0, VOCABULARY, (2, 5)),
        "x": rng.standard_normal((2, 5, IN), np.float32),
        "probabilities": rng.dirichlet(np.ones(VOCABULARY), (2, 5)).astype(np.float32),
        "sorted": rng.standard_normal((COUNTS.sum(), IN), np.float32),
    }


def run_torch(quantization: Quantization, packed: dict[str, Packed], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    graph = torch_graph(quantization, dtype)
    stored = {f"{path}.{name}": tensor for path, weight in packed.items() for name, tensor in weight.tensors.items()}
    assert {name: tensor.shape for name, tensor in graph.state_dict().items()} == {n: t.shape for n, t in stored.items()}
    graph.load_state_dict(stored, assign=True)  # strict: names and shapes must match the stored ones
    given = {name: torch.from_numpy(array) for name, array in inputs().items()}
    x, probabilities, rows = (given[name].to(dtype) for name in ("x", "probabilities", "sorted"))
    embedding, layer = graph.embed_tokens, graph.layers[1]
    ends = torch.from_numpy(COUNTS.cumsum()).int()
    outputs = embedding(given["tokens"]), embedding.as_linear(x), embedding.weighted_rows(probabilities), layer.q_proj(x)
    return dict(zip(OUTPUTS, (*outputs, layer.experts(rows, ends)), strict=True))


def run_mlx(quantization: Quantization, packed: dict[str, Packed], dtype: mx.Dtype) -> dict[str, mx.array]:
    graph = mlx_graph(quantization, dtype)
    graph.load_weights([(f"{path}.{name}", a) for path, weight in packed.items() for name, a in weight.arrays.items()])
    given = {name: mx.array(array) for name, array in inputs().items()}
    x, probabilities, rows = (given[name].astype(dtype) for name in ("x", "probabilities", "sorted"))
    embedding, layer = graph.embed_tokens, graph.layers[1]
    experts = mx.array(np.repeat(np.arange(len(COUNTS)), COUNTS).astype(np.uint32))
    outputs = embedding(given["tokens"]), embedding.as_linear(x), embedding.weighted_rows(probabilities), layer.q_proj(x)
    return dict(zip(OUTPUTS, (*outputs, layer.experts(rows[:, None], experts)[:, 0]), strict=True))


def expected(packed: dict[str, Packed]) -> dict[str, np.ndarray]:
    table, linear, experts = (packed[path].values.astype(np.float64) for path in SHAPES)
    given = inputs()
    chosen = experts[np.repeat(np.arange(len(COUNTS)), COUNTS)]
    products = given["x"] @ table.T, given["probabilities"] @ table, given["x"] @ linear.T
    return dict(zip(OUTPUTS, (table[given["tokens"]], *products, np.einsum("mk,mnk->mn", given["sorted"], chosen)), strict=True))


@each_case
def test_dequantize_is_mlx_to_the_bit(quantization: Quantization, scales: mx.Dtype) -> None:
    packed = pack(quantization, 3, OUT, IN, dtype=scales)
    tensors = packed.tensors
    values = packing.dequantize(tensors["weight"], tensors["scales"], tensors.get("biases"), quantization, torch.float32).numpy()
    assert np.array_equal(values, packed.values), f"{(values != packed.values).sum()} of {values.size} weights differ"


@each_format
def test_dequantize_reads_any_words(quantization: Quantization) -> None:
    """Includes codes that mx.quantize never writes, and every scale except NaN."""
    rng = np.random.default_rng(1)
    words = mx.array(rng.integers(0, 2**32, (255, IN * quantization.bits // 32), np.uint32))
    shape = (255, IN // quantization.group_size)
    if quantization.mode == "affine":
        scales, biases = (mx.array(rng.standard_normal(shape, np.float32)) for _ in range(2))
    else:
        scales, biases = mx.array(np.broadcast_to(np.arange(255, dtype=np.uint8)[:, None], shape)), None
    values = packing.dequantize(
        as_torch(words), as_torch(scales), None if biases is None else as_torch(biases), quantization, torch.float32
    ).numpy()
    reference = np.array(unpack(quantization, words, scales, biases))
    assert np.array_equal(values, reference, equal_nan=True), f"{(values != reference).sum()} of {values.size} weights differ"


@each_case
def test_modules_in_float32(quantization: Quantization, scales: mx.Dtype) -> None:
    packed = packed_weights(quantization, scales)
    reference = expected(packed)
    ours, theirs = run_torch(quantization, packed, torch.float32), run_mlx(quantization, packed, mx.float32)
    for name in OUTPUTS:
        assert ours[name].dtype == torch.float32
        assert theirs[name].dtype == mx.float32
        assert_close(ours[name].numpy(), reference[name], 1e-4, f"torch {name}")
        assert_close(np.array(theirs[name]), reference[name], 1e-4, f"mlx {name}")
        assert_close(ours[name].numpy(), np.array(theirs[name]), 1e-4, f"torch and mlx {name}")
    assert np.array_equal(ours["rows"].numpy(), np.array(theirs["rows"]))


@each_case
def test_modules_in_bfloat16(quantization: Quantization, scales: mx.Dtype) -> None:
    """Inputs and results are rounded, sums are not. So errors stay within 2^-7 of the largest value."""
    packed = packed_weights(quantization, scales)
    reference = expected(packed)
    ours, theirs = run_torch(quantization, packed, torch.bfloat16), run_mlx(quantization, packed, mx.bfloat16)
    for name in OUTPUTS:
        atol = 2**-7 * float(np.abs(reference[name]).max())
        assert ours[name].dtype == torch.bfloat16
        assert theirs[name].dtype == mx.bfloat16
        assert_close(ours[name].float().numpy(), reference[name], atol, f"torch {name}")
        assert_close(np.array(theirs[name].astype(mx.float32)), reference[name], atol, f"mlx {name}")


@pytest.mark.parametrize(
    "quantization", [form for form in FORMATS if form.mode != "affine" or form.group_size == 64], ids=identifier
)
def test_a_matrix_that_is_widened_in_tiles(quantization: Quantization) -> None:
    """On a CPU at most 2^22 weights are widened at once, and fewer for a few rows of x. The last tiles here are not full."""
    rows = 2**23 // IN + 1001  # odd, so threads cannot share the last tile
    packed = pack(quantization, rows, IN, dtype=mx.bfloat16)
    with torch.device("meta"):
        embedding = torch_nn.Module()
        embedding.embed_tokens = torch_model.Embedding(SimpleNamespace(vocab_size=rows, hidden_size=IN))
    torch_quantized.quantize_modules(embedding, {"embed_tokens": quantization}, torch.float32)
    embedding.load_state_dict({f"embed_tokens.{name}": tensor for name, tensor in packed.tensors.items()}, assign=True)
    rng, values = np.random.default_rng(7), torch.from_numpy(packed.values)
    x = torch.from_numpy(rng.standard_normal((70, IN), np.float32))
    probabilities = torch.softmax(torch.from_numpy(3 * rng.standard_normal((3, rows), np.float32)), dim=-1)
    table = embedding.embed_tokens
    for some in (x, x[:3]):
        assert_close(table.as_linear(some).numpy(), (some @ values.T).numpy(), 1e-4, f"as_linear of {len(some)} rows")
    assert_close(table.weighted_rows(probabilities).numpy(), (probabilities @ values).numpy(), 1e-4, "weighted_rows")


@pytest.mark.parametrize(("group_size", "bits", "mode"), [(64, 7, "affine"), (48, 4, "affine"), (16, 4, "mxfp4"), (64, 4, "nf4")])
def test_unknown_formats_are_refused(group_size: int, bits: int, mode: str) -> None:
    with pytest.raises(CheckpointError, match=f"{mode} with {bits} bits in groups of {group_size} is not a known format"):
        Quantization(group_size, bits, mode)


@pytest.mark.parametrize(
    ("path", "quantization", "error", "message"),
    [
        ("layers.1.o_proj", Quantization(64, 4), CheckpointError, "no such module"),
        ("layers.1", Quantization(64, 4), CheckpointError, "layers.1 is quantized, but is not a matrix"),
        ("layers.1.narrow", Quantization(64, 4), CheckpointError, "not a whole number of groups"),
    ],
)
def test_what_cannot_be_quantized_is_named(path: str, quantization: Quantization, error: type, message: str) -> None:
    torch_graph_, mlx_graph_ = torch_nn.Module(), mlx_nn.Module()
    for graph, nn in ((torch_graph_, torch_nn), (mlx_graph_, mlx_nn)):
        layer = nn.Module()
        layer.q_proj, layer.narrow = nn.Linear(IN, OUT, bias=False), nn.Linear(96, OUT, bias=False)
        graph.layers = [nn.Identity(), layer] if nn is mlx_nn else nn.ModuleList([nn.Identity(), layer])
    with pytest.raises(error, match=message):
        torch_quantized.quantize_modules(torch_graph_, {path: quantization}, torch.float32)
    with pytest.raises(error, match=message):
        mlx_quantized.quantize_modules(mlx_graph_, {path: quantization}, mx.float32)
