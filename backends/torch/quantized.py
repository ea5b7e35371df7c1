"""Modules whose weights stay packed as MLX stores them, in PyTorch.

products.py multiplies by a packed weight [.., out, in * bits / 32] directly. Results have the dtype of the activations.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mlx_diffgemma.backends.torch import products
from mlx_diffgemma.checkpoint import Quantization
from mlx_diffgemma.errors import CheckpointError


class Quantized(nn.Module):
    """The packed form of a weight [.., out, in], under the checkpoint's names, allocated so that it can be loaded."""

    weight: Tensor
    scales: Tensor
    biases: Tensor | None

    def __init__(self, shape: tuple[int, ...], quantization: Quantization) -> None:
        super().__init__()
        self.format = quantization
        *rows, size = shape
        groups = (*rows, size // quantization.group_size)
        affine = quantization.mode == "affine"
        self.register_buffer("weight", torch.zeros(*rows, size * quantization.bits // 32, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, dtype=torch.bfloat16 if affine else torch.uint8))
        self.register_buffer("biases", torch.zeros(groups, dtype=torch.bfloat16) if affine else None)

    @property
    def packed(self) -> products.Packed:
        # Words are loaded as uint32, for which torch supports little indexing.
        return self.weight.view(torch.int32), self.scales, self.biases, self.format


class QuantizedLinear(Quantized):
    """``nn.Linear`` without bias, weight [out, in]."""

    def forward(self, x: Tensor) -> Tensor:
        return products.linear(x, *self.packed)


class QuantizedEmbedding(Quantized):
    """The token table [V, H] and its three uses. ``dtype`` is the type of the rows it looks up."""

    def __init__(self, shape: tuple[int, ...], quantization: Quantization, dtype: torch.dtype) -> None:
        super().__init__(shape, quantization)
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        return products.rows(tokens, *self.packed).to(self.dtype)  # [.., H]

    def as_linear(self, x: Tensor) -> Tensor:
        return products.linear(x, *self.packed)  # [.., V]

    def weighted_rows(self, probabilities: Tensor) -> Tensor:
        return products.weighted_rows(probabilities, *self.packed)  # [.., H]


class QuantizedExpertLinear(Quantized):
    """One linear map per expert, weight [E, out, in]."""

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Send each row of x [M, in] through its expert. Rows are sorted by expert; those of e end at ``ends[e]`` (int32 [E])."""
        return products.expert_linear(x, ends, *self.packed)


def quantize_modules(model: nn.Module, table: Mapping[str, Quantization], dtype: torch.dtype) -> None:
    """Replace the modules of ``model`` at the paths in ``table`` with quantized ones, ready to be loaded.

    A module is recognized by its form: a token table has ``as_linear``, experts have a weight of three dimensions, and anything
    else is an ``nn.Linear`` without bias. ``dtype`` is the type of the activations. New modules are on torch's default device.

    Raises CheckpointError if no such module is at a path, or if a row is not a whole number of groups.
    """
    modules = dict(model.named_modules())
    for path, quantization in table.items():
        if path not in modules:
            raise CheckpointError(f"{path} is quantized, but the model has no such module")
        module = modules[path]
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim < 2:
            raise CheckpointError(f"{path} is quantized, but is not a matrix")
        if weight.shape[-1] % quantization.group_size:
            raise CheckpointError(f"{path}: rows of {weight.shape[-1]} weights are not a whole number of groups ({quantization})")
        if hasattr(module, "as_linear"):
            model.set_submodule(path, QuantizedEmbedding(weight.shape, quantization, dtype))
        else:
            kind = QuantizedExpertLinear if weight.ndim == 3 else QuantizedLinear
            model.set_submodule(path, kind(weight.shape, quantization))
