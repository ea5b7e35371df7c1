"""Compares the attention kernels with float64, and rows beside others with the same rows alone.

test_attention_kernel.py runs this in a separate process, interpreted or on CUDA.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlx_diffgemma.backends.torch import attention
from mlx_diffgemma.backends.torch.kernels import attention as kernels
from mlx_diffgemma.backends.torch.kernels.attention import Tiles
from support.comparing import assert_close

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# Triton's interpreter multiplies the bit patterns of bfloat16 as integers. float16 works there, and takes the same code path.
HALF, PRECISION = (torch.float16, 2**-10) if DEVICE == "cpu" else (torch.bfloat16, 2**-7)

# float32 is the interpreter's: on a GPU its blocks would not fit.
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, HALF] if DEVICE == "cpu" else [HALF], ids=str)
each_tiles = pytest.mark.parametrize("hopper", [True, False], ids=["hopper", "99KB"])


class Canvas(NamedTuple):
    """Queries [B, H, N, D], and buffers [B, K, S, D] that hold NaN wherever the queries may not look."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    seen: Tensor

    @classmethod
    def random(cls, heads: int, shared: int, count: int, size: int, seen: list[tuple[int, int]], room: int = 9) -> "Canvas":
        draw = np.random.default_rng(5)
        capacity = max(end for _, end in seen) + room

        def normal(*shape: int) -> Tensor:
            return torch.from_numpy(draw.standard_normal(shape, np.float32)).to(DEVICE)

        queries = normal(len(seen), count, heads, size).transpose(1, 2) * (2 / size**0.5)  # scores of a few units
        keys, values = normal(2, len(seen), shared, capacity, size)
        for row, (begin, end) in enumerate(seen):
            for buffer in (keys, values):
                buffer[row, :, :begin] = buffer[row, :, end:] = torch.nan
        return cls(queries, keys, values, torch.tensor(seen, dtype=torch.int32, device=DEVICE))

    def to(self, dtype: torch.dtype) -> "Canvas":
        return Canvas(self.queries.to(dtype), self.keys.to(dtype), self.values.to(dtype), self.seen)

    def run(self, hopper: bool = True) -> Tensor:
        return kernels.attend_with(Tiles.of(self.queries.shape[-1], hopper), *self)

    def exact(self) -> NDArray[np.float64]:
        """The plain formula in float64."""
        group = self.queries.shape[1] // self.keys.shape[1]
        rows = []
        for row, (begin, end) in enumerate(self.seen.tolist()):
            queries = self.queries[row].double().cpu().numpy()
            keys, values = (
                np.repeat(each[row, :, begin:end].double().cpu().numpy(), group, axis=0) for each in (self.keys, self.values)
            )
            scores = queries @ keys.swapaxes(-1, -2)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            rows.append(weights @ values / weights.sum(axis=-1, keepdims=True))
        return np.stack(rows)

    def check(self, hopper: bool, what: str) -> None:
        """Weights and the result are rounded, sums are not: an error of two roundings of a value in half precision."""
        found = self.run(hopper)
        assert found.dtype == self.queries.dtype
        exact = self.exact()
        allowed = 2e-5 if found.dtype == torch.float32 else 2 * PRECISION * float(np.abs(exact).max())
        assert_close(found.float().cpu(), exact, allowed, f"{found.dtype}, {what}")


@each_tiles
@each_dtype
@pytest.mark.parametrize("committed", [0, 75])
@pytest.mark.parametrize(("size", "count"), [(16, 1), (16, 64), (64, 7), (256, 7), (512, 1), (512, 7)])
def test_a_canvas_sees_the_committed_positions_and_itself(
    size: int, count: int, committed: int, dtype: torch.dtype, hopper: bool
) -> None:
    shared = 2 if size == 16 else 1
    canvas = Canvas.random(2 * shared, shared, count, size, [(0, committed + count)])
    canvas.to(dtype).check(hopper, f"{count} queries of size {size} after {committed}")


def test_the_longest_canvas() -> None:
    Canvas.random(2, 1, 256, 16 if DEVICE == "cpu" else 256, [(30, 30 + 75 + 256)]).to(HALF).check(True, "256 queries")


@each_tiles
@pytest.mark.parametrize("size", kernels.SIZES)
def test_heads_and_canvas_of_the_real_model(size: int, hopper: bool) -> None:
    """16 heads; on sliding layers every two share keys, on full layers every eight do. Interpreted, one key-value head."""
    group = 2 if size == 256 else 8
    shared, count = (1, 20) if DEVICE == "cpu" else (16 // group, 256)
    Canvas.random(group * shared, shared, count, size, [(11, 11 + 63 + count)]).to(HALF).check(hopper, f"size {size}")


@each_tiles
@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 65, 128, 129, 256, 257, 289])
def test_lengths_at_the_edges_of_blocks_and_parts(length: int, hopper: bool) -> None:
    """The stretch begins later than the buffer, as behind a sliding layer's window."""
    canvas = Canvas.random(2, 1, 3, 16 if DEVICE == "cpu" else 256, [(5, 5 + length)])
    canvas.to(torch.float32 if DEVICE == "cpu" else HALF).check(hopper, f"{length} keys from 5")


def test_large_scores() -> None:
    """Scores that a float32 exponential cannot hold, with the highest in the last part."""
    canvas = Canvas.random(2, 1, 5, 16 if DEVICE == "cpu" else 256, [(0, 300)]).to(HALF)
    growing = torch.linspace(0, 30, 309, device=DEVICE).to(HALF)[:, None]
    canvas._replace(keys=canvas.keys.nan_to_num() * growing, queries=canvas.queries * 10).check(True, "large scores")


def in_order(a: NDArray[np.float32], b: NDArray[np.float32], dtype: type) -> NDArray[np.float32]:
    """A product summed term by term, in an order that the place of a row does not change. (BLAS promises no order.)"""
    total = np.zeros((a.shape[0], b.shape[1]), dtype)
    for k in range(a.shape[1]):
        total += a[:, k, None].astype(dtype) * b[k].astype(dtype)
    return total


@pytest.fixture
def dots_in_order(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if DEVICE == "cpu":
        monkeypatch.setattr(np, "matmul", in_order)
    return


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16)


@pytest.mark.usefixtures("dots_in_order")
def test_a_row_has_the_same_bits_beside_others() -> None:
    """Whatever queries, texts and room there are beside it."""
    size = 16 if DEVICE == "cpu" else 256
    canvas = Canvas.random(2, 1, 70, size, [(3, 200), (40, 200)]).to(HALF)
    whole = bits(canvas.run())
    for places in ([0], [69], list(range(3, 67)), list(range(70))[::-1]):
        fewer = canvas._replace(queries=canvas.queries[:, :, places])
        assert torch.equal(bits(fewer.run()), whole[:, :, places]), places
    for row in range(2):
        alone = Canvas(*(each[row : row + 1] for each in canvas))
        assert torch.equal(bits(alone.run()), whole[row : row + 1]), f"text {row} alone"
    longer = Canvas(canvas.queries, *(torch.cat([each] * 3, dim=2) for each in canvas[1:3]), canvas.seen)
    assert torch.equal(bits(longer.run()), whole), "more room"
    # The test has teeth: one key less, which hardly weighs, changes the bits.
    seen = canvas.seen - torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    assert not torch.equal(bits(canvas._replace(seen=seen).run()), whole)


@pytest.mark.parametrize("size", kernels.SIZES)
def test_bidirectional_uses_them(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    attend = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *args: calls.append(args) or attend(*args))
    if DEVICE == "cpu":
        monkeypatch.setattr(attention, "_kernels", lambda *_: kernels)
    canvas = Canvas.random(4, 2, 5, size, [(2, 43), (2, 43)]).to(HALF)
    keys, values = (each[:, :, 2:43] for each in (canvas.keys, canvas.values))  # what a cache returns
    found = attention.bidirectional(canvas.queries, keys, values)
    assert len(calls) == 1
    assert_close(found.float().cpu(), canvas.exact(), 2 * PRECISION, f"bidirectional, size {size}")


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_everything_else_is_left_to_pytorch() -> None:
    for dtype, size, gradient in ((HALF, 64, False), (torch.float32, 256, False), (HALF, 256, True)):
        canvas = Canvas.random(2, 1, 3, size, [(0, 9)], room=0).to(dtype)
        keys = canvas.keys.requires_grad_(gradient)
        assert attention._kernels(canvas.queries, keys, canvas.values) is None, (dtype, size, gradient)


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("size", kernels.SIZES)
def test_a_graph_captured_once_follows_the_text(size: int) -> None:
    longest = Canvas.random(4, 2, 7, size, [(0, 600)]).to(HALF)
    static = longest._replace(seen=torch.tensor([[0, 7]], dtype=torch.int32, device=DEVICE))
    kernels.attend(*static)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernels.attend(*static)
    for begin, end in ((0, 7), (0, 64), (300, 601), (90, 599)):
        seen = torch.tensor([[begin, min(end, 600)]], dtype=torch.int32, device=DEVICE)
        static.seen.copy_(seen)
        graph.replay()
        assert torch.equal(bits(found), bits(kernels.attend(*longest._replace(seen=seen))))
