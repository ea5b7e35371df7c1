"""Products with packed weights: kernels/products.py on CUDA, packing.py on a CPU."""

from importlib import import_module
from types import ModuleType

from torch import Tensor

from mlx_diffgemma.backends.torch import packing
from mlx_diffgemma.checkpoint import Quantization
from mlx_diffgemma.errors import BackendError


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


def rows(index: Tensor, weight: Tensor, scales: Tensor, biases: Tensor | None, quantization: Quantization) -> Tensor:
    """The weights at ``index`` of the first dimension, float32."""
    return packing.rows(index, weight, scales, biases, quantization)


def _place(x: Tensor) -> ModuleType:
    """The module with the products for x's device. Triton is imported on CUDA only."""
    if not x.is_cuda:
        return packing
    try:
        return import_module("mlx_diffgemma.backends.torch.kernels.products")
    except ImportError as absent:
        raise BackendError(f"quantized weights on CUDA need triton ({absent}); try: pip install triton") from None
