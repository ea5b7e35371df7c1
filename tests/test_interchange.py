"""One quantized file, three readers: both backends and mlx-vlm, against the float32 model of the dequantized weights."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from mlx_diffgemma.backends import NAMES, Piece, Row, load_backend
from mlx_diffgemma.checkpoint import FORMATS as MODES
from mlx_diffgemma.checkpoint import PARTS, Checkpoint, Quantization, graph_name
from mlx_diffgemma.cli import main
from support.comparing import assert_close
from support.converting import SHAPE, converted
from support.packed import FORMATS, identifier, unpack
from support.reference import Reference, make_checkpoint

#: Every row of every part has a multiple of 128 weights, so every group size fits.
WIDE = {**SHAPE, "text_config": {**SHAPE["text_config"], "moe_intermediate_size": 128}}
TEMPERATURE = 0.6

#: Largest difference to the float32 model of the dequantized weights, and between backends.
ATOL, ATOL_BACKENDS = 1e-3, 1e-4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("bf16"), WIDE, bfloat16=True, hub_layout=True)


#: Logits float32 [2, positions, V]: a prompt's causal pass, then two canvases; the second is conditioned on the first's result.
Answers = dict[str, NDArray[np.float32]]


def inputs() -> tuple[NDArray[np.int32], ...]:
    """A prompt that is longer than the window, and two canvases."""
    rng, text = np.random.default_rng(3), WIDE["text_config"]
    lengths = (2 * text["sliding_window"] + 3, WIDE["canvas_length"], WIDE["canvas_length"])
    return tuple(rng.integers(0, text["vocab_size"], (2, length), dtype=np.int32) for length in lengths)


def ours(folder: Path, name: str) -> Answers:
    backend = load_backend(Checkpoint.open(folder), name, device="cpu", dtype="float32")
    prompt, first, second = inputs()
    caches = [backend.new_cache() for _ in prompt]
    causal = backend.logits([Piece(tokens, cache) for tokens, cache in zip(prompt, caches, strict=True)])
    rows = [Row(canvas, cache, TEMPERATURE) for canvas, cache in zip(first, caches, strict=True)]
    signals = [answer.self_conditioning for answer in backend.denoise(rows)]
    later = [
        replace(row, canvas=canvas, self_conditioning=signal) for row, canvas, signal in zip(rows, second, signals, strict=True)
    ]
    answers = {"causal": causal, "first step": backend.logits(rows), "second step": backend.logits(later)}
    return {name: np.stack(logits) for name, logits in answers.items()}


def transformers(folder: Path) -> Answers:
    reference = Reference(folder)
    prompt, first, second = inputs()
    logits = reference.canvas_logits([prompt], first)
    conditioned = reference.canvas_logits([prompt], second, logits / TEMPERATURE)
    return {"causal": reference.causal_logits([prompt]), "first step": logits, "second step": conditioned}


def assert_answers(actual: Answers, expected: Answers, atol: float, what: str) -> None:
    for name, logits in actual.items():
        assert_close(logits, expected[name], atol, f"{what}, {name}")


def weights(folder: Path) -> dict[str, mx.array]:
    return {name: array for file in sorted(folder.glob("*.safetensors")) for name, array in mx.load(str(file)).items()}


def dequantized(folder: Path, target: Path) -> Path:
    """The float32 checkpoint of the dequantized weights, as `transformers` reads it."""
    checkpoint, stored = Checkpoint.open(folder), weights(folder)
    tensors = {}
    for name, array in stored.items():
        module, _, kind = name.rpartition(".")
        quantization = checkpoint.quantization.get(graph_name(name).rpartition(".")[0])
        plain = module if ".experts." in module and kind == "weight" else name
        if quantization is None:
            tensors[plain] = array.astype(mx.float32)
        elif kind == "weight":
            tensors[plain] = unpack(quantization, array, stored[f"{module}.scales"], stored.get(f"{module}.biases"))
    target.mkdir()
    mx.save_safetensors(str(target / "model.safetensors"), tensors, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        del config[key]
    (target / "config.json").write_text(json.dumps(config))
    return target


def assert_runs_alike(folder: Path, scratch: Path) -> None:
    """Assert that both backends agree on a quantized checkpoint, and with `transformers` on the dequantized one."""
    expected = transformers(dequantized(folder, scratch))
    answers = {name: ours(folder, name) for name in NAMES}
    for name in NAMES:
        assert_answers(answers[name], expected, ATOL, f"{name} and the dequantized model")
    assert_answers(answers["torch"], answers["mlx"], ATOL_BACKENDS, "torch and mlx")


def text(quantization: Quantization) -> str:
    """A format in the command's syntax."""
    return f"{quantization.bits}:{quantization.group_size}" if quantization.mode == "affine" else quantization.mode


@pytest.mark.parametrize("quantization", FORMATS, ids=identifier)
def test_every_format(quantization: Quantization, source: Path, tmp_path: Path) -> None:
    """All parts in one format."""
    settings = [f"--set={part}={text(quantization)}" for part in PARTS if part != "vision"]
    folder = converted(source, tmp_path / "packed", *settings)
    assert set(Checkpoint.open(folder).quantization.values()) == {quantization}
    assert_runs_alike(folder, tmp_path / "dequantized")


def test_the_formats_are_all_there_are() -> None:
    known = {Quantization(group, bits, mode) for mode, (groups, widths) in MODES.items() for group in groups for bits in widths}
    assert set(FORMATS) == known


# --- as mlx-community publishes it ---


def published(source: Path, folder: Path, base: dict[str, Any], overrides: Mapping[str, Any]) -> Path:
    """Quantize with MLX alone, in float16, so that scales are F16. ``overrides`` match the end of a module's path.

    An override is the settings of the affine mode, as in the table, or False.
    """
    tensors, table = {}, dict(base)
    modules = {name: name.removesuffix(".weight") for name in weights(source) if is_matrix(name)}
    for name, array in weights(source).items():
        half = array.astype(mx.float16)
        if name not in modules:
            tensors[name] = half
            continue
        override = next((settings for end, settings in overrides.items() if modules[name].endswith(end)), None)
        if override is not None:
            table[modules[name]] = override
        stored = f"{modules[name]}.weight"
        if override is False:
            tensors[stored] = half
        else:
            parts = mx.quantize(half, **(base if override is None else override))
            tensors.update(zip((stored, f"{modules[name]}.scales", f"{modules[name]}.biases"), parts, strict=False))
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization": table, "quantization_config": table}))
    return folder


def is_matrix(name: str) -> bool:
    ends = ("_proj.weight", "router.proj.weight", "embed_tokens.weight", "experts.gate_up_proj", "experts.down_proj")
    return name.startswith("model.decoder.") and name.endswith(ends)


@pytest.mark.parametrize(
    ("base", "overrides"),
    [
        (
            {"group_size": 32, "bits": 4, "mode": "mxfp4"},
            {"embed_tokens": {"group_size": 64, "bits": 8}, "mlp.up_proj": {"group_size": 64, "bits": 6}, "router.proj": False},
        ),
        ({"group_size": 16, "bits": 4, "mode": "nvfp4"}, {"q_proj": {"group_size": 128, "bits": 4}, "embed_tokens": False}),
        ({"group_size": 64, "bits": 4}, {"router.proj": {"group_size": 64, "bits": 8}, "layers.1.experts.down_proj": False}),
    ],
    ids=["mxfp4", "nvfp4", "affine"],
)
def test_a_published_layout(base: dict[str, Any], overrides: dict[str, Any], source: Path, tmp_path: Path) -> None:
    folder = published(source, tmp_path / "published", base, overrides)
    checkpoint = Checkpoint.open(folder)
    assert {tensor.dtype for name, tensor in checkpoint.tensors.items() if name.endswith("biases")} == {"F16"}
    for end, settings in overrides.items():
        found = {checkpoint.quantization.get(path) for path in modules(checkpoint) if path.endswith(end)}
        assert found == {Quantization(**settings) if settings else None}, end
    assert_runs_alike(folder, tmp_path / "dequantized")


def modules(checkpoint: Checkpoint) -> Iterator[str]:
    return (name.removesuffix(".weight") for name in checkpoint.tensors if name.endswith(".weight"))


# --- in mlx-vlm ---


def mlx_vlm(folder: Path) -> Answers:
    """The logits of mlx-vlm, which has no causal ones."""
    model = pytest.importorskip("mlx_vlm.utils").load_model(folder)
    model.set_dtype(mx.float32)  # it runs in the type of the norms; formats and values do not change
    prompt, first, second = map(mx.array, inputs())
    cache = model.diffusion_prefill_cache(prompt, attention_mask=None, cache=model.make_cache())
    logits = model.diffusion_decoder_logits(first, cache=cache, self_conditioning=None)
    signal = model.diffusion_self_conditioning(logits / TEMPERATURE, model.diffusion_prepare_self_conditioning())
    conditioned = model.diffusion_decoder_logits(second, cache=cache, self_conditioning=signal)
    return {"first step": np.array(logits), "second step": np.array(conditioned)}


@pytest.mark.parametrize(
    "options",
    [
        ["--recipe=4bit"],
        ["--recipe=8bit"],
        ["--recipe=mxfp4"],
        ["--recipe=nvfp4"],
        ["--recipe=mxfp4", "--set=router=nvfp4", "--set=attention=3:32", "--set=embedding=bf16", "--set=mlp=mxfp8"],
    ],
    ids=["4bit", "8bit", "mxfp4", "nvfp4", "mixed"],
)
def test_mlx_vlm_answers_alike(options: list[str], source: Path, tmp_path: Path) -> None:
    folder = converted(source, tmp_path / "packed", *options)
    assert_answers(mlx_vlm(folder), ours(folder, "mlx"), ATOL_BACKENDS, "mlx-vlm and our mlx backend")


# --- converted by the command ---


@pytest.mark.parametrize("recipe", ["4bit", "nvfp4"])
def test_verify_passes_on_a_quantized_file(recipe: str, source: Path, tmp_path: Path) -> None:
    folder = converted(source, tmp_path / "packed", f"--recipe={recipe}")
    result = CliRunner().invoke(main, ["verify", str(folder), "--backends", "mlx,torch"])
    print(result.output)
    assert result.exit_code == 0
    assert result.stdout.endswith("within tolerance\n")
