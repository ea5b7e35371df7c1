"""Modules whose weights stay packed as MLX stores them, in PyTorch.

A packed weight [.., out, in * bits / 32] is 32-bit words that hold a row's codes as one little-endian bit stream. ``mode`` says
what a code and its group's scale are:

- affine: the code is an unsigned integer q, and the weight is scale * q + bias; both are as stored (BF16, FP16 or F32).
- mxfp4: E2M1 codes, an E8M0 scale. mxfp8: E4M3 codes, an E8M0 scale. nvfp4: E2M1 codes, an E4M3 scale. Scales are in U8.

On a CPU a module widens its weight to float32 a tile at a time, never whole. On CUDA it runs the kernels beside this file,
which widen it in registers. Either way products accumulate in float32, and the result has the dtype of the activations.
"""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_diffgemma.checkpoint import Quantization
from mlx_diffgemma.errors import BackendError, CheckpointError

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_TILE = 2**23  # weights widened at a time on a CPU: 32 MB of float32


def dequantize(weight: Tensor, scales: Tensor, biases: Tensor | None, quantization: Quantization, dtype: torch.dtype) -> Tensor:
    """The weights [.., in] of packed words [.., in * bits / 32], computed in float32 and then rounded to ``dtype``.

    In float32 they equal, to the bit, ``mx.dequantize`` with ``dtype=float32`` for the modes with U8 scales, and with scales and
    biases widened to float32 for affine. (With narrower ones MLX rounds to their type; here their product is not rounded.)
    An E8M0 scale of 255, which stands for NaN, is NaN here and infinite in MLX.
    """
    values = _codes(weight.view(torch.uint8), quantization)
    groups = values.unflatten(-1, (-1, quantization.group_size))
    if quantization.mode == "affine":
        assert biases is not None
        groups.mul_(scales.float().unsqueeze(-1)).add_(biases.float().unsqueeze(-1))
    else:
        form = torch.float8_e4m3fn if quantization.mode == "nvfp4" else torch.float8_e8m0fnu
        groups.mul_(scales.view(form).float().unsqueeze(-1))
    return values.to(dtype)


def _codes(octets: Tensor, quantization: Quantization) -> Tensor:
    """What the codes in bytes [.., in * bits / 8] stand for, float32 [.., in]."""
    bits = quantization.bits
    if bits == 8:
        return (octets.view(torch.float8_e4m3fn) if quantization.mode == "mxfp8" else octets).float()
    if bits == 4 and quantization.mode == "affine":  # a byte is two codes, which become the bytes of one int16
        pairs = octets.to(torch.int16)
        return pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F).view(torch.uint8).float()
    if bits == 4:  # ... or one 8-byte entry of a table: many times faster than looking up each
        values = _pairs(octets.device).index_select(0, octets.int().flatten())
        return values.view(torch.float32).view(*octets.shape[:-1], -1)
    # Eight codes fill ``bits`` bytes, and each lies within two neighbouring ones.
    units = octets.unflatten(-1, (-1, bits))
    start = torch.arange(0, 8 * bits, bits, device=octets.device)
    low, high = start // 8, (start // 8 + 1).clamp(max=bits - 1)
    codes = (units[..., low].int() | units[..., high].int() << 8) >> (start % 8).int() & (1 << bits) - 1
    return codes.float().flatten(-2)


@cache
def _pairs(device: torch.device) -> Tensor:
    """For each byte the values of its two E2M1 codes, float32 side by side in one float64 [256]."""
    values = torch.tensor(_E2M1, device=device)
    codes = torch.arange(256, device=device)
    return torch.stack((values[codes & 15], values[codes >> 4]), dim=-1).view(torch.float64).flatten()


class Quantized(nn.Module):
    """The packed weight of a module of weights [.., out, in], under the checkpoint's names, with room to load it."""

    weight: Tensor
    scales: Tensor
    biases: Tensor | None

    def __init__(self, shape: torch.Size, quantization: Quantization, device: torch.device) -> None:
        super().__init__()
        self.quantization = quantization
        *rows, size = shape
        groups = (*rows, size // quantization.group_size)
        affine = quantization.mode == "affine"
        self.register_buffer("weight", torch.empty(*rows, size * quantization.bits // 32, dtype=torch.int32, device=device))
        self.register_buffer("scales", torch.empty(groups, dtype=torch.bfloat16 if affine else torch.uint8, device=device))
        self.register_buffer("biases", torch.empty(groups, dtype=torch.bfloat16, device=device) if affine else None)

    @property
    def packed(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.weight.view(torch.int32), self.scales, self.biases  # loaded as uint32, which torch can hardly index

    def rows(self, index: slice | int | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights at ``index`` of the first dimension."""
        weight, scales, biases = self.packed
        return dequantize(weight[index], scales[index], None if biases is None else biases[index], self.quantization, dtype)

    def tiles(self) -> list[slice]:
        """Slices of the output rows that are small enough to be widened at once."""
        rows, words = self.weight.shape
        step = max(1, _TILE * self.quantization.bits // (32 * words))
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def linear(self, x: Tensor) -> Tensor:
        """x [.., in] -> [.., out]."""
        if x.is_cuda:
            product: Tensor = _kernels().linear(x, *self.packed, self.quantization)
            return product
        wide, result = x.float(), x.new_empty(*x.shape[:-1], self.weight.shape[0])
        for tile in self.tiles():
            result[..., tile] = F.linear(wide, self.rows(tile))
        return result


class QuantizedLinear(Quantized):
    """``nn.Linear`` without bias, weight [out, in]."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class QuantizedEmbedding(Quantized):
    """The token table [V, H], in all three of its uses. ``dtype`` is that of the rows it looks up."""

    def __init__(self, shape: torch.Size, quantization: Quantization, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(shape, quantization, device)
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        return self.rows(tokens, self.dtype)  # [.., H]

    def as_linear(self, x: Tensor) -> Tensor:
        return self.linear(x)  # [.., V]

    def weighted_rows(self, probabilities: Tensor) -> Tensor:
        if probabilities.is_cuda:
            product: Tensor = _kernels().weighted_rows(probabilities, *self.packed, self.quantization)
            return product
        tiles = self.tiles()
        total = probabilities[..., tiles[0]].float() @ self.rows(tiles[0])
        for tile in tiles[1:]:
            total += probabilities[..., tile].float() @ self.rows(tile)
        return total.to(probabilities.dtype)  # [.., H]


class QuantizedExpertLinear(Quantized):
    """One linear map an expert, weight [E, out, in]."""

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Rows of x [M, in] are sorted by expert; those of expert e end at ``ends[e]`` (int32 [E])."""
        if x.is_cuda:
            product: Tensor = _kernels().expert_linear(x, ends, *self.packed, self.quantization)
            return product
        wide, result = x.float(), x.new_empty(x.shape[0], self.weight.shape[1])
        start = 0
        for expert, end in enumerate(ends.tolist()):
            if end > start:
                result[start:end] = F.linear(wide[start:end], self.rows(expert))
            start = end
        return result


def quantize_modules(model: nn.Module, table: Mapping[str, Quantization], dtype: torch.dtype) -> None:
    """Replace the modules of ``model`` at the paths in ``table`` by quantized ones on the same device, ready to be loaded.

    What a module is shows in its form: a token table has ``as_linear``, experts have a weight of three dimensions, and all else
    is an ``nn.Linear`` without bias. ``dtype`` is the activations'.

    Raises CheckpointError where a path leads to no such module or a row is no whole number of groups.
    """
    for path, quantization in table.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise CheckpointError(f"{path} is quantized, but the model has no such module") from None
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim < 2:
            raise CheckpointError(f"{path} is quantized, but is not a matrix")
        if weight.shape[-1] % quantization.group_size:
            raise CheckpointError(f"{path}: rows of {weight.shape[-1]} weights are no whole number of groups ({quantization})")
        if hasattr(module, "as_linear"):
            model.set_submodule(path, QuantizedEmbedding(weight.shape, quantization, weight.device, dtype))
        else:
            kind = QuantizedExpertLinear if weight.ndim == 3 else QuantizedLinear
            model.set_submodule(path, kind(weight.shape, quantization, weight.device))


def _kernels() -> ModuleType:
    """The Triton kernels; imported on CUDA only."""
    try:
        return import_module("mlx_diffgemma.backends.torch.kernels")
    except ImportError as absent:
        raise BackendError(f"quantized weights on CUDA need triton ({absent}); try: pip install triton") from None
