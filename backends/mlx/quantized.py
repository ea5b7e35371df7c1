"""Modules whose weights stay packed as MLX stores them, in MLX.

products.py multiplies by a packed weight [.., out, in * bits / 32] directly. Results have the dtype of the activations.
(``nn.QuantizedLinear`` is not used: it returns the wider of the activations' and the scales' types, and its constructor packs a
random matrix.)
"""

from collections.abc import Mapping

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten

from mlx_diffgemma.backends.mlx import products
from mlx_diffgemma.checkpoint import Quantization
from mlx_diffgemma.errors import CheckpointError


class Quantized(nn.Module):
    """The packed form of a weight [.., out, in], under the checkpoint's names, allocated so that it can be loaded."""

    def __init__(self, shape: tuple[int, ...], quantization: Quantization) -> None:
        super().__init__()
        self.format = quantization
        *rows, size = shape
        groups = (*rows, size // quantization.group_size)
        affine = quantization.mode == "affine"
        self.weight = mx.zeros((*rows, size * quantization.bits // 32), dtype=mx.uint32)
        self.scales = mx.zeros(groups, dtype=mx.bfloat16 if affine else mx.uint8)
        self.biases = mx.zeros(groups, dtype=mx.bfloat16) if affine else None

    @property
    def packed(self) -> tuple[mx.array, mx.array, mx.array | None, Quantization]:
        return self.weight, self.scales, self.biases, self.format


class QuantizedLinear(Quantized):
    """``nn.Linear`` without bias, weight [out, in]."""

    def __call__(self, x: mx.array) -> mx.array:
        return products.linear(x, *self.packed)


class QuantizedEmbedding(Quantized):
    """The token table [V, H] and its three uses. ``dtype`` is the type of the rows it looks up."""

    def __init__(self, shape: tuple[int, ...], quantization: Quantization, dtype: mx.Dtype) -> None:
        super().__init__(shape, quantization)
        self.dtype = dtype

    def __call__(self, tokens: mx.array) -> mx.array:
        return products.rows(tokens, *self.packed).astype(self.dtype)  # [.., H]

    def as_linear(self, x: mx.array) -> mx.array:
        return products.linear(x, *self.packed)  # [.., V]

    def weighted_rows(self, probabilities: mx.array) -> mx.array:
        return products.weighted_rows(probabilities, *self.packed)  # [.., H]


class QuantizedExpertLinear(Quantized):
    """One linear map per expert, weight [E, out, in]."""

    def __call__(self, x: mx.array, experts: mx.array) -> mx.array:
        """Send row m of x [M, 1, in] through expert ``experts[m]`` (uint32 [M]) -> [M, 1, out]. Rows are sorted by expert."""
        return products.expert_linear(x, experts, *self.packed)


def quantize_modules(model: nn.Module, table: Mapping[str, Quantization], dtype: mx.Dtype) -> None:
    """Replace the modules of ``model`` at the paths in ``table`` with quantized ones, ready to be loaded.

    A module is recognized by its form: a token table has ``as_linear``, experts have a weight of three dimensions, and anything
    else is an ``nn.Linear`` without bias. ``dtype`` is the type of the activations.

    Raises CheckpointError if no such module is at a path, or if a row is not a whole number of groups.
    """
    modules, quantized = dict(model.named_modules()), list[tuple[str, nn.Module]]()
    for path, quantization in table.items():
        if path not in modules:
            raise CheckpointError(f"{path} is quantized, but the model has no such module")
        module = modules[path]
        weight = module.get("weight")
        if weight is None or weight.ndim < 2:
            raise CheckpointError(f"{path} is quantized, but is not a matrix")
        if weight.shape[-1] % quantization.group_size:
            raise CheckpointError(f"{path}: rows of {weight.shape[-1]} weights are not a whole number of groups ({quantization})")
        if hasattr(module, "as_linear"):
            quantized.append((path, QuantizedEmbedding(weight.shape, quantization, dtype)))
        else:
            kind = QuantizedExpertLinear if weight.ndim == 3 else QuantizedLinear
            quantized.append((path, kind(weight.shape, quantization)))
    model.update_modules(tree_unflatten(quantized))
