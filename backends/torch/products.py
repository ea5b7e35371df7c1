"""Products with packed weights: kernels/products.py on CUDA, packing.py on a CPU."""

from types import ModuleType

from torch import Tensor

from mlx_diffgemma.backends.torch import kernels, packing
from mlx_diffgemma.checkpoint import Quantization
from mlx_diffgemma.errors import BackendError

#: A packed matrix, or one for each expert: weight, scales, biases and format.
Packed = tuple[Tensor, Tensor, Tensor | None, Quantization]


def linear(x: Tensor, weight: Tensor, scales: Tensor, biases: Tensor | None, quantization: Quantization) -> Tensor:
    """x [.., in] times the transpose of a packed matrix [out, in * bits / 32] -> [.., out], in the dtype of x."""
    product: Tensor = _place(x).linear(x, weight, scales, biases, quantization)
    return product


def weighted_rows(x: Tensor, weight: Tensor, scales: Tensor, biases: Tensor | None, quantization: Quantization) -> Tensor:
    """x [.., out] times a packed matrix [out, in * bits / 32] -> [.., in], in the dtype of x."""
    product: Tensor = _place(x).weighted_rows(x, weight, scales, biases, quantization)
    return product


def expert_linear(
    x: Tensor, ends: Tensor, weight: Tensor, scales: Tensor, biases: Tensor | None, quantization: Quantization
) -> Tensor:
    """Rows of x [M, in], sorted by expert, times the transpose of their expert's matrix [out, in * bits / 32] -> [M, out]."""
    product: Tensor = _place(x).expert_linear(x, ends, weight, scales, biases, quantization)
    return product


def experts(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Packed, down: Packed) -> Tensor | None:
    """What ``model.Experts`` computes, in one call of kernels/experts.py; None where that has no kernels for it.

    x is [T, H], ``weights`` (float32) and ``chosen`` [T, K]. The kernels are for bfloat16 on Ampere or newer and for the format
    that is published, 4 bits in affine groups of 64.
    """
    if not kernels.on_tensor_cores(x) or any(packed[3] != Quantization(64, 4) for packed in (gate_up, down)):
        return None
    if x.shape[-1] % 128 or gate_up[0].shape[-2] % 128:  # blocks are not cut short
        return None
    mixed: Tensor = _kernels("experts").mixed(x, weights, chosen, gate_up[:3], down[:3])
    return mixed


def rows(index: Tensor, weight: Tensor, scales: Tensor, biases: Tensor | None, quantization: Quantization) -> Tensor:
    """The weights at ``index`` of the first dimension, float32."""
    return packing.rows(index, weight, scales, biases, quantization)


def _place(x: Tensor) -> ModuleType:
    """The module with the products for x's device. Triton is imported on CUDA only."""
    return _kernels("products") if x.is_cuda else packing


def _kernels(name: str) -> ModuleType:
    try:
        return kernels.load(name)
    except ImportError as absent:
        raise BackendError(f"quantized weights on CUDA need triton ({absent}); try: pip install triton") from None
