"""Products with packed weights on a CPU. A weight is widened to float32 one tile, or one expert, at a time, never as a whole.

A packed weight [.., out, in * bits / 32] is 32-bit words that hold a row's codes as one little-endian bit stream. ``mode`` says
what a code and its group's scale are:

- affine: the code is an unsigned integer q, and the weight is scale * q + bias. Scale and bias are as stored (BF16, FP16, F32).
- mxfp4: E2M1 codes, an E8M0 scale. mxfp8: E4M3 codes, an E8M0 scale. nvfp4: E2M1 codes, an E4M3 scale. Scales are in U8.

The three products are the same as in kernels.py, which is for CUDA. Sums are in float32, and results have the dtype of the
activations.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mlx_diffgemma.checkpoint import Quantization

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_TILE = 2**23  # weights widened at a time on a CPU: 32 MB of float32


def dequantize(weight: Tensor, scales: Tensor, biases: Tensor | None, quantization: Quantization, dtype: torch.dtype) -> Tensor:
    """The weights [.., in] of packed words [.., in * bits / 32], computed in float32 and then rounded to ``dtype``.

    In float32 the weights equal those of ``mx.dequantize`` to the bit: with ``dtype=float32`` for the modes with U8 scales, and
    with scales and biases widened to float32 for affine. (With narrower ones MLX rounds to their type; here the product is not
    rounded.) An E8M0 scale of 255, which stands for NaN, is NaN here and infinite in MLX.
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
    """The values of the codes in bytes [.., in * bits / 8], float32 [.., in]."""
    bits = quantization.bits
    if bits == 8:
        return (octets.view(torch.float8_e4m3fn) if quantization.mode == "mxfp8" else octets).float()
    if bits == 4 and quantization.mode == "affine":  # a byte holds two codes, which become the two bytes of an int16
        pairs = octets.to(torch.int16)
        return pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F).view(torch.uint8).float()
    if bits == 4:  # here a byte becomes one 8-byte entry of a table: many times faster than looking up each code
        values = _pairs(octets.device).index_select(0, octets.int().flatten())
        return values.view(torch.float32).view(*octets.shape[:-1], -1)
    # Eight codes fill ``bits`` bytes, and each code lies within two neighbouring bytes.
    units = octets.unflatten(-1, (-1, bits))
    start = torch.arange(0, 8 * bits, bits, device=octets.device)
    low, high = start // 8, (start // 8 + 1).clamp(max=bits - 1)
    codes = (units[..., low].int() | units[..., high].int() << 8) >> (start % 8).int() & (1 << bits) - 1
    return codes.float().flatten(-2)


@cache
def _pairs(device: torch.device) -> Tensor:
    """For each byte, the values of its two E2M1 codes: two float32 stored as one float64 [256]."""
    values = torch.tensor(_E2M1, device=device)
    codes = torch.arange(256, device=device)
    return torch.stack((values[codes & 15], values[codes >> 4]), dim=-1).view(torch.float64).flatten()


def rows(
    index: slice | int | Tensor, weight: Tensor, scales: Tensor, biases: Tensor | None, quantization: Quantization
) -> Tensor:
    """The weights at ``index`` of the first dimension, float32."""
    return dequantize(weight[index], scales[index], None if biases is None else biases[index], quantization, torch.float32)


def linear(x: Tensor, weight: Tensor, scales: Tensor, biases: Tensor | None, quantization: Quantization) -> Tensor:
    """x [.., in] times the transpose of a packed matrix [out, in * bits / 32] -> [.., out]."""
    wide, result = x.float(), x.new_empty(*x.shape[:-1], weight.shape[0])
    for tile in _tiles(weight, quantization):
        result[..., tile] = F.linear(wide, rows(tile, weight, scales, biases, quantization))
    return result


def expert_linear(
    x: Tensor, ends: Tensor, weight: Tensor, scales: Tensor, biases: Tensor | None, quantization: Quantization
) -> Tensor:
    """Rows of x [M, in], sorted by expert, times the transpose of their expert's matrix [out, in * bits / 32] -> [M, out]."""
    wide, result = x.float(), x.new_empty(x.shape[0], weight.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            result[start:end] = F.linear(wide[start:end], rows(expert, weight, scales, biases, quantization))
        start = end
    return result


def weighted_rows(
    probabilities: Tensor, weight: Tensor, scales: Tensor, biases: Tensor | None, quantization: Quantization
) -> Tensor:
    """Probabilities [.., V] times a packed matrix [V, H * bits / 32] -> [.., H]."""
    first, *others = _tiles(weight, quantization)
    total = probabilities[..., first].float() @ rows(first, weight, scales, biases, quantization)
    for tile in others:
        total += probabilities[..., tile].float() @ rows(tile, weight, scales, biases, quantization)
    return total.to(probabilities.dtype)


def _tiles(weight: Tensor, quantization: Quantization) -> list[slice]:
    """Slices of a matrix's output rows, each small enough to be widened at once."""
    count, words = weight.shape
    step = max(1, _TILE * quantization.bits // (32 * words))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
