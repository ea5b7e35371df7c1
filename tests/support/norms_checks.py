"""Compares the kernels between the products with the operations of model.py. test_norms.py runs this in a process of its own."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mlx_diffgemma.backends.torch.fused import rotate
from mlx_diffgemma.backends.torch.kernels import norms
from support.comparing import assert_close

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
EPS = 1e-6
# The interpreter cuts bfloat16 off where GPUs round, so it is compared on GPUs only.
TYPES = [(torch.float32, 1e-5), (torch.float16, 4e-3)] + ([] if INTERPRETED else [(torch.bfloat16, 4e-2)])

each_type = pytest.mark.parametrize(("dtype", "tolerance"), TYPES, ids=[str(dtype) for dtype, _ in TYPES])
each_shape = pytest.mark.parametrize(("rows", "size"), [(1, 32), (5, 70), (3, 2816)])


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def norm(x: Tensor, weight: Tensor | None) -> Tensor:
    """As RMSNorm in model.py."""
    return F.rms_norm(x.float(), x.shape[-1:], None if weight is None else weight.float(), EPS).to(x.dtype)


@each_type
@each_shape
def test_rms_norm(rows: int, size: int, dtype: torch.dtype, tolerance: float) -> None:
    x, weight = normal(rows, 2, size, dtype=dtype), normal(size, dtype=dtype, seed=1)
    for each in (weight, None):
        assert_close(norms.rms_norm(x, each, EPS).cpu().float(), norm(x, each).cpu().float(), tolerance, "norm")
    assert_close(
        norms.rms_norm(x[:, :1], weight, EPS).cpu().float(), norm(x[:, :1], weight).cpu().float(), tolerance, "of a part"
    )


@each_type
@each_shape
def test_after_attention(rows: int, size: int, dtype: torch.dtype, tolerance: float) -> None:
    x, attended = normal(rows, size, dtype=dtype), normal(rows, size, dtype=dtype, seed=1)
    weights = tuple(normal(size, dtype=dtype, seed=seed) for seed in range(2, 6))
    total = x + norm(attended, weights[0])
    expected = total, norm(total, weights[1]), norm(total, weights[2]), norm(total, None) * weights[3] * size**-0.5
    found = norms.after_attention(x, attended, weights[:3], weights[3], EPS)
    for name, one, other in zip(("sum", "dense", "sparse", "router"), found, expected, strict=True):
        assert_close(one.cpu().float(), other.cpu().float(), 2 * tolerance, name)
    for row in range(rows):
        alone = norms.after_attention(x[row : row + 1], attended[row : row + 1], weights[:3], weights[3], EPS)
        assert all(torch.equal(one[row : row + 1], other) for one, other in zip(found, alone, strict=True)), "a row by itself"


@each_type
@each_shape
def test_after_experts(rows: int, size: int, dtype: torch.dtype, tolerance: float) -> None:
    x, dense, sparse = (normal(rows, size, dtype=dtype, seed=seed) for seed in range(3))
    weights = tuple(normal(size, dtype=dtype, seed=seed) for seed in range(3, 6))
    scalar = torch.tensor([0.7], dtype=dtype, device=DEVICE)
    expected = (x + norm(norm(dense, weights[0]) + norm(sparse, weights[1]), weights[2])) * scalar
    found = norms.after_experts(x, dense, sparse, weights, scalar, EPS)
    assert_close(found.cpu().float(), expected.cpu().float(), 2 * tolerance, "sum of both branches")
    alone = norms.after_experts(x[-1:], dense[-1:], sparse[-1:], weights, scalar, EPS)
    assert torch.equal(found[-1:], alone), "a row by itself"


@each_type
@pytest.mark.parametrize(("count", "number", "size"), [(1, 1, 8), (3, 4, 72), (2, 3, 256)])
def test_heads(count: int, number: int, size: int, dtype: torch.dtype, tolerance: float) -> None:
    joined, weight = normal(count, (number + 2) * size, dtype=dtype), normal(size, dtype=dtype, seed=1)
    x = joined[:, : number * size].unflatten(-1, (-1, size))  # the rows of tokens are parts of longer ones
    angles = (torch.arange(count)[:, None] * torch.rand(size // 2, generator=torch.Generator().manual_seed(2))).repeat(1, 2)[
        :, None
    ]
    rope = angles.cos().to(dtype).to(DEVICE), angles.sin().to(dtype).to(DEVICE)
    expected = rotate(norm(x, weight), *rope)
    assert_close(norms.heads(x, weight, rope, EPS).cpu().float(), expected.cpu().float(), 2 * tolerance, "rotated")
    assert_close(norms.heads(x, None, None, EPS).cpu().float(), norm(x, None).cpu().float(), tolerance, "values")


@each_type
@pytest.mark.parametrize(("rows", "size"), [(1, 5), (3, 1030)])
def test_geglu(rows: int, size: int, dtype: torch.dtype, tolerance: float) -> None:
    both = 4 * normal(rows, 2 * size, dtype=dtype)
    gate, up = both.chunk(2, dim=-1)
    expected = F.gelu(gate, approximate="tanh") * up
    # gelu itself has about four more bits of error near its zero than its argument.
    assert_close(norms.geglu(gate, up).cpu().float(), expected.cpu().float(), 16 * tolerance, "gate")
    assert norms.geglu(gate[:0], up[:0]).shape == (0, size)
