"""Compares the Triton kernels with float64 products, and rows of a batch with the same rows alone.

test_kernels.py runs this in a separate process, interpreted or on CUDA.
"""

import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_diffgemma.backends.torch.kernels import products as kernels
from mlx_diffgemma.backends.torch.kernels.products import LinearTiles, WeightedTiles
from mlx_diffgemma.checkpoint import Quantization
from support.comparing import assert_close
from support.packed import FORMATS, identifier, pack

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# Triton's interpreter multiplies the bit patterns of bfloat16 as integers. float16 works there, and takes the same code path.
HALF, PRECISION = (torch.float16, 2**-10) if DEVICE == "cpu" else (torch.bfloat16, 2**-7)
SCALES = {"affine": mx.float16}
COUNTS = np.array([0, 1, 0, 19, 3, 0])  # rows of each expert; some have none, one has more than a block of 16
OUT = 75  # more than one block of 64; the last one is not full

# The formats whose rows are compared bit for bit, with activations of ``HALF``; one of them also with float32.
EXACT = [Quantization(64, 4), Quantization(64, 8), Quantization(32, 5), Quantization(16, 4, "nvfp4")]

each_format = pytest.mark.parametrize("quantization", FORMATS, ids=identifier)


def weight(quantization: Quantization, *shape: int) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], np.ndarray]:
    packed = pack(quantization, *shape, dtype=SCALES.get(quantization.mode, mx.float32))
    tensors = {name: tensor.to(DEVICE) for name, tensor in packed.tensors.items()}
    arguments = tensors["weight"].view(torch.int32), tensors["scales"], tensors.get("biases")
    return arguments, packed.values.astype(np.float64)


def normal(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).standard_normal(shape, np.float32)).to(DEVICE)


def size(quantization: Quantization) -> int:
    """Three groups, each counted as at least 32. For small groups this is not a multiple of the kernels' blocks of 64 and 128."""
    return 3 * max(quantization.group_size, 32)


@each_format
@pytest.mark.parametrize("rows", [1, 21])
def test_linear(quantization: Quantization, rows: int) -> None:
    packed, values = weight(quantization, OUT, size(quantization))
    x = normal(rows, 1, size(quantization))
    y = kernels.linear(x, *packed, quantization)
    assert y.dtype == torch.float32
    assert_close(y.cpu(), x.cpu().double().numpy() @ values.T, 1e-4, "linear")


@each_format
def test_expert_linear(quantization: Quantization) -> None:
    packed, values = weight(quantization, len(COUNTS), OUT, size(quantization))
    x = normal(int(COUNTS.sum()), size(quantization))
    ends = torch.from_numpy(COUNTS.cumsum()).int().to(DEVICE)
    y = kernels.expert_linear(x, ends, *packed, quantization)
    chosen = values[np.repeat(np.arange(len(COUNTS)), COUNTS)]
    assert_close(y.cpu(), np.einsum("mk,mnk->mn", x.cpu().double().numpy(), chosen), 1e-4, "experts")


@each_format
def test_weighted_rows(quantization: Quantization) -> None:
    packed, values = weight(quantization, 75, size(quantization))  # more than one part of the sum; the last one is not full
    p = normal(3, 75)
    y = kernels.weighted_rows(p, *packed, quantization)
    assert_close(y.cpu(), p.cpu().double().numpy() @ values, 1e-4, "weighted rows")


@pytest.mark.parametrize("quantization", [q for q in FORMATS if q.group_size in (16, 64) or q.mode != "affine"], ids=identifier)
def test_half_precision(quantization: Quantization) -> None:
    """Widened weights and results are rounded, sums are not. So errors stay within one rounding of the largest value."""
    packed, values = weight(quantization, OUT, size(quantization))
    x, p = normal(21, size(quantization)).to(HALF), normal(3, OUT).to(HALF)
    for y, product in (
        (kernels.linear(x, *packed, quantization), x.cpu().double().numpy() @ values.T),
        (kernels.weighted_rows(p, *packed, quantization), p.cpu().double().numpy() @ values),
    ):
        assert y.dtype == HALF
        assert_close(y.cpu().float(), product, PRECISION * float(np.abs(product).max()), str(HALF))


def test_no_rows() -> None:
    quantization = Quantization(64, 4)
    packed, _ = weight(quantization, OUT, 64)
    experts, _ = weight(quantization, 2, OUT, 64)
    ends = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    assert kernels.linear(normal(0, 64), *packed, quantization).shape == (0, OUT)
    assert kernels.expert_linear(normal(0, 64), ends, *experts, quantization).shape == (0, OUT)
    assert kernels.weighted_rows(normal(0, OUT), *packed, quantization).shape == (0, 64)


def test_tiles_do_not_follow_the_number_of_rows() -> None:
    """Tiles decide how sums are divided, and depend only on the matrix. ``block_m`` depends on the rows but divides no sum."""
    for n_size, matrices in ((37, 1), (4096, 1), (262144, 1), (1408, 128), (2816, 128)):
        half, full = (LinearTiles.of(n_size, matrices, dtype) for dtype in (torch.bfloat16, torch.float32))
        assert half == LinearTiles.of(n_size, matrices, torch.float16)
        assert half.block_n in (64, 128), "Triton takes wgmma from 64 on"
        for rows in range(4097):
            assert half.block_m(rows) in (16, 32, 64, 128, 256)
            assert full.block_m(rows) in (16, 32)
    for v_size, h_size in ((1, 64), (203, 96), (262144, 2816)):
        for dtype, block_m in ((torch.bfloat16, 128), (torch.float16, 128), (torch.float32, 16)):
            tiles = WeightedTiles.of(v_size, h_size, dtype)
            assert tiles.block_m == block_m
            assert tiles.v_per_slot % tiles.block_v == 0
            assert (tiles.slots - 1) * tiles.v_per_slot < v_size <= tiles.slots * tiles.v_per_slot


def in_order(a: np.ndarray, b: np.ndarray, backwards: bool = False) -> np.ndarray:
    """The float32 product of two matrices, summed term by term. An element has the same bits in a matrix of any size."""
    a, b = a.astype(np.float32), b.astype(np.float32)  # products of half precision are exact
    total = np.zeros((a.shape[0], b.shape[1]), np.float32)
    for k in range(a.shape[1])[:: -1 if backwards else 1]:
        total += a[:, k, None] * b[k]
    return total


@pytest.fixture
def dots_in_order(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the interpreter sum dots in an order that depends, as on tensor cores, only on the terms and the first dimension.

    The first dimension decides the instruction. The interpreter itself leaves dots to BLAS, whose order may also depend on the
    other dimension, a column's place in it, and the machine. The first operands of all dots of a test must have one shape.
    """
    shapes = set()

    def matmul(a: np.ndarray, b: np.ndarray, dtype: type) -> np.ndarray:
        assert dtype == np.float32
        shapes.add(a.shape)
        return in_order(a, b, backwards=a.shape[0] < 64)

    if DEVICE == "cuda":
        yield
        return
    monkeypatch.setattr(np, "matmul", matmul)
    yield
    assert len(shapes) == 1


def repeated(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Turn four parts into seven: the first three, the first three again, and the fourth."""
    parts = torch.tensor([0, 1, 2, 0, 1, 2, 3], device=x.device)
    return x.unflatten(dim, (4, -1)).index_select(dim, parts).flatten(dim, dim + 1)


def repeating(quantization: Quantization, *shape: int, dim: int) -> tuple[Any, np.ndarray]:
    """A weight of four parts along ``dim``, passed through ``repeated``: in the kernels' form, and its values."""
    packed, values = weight(quantization, *shape)
    return tuple(None if x is None else repeated(x, dim) for x in packed), repeated(torch.from_numpy(values), dim).numpy()


def cancelling(rows: int, terms: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows for a ``repeated`` weight. Large terms of all sizes cancel, and the rest shows how sums were rounded."""
    sizes = torch.from_numpy(np.random.default_rng(4).integers(0, 14, (rows, terms // 7 * 3))).to(DEVICE)
    large, small = normal(*sizes.shape) * 2.0**sizes, normal(rows, terms // 7) / 32
    return torch.cat((large, -large, small), dim=1).to(dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def check_rows(product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, moved: torch.Tensor, counts: list[int]) -> None:
    """Assert that rows have the same bits when they are ``moved``, and when only the last ``count`` rows are passed."""
    whole = bits(product(x))
    assert torch.equal(bits(product(x[moved])), whole[moved])
    for count in counts:
        if count < len(x):
            assert torch.equal(bits(product(x[-count:])), whole[-count:]), f"{count} rows"


# In float32, blocks have fewer rows, so the test uses fewer rows too.
each_exact = pytest.mark.parametrize(
    ("quantization", "dtype", "rows"),
    [*((q, HALF, 300) for q in EXACT), (EXACT[0], torch.float32, 70)],
    ids=[*map(identifier, EXACT), f"{identifier(EXACT[0])}-float32"],
)


@each_exact
def test_sums_in_another_order_have_other_bits(quantization: Quantization, dtype: torch.dtype, rows: int) -> None:
    """The tests below use the same values, so they would detect another order."""
    by_row = repeating(quantization, 37, 4 * max(quantization.group_size, 32), dim=1)[1]
    by_column = repeating(quantization, 4 * 29, size(quantization), dim=0)[1].T
    for values in (by_row, by_column):
        w = torch.from_numpy(values).to(dtype).float().numpy()
        x = cancelling(rows, w.shape[1], dtype).cpu().float().numpy().T

        def product(block: int, blocks: int, backwards: bool = False, w: np.ndarray = w, x: np.ndarray = x) -> torch.Tensor:
            """The sum in parts of ``blocks`` blocks each."""
            dots = [in_order(w[:, k : k + block], x[k : k + block], backwards) for k in range(0, len(x), block)]
            parts = [sum(dots[first : first + blocks]) for first in range(0, len(dots), blocks)]
            return bits(torch.from_numpy(sum(parts)).to(dtype))

        ours = product(64, 100)
        for other in (product(32, 100), product(128, 100), product(64, 2), product(64, 100, backwards=True)):
            assert (other != ours).float().mean() > 0.25


@pytest.mark.usefixtures("dots_in_order")
@each_exact
def test_linear_is_the_same_for_a_row_alone(quantization: Quantization, dtype: torch.dtype, rows: int) -> None:
    packed, values = repeating(quantization, 37, 4 * max(quantization.group_size, 32), dim=1)
    x = cancelling(rows, values.shape[1], dtype)
    counts = [1, 16, 17, 32, 33, 64, 65, 128, 129]
    check_rows(lambda x: kernels.linear(x, *packed, quantization), x, torch.arange(rows).flip(0), counts)


@pytest.mark.usefixtures("dots_in_order")
@each_exact
def test_expert_linear_is_the_same_for_a_row_alone(quantization: Quantization, dtype: torch.dtype, rows: int) -> None:
    packed, values = repeating(quantization, 6, 37, 4 * max(quantization.group_size, 32), dim=2)
    x = cancelling(rows, values.shape[2], dtype)

    def ends(rows: int) -> torch.Tensor:
        """The ends of the experts among the last ``rows`` of 300 rows."""
        return (torch.tensor([0, 7, 150, 150, 280, 300]) - 300 + rows).clamp(min=0).int()

    def product(x: torch.Tensor) -> torch.Tensor:
        return kernels.expert_linear(x, ends(len(x)).to(DEVICE), *packed, quantization)

    moved = torch.cat([torch.arange(start, end).flip(0) for start, end in pairwise([0, *ends(rows).tolist()])])
    counts = [1, 48, 49, 96, 97, 192, 193]  # 8, 16 and 32 rows per expert, and one more; a block holds twice the mean
    check_rows(product, x, moved, counts)


@pytest.mark.usefixtures("dots_in_order")
@each_exact
def test_weighted_rows_are_the_same_for_a_row_alone(quantization: Quantization, dtype: torch.dtype, rows: int) -> None:
    packed, values = repeating(quantization, 4 * 29, size(quantization), dim=0)
    p = cancelling(rows, values.shape[0], dtype)
    counts = [1, 16, 17, 127, 128, 129]
    check_rows(lambda p: kernels.weighted_rows(p, *packed, quantization), p, torch.arange(rows).flip(0), counts)
