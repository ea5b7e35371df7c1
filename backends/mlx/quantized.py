"""Modules whose weights stay packed as MLX stores them, in MLX.

A packed weight [.., out, in * bits / 32] is multiplied as it is, by products.py. Results have the dtype of the activations.
(``nn.QuantizedLinear`` answers in the wider of the activations' and the scales' types, and packs a random matrix each time one is
made.)
"""

from collections.abc import Mapping

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten

from mlx_diffgemma.backends.mlx import products
from mlx_diffgemma.checkpoint import Quantization
from mlx_diffgemma.errors import CheckpointError


class Quantized(nn.Module):
    """The packed weight of a module of weights [.., out, in], under the checkpoint's names, with room to load it."""

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
    """The token table [V, H], in all three of its uses. ``dtype`` is that of the rows it looks up."""

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
    """One linear map an expert, weight [E, out, in]."""

    def __call__(self, x: mx.array, experts: mx.array) -> mx.array:
        """Rows of x [M, 1, in] are sorted by expert; ``experts`` (uint32 [M]) says which is whose. Gives [M, 1, out]."""
        return products.expert_linear(x, experts, *self.packed)


def quantize_modules(model: nn.Module, table: Mapping[str, Quantization], dtype: mx.Dtype) -> None:
    """Replace the modules of ``model`` at the paths in ``table`` by quantized ones, ready to be loaded.

    What a module is shows in its form: a token table has ``as_linear``, experts have a weight of three dimensions, and all else
    is an ``nn.Linear`` without bias. ``dtype`` is the activations'.

    Raises CheckpointError where a path leads to no such module or a row is no whole number of groups.
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
            raise CheckpointError(f"{path}: rows of {weight.shape[-1]} weights are no whole number of groups ({quantization})")
        if hasattr(module, "as_linear"):
            quantized.append((path, QuantizedEmbedding(weight.shape, quantization, dtype)))
        else:
            kind = QuantizedExpertLinear if weight.ndim == 3 else QuantizedLinear
            quantized.append((path, kind(weight.shape, quantization)))
    model.update_modules(tree_unflatten(quantized))
