"""Weights packed by ``mx.quantize``, for the tests of both backends."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np
import torch
from numpy.typing import NDArray

from mlx_diffgemma.checkpoint import Quantization

AFFINE = [Quantization(group_size, bits) for bits in (2, 3, 4, 5, 6, 8) for group_size in (32, 64, 128)]
FORMATS = [*AFFINE, Quantization(32, 4, "mxfp4"), Quantization(32, 8, "mxfp8"), Quantization(16, 4, "nvfp4")]


class Packed(NamedTuple):
    """A packed weight as MLX arrays by their checkpoint names, and the float32 values that it represents."""

    arrays: dict[str, mx.array]
    values: NDArray[np.float32]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: as_torch(array) for name, array in self.arrays.items()}


def pack(quantization: Quantization, *shape: int, seed: int = 0, dtype: mx.Dtype = mx.float32) -> Packed:
    """A random weight [.., out, in], standard normal. Affine scales and biases are in ``dtype``."""
    weight = mx.array(np.random.default_rng(seed).standard_normal(shape, np.float32)).astype(dtype)
    arrays = dict(zip(("weight", "scales", "biases"), mx.quantize(weight, **arguments(quantization)), strict=False))
    return Packed(arrays, np.array(unpack(quantization, **arrays)))


def unpack(quantization: Quantization, weight: mx.array, scales: mx.array, biases: mx.array | None = None) -> mx.array:
    """Dequantize a packed weight with MLX, in float32 throughout."""
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(weight, scales, biases, dtype=mx.float32, **arguments(quantization))


def arguments(quantization: Quantization) -> dict[str, int | str]:
    return {"group_size": quantization.group_size, "bits": quantization.bits, "mode": quantization.mode}


def as_torch(array: mx.array) -> torch.Tensor:
    if array.dtype == mx.bfloat16:  # NumPy has no bfloat16
        return torch.from_numpy(np.array(array.view(mx.uint16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def identifier(quantization: Quantization) -> str:
    return f"{quantization.mode}-{quantization.bits}-{quantization.group_size}"
