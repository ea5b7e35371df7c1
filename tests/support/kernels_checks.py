"""The Triton kernels against float64 products; test_kernels.py runs this in a process of its own, interpreted or on CUDA."""

import os

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_diffgemma.backends.torch import kernels
from mlx_diffgemma.checkpoint import Quantization
from support.comparing import assert_close
from support.packed import FORMATS, identifier, pack

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# Triton's interpreter multiplies the bit patterns of bfloat16 as integers; it does float16 right, which takes the same way.
HALF, PRECISION = (torch.float16, 2**-10) if DEVICE == "cpu" else (torch.bfloat16, 2**-7)
SCALES = {"affine": mx.float16}
COUNTS = np.array([0, 1, 0, 19, 3, 0])  # rows of each expert: some have none, one has more than a block of 16
OUT = 37

each_format = pytest.mark.parametrize("quantization", FORMATS, ids=identifier)


def weight(quantization: Quantization, *shape: int) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], np.ndarray]:
    packed = pack(quantization, *shape, dtype=SCALES.get(quantization.mode, mx.float32))
    tensors = {name: tensor.to(DEVICE) for name, tensor in packed.tensors.items()}
    arguments = tensors["weight"].view(torch.int32), tensors["scales"], tensors.get("biases")
    return arguments, packed.values.astype(np.float64)


def normal(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).standard_normal(shape, np.float32)).to(DEVICE)


def size(quantization: Quantization) -> int:
    """Three groups, but of at least 32: with most formats not a whole number of the kernels' blocks of 128."""
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
    packed, values = weight(quantization, 75, size(quantization))  # more than one part of the sum, the last not full
    p = normal(3, 75)
    y = kernels.weighted_rows(p, *packed, quantization)
    assert_close(y.cpu(), p.cpu().double().numpy() @ values, 1e-4, "weighted rows")


@pytest.mark.parametrize("quantization", [q for q in FORMATS if q.group_size in (16, 64) or q.mode != "affine"], ids=identifier)
def test_half_precision(quantization: Quantization) -> None:
    """Widened weights and results are rounded, sums are not: errors stay within one rounding of the largest value."""
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
