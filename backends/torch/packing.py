"""Products with packed weights on a CPU. A weight is widened to float32 one tile at a time, never as a whole.

A packed weight [.., out, in * bits / 32] is 32-bit words that hold a row's codes as one little-endian bit stream. ``mode`` says
what a code and its group's scale are:

- affine: the code is an unsigned integer q, and the weight is scale * q + bias. Scale and bias are as stored (BF16, FP16, F32).
- mxfp4: E2M1 codes, an E8M0 scale. mxfp8: E4M3 codes, an E8M0 scale. nvfp4: E2M1 codes, an E4M3 scale. Scales are in U8.

The three products are the same as in kernels/products.py, which is for CUDA. Sums are in float32, and results have the dtype of
the activations.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from mlx_diffgemma.checkpoint import Quantization

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_TILE = 2**22  # weights widened at a time for many rows of x: 16 MB of float32
_PART = 2**18  # weights widened at a time by each thread for few rows of x: 1 MB, which stays in its core's cache
_FEW = 64  # rows of x: for fewer, the smaller tiles are faster


def dequantize(weight: Tensor, scales: Tensor, biases: Tensor | None, quantization: Quantization, dtype: torch.dtype) -> Tensor:
    """The weights [.., in] of packed words [.., in * bits / 32], computed in float32 and then rounded to ``dtype``.

    In float32 the weights equal those of ``mx.dequantize`` to the bit: with ``dtype=float32`` for the modes with U8 scales, and
    with scales and biases widened to float32 for affine. (With narrower ones MLX rounds to their type; here the product is not
    rounded.) An E8M0 scale of 255, which stands for NaN, is NaN here and infinite in MLX.
    """
    room = Room(weight.numel() * 32 // quantization.bits, quantization, weight.device)
    return room.widen(weight, scales, biases).to(dtype)


def rows(index: Tensor, weight: Tensor, scales: Tensor, biases: Tensor | None, quantization: Quantization) -> Tensor:
    """The weights at ``index`` of the first dimension, float32."""
    return dequantize(weight[index], scales[index], None if biases is None else biases[index], quantization, torch.float32)


def linear(x: Tensor, weight: Tensor, scales: Tensor, biases: Tensor | None, quantization: Quantization) -> Tensor:
    """x [.., in] times the transpose of a packed matrix [out, in * bits / 32] -> [.., out]."""
    wide = x.float().reshape(-1, x.shape[-1])
    result = wide.new_empty(len(wide), len(weight))
    _multiply(wide, _Tiles((len(weight), x.shape[-1]), quantization).of(len(wide), weight, scales, biases), result)
    return result.to(x.dtype).view(*x.shape[:-1], len(weight))


def expert_linear(
    x: Tensor, ends: Tensor, weight: Tensor, scales: Tensor, biases: Tensor | None, quantization: Quantization
) -> Tensor:
    """Rows of x [M, in], sorted by expert, times the transpose of their expert's matrix [out, in * bits / 32] -> [M, out]."""
    wide = x.float()
    result = wide.new_empty(len(x), weight.shape[1])
    tiles = _Tiles((weight.shape[1], x.shape[1]), quantization)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            bias = None if biases is None else biases[expert]
            _multiply(wide[start:end], tiles.of(end - start, weight[expert], scales[expert], bias), result[start:end])
        start = end
    return result.to(x.dtype)


def weighted_rows(
    probabilities: Tensor, weight: Tensor, scales: Tensor, biases: Tensor | None, quantization: Quantization
) -> Tensor:
    """Probabilities [.., V] times a packed matrix [V, H * bits / 32] -> [.., H]."""
    flat = probabilities.reshape(-1, len(weight))
    size = weight.shape[1] * 32 // quantization.bits
    total = torch.zeros(len(flat), size)
    for tile, values in _Tiles((len(weight), size), quantization).of(_FEW, weight, scales, biases):
        total.addmm_(flat[:, tile].float(), values)
    return total.to(probabilities.dtype).view(*probabilities.shape[:-1], size)


class _Views(NamedTuple):
    """A room's memory in the shape of a tile."""

    values: Tensor  # float32 [.., in]
    groups: Tensor  # the same [.., in / group_size, group_size]
    pairs: Tensor  # int16 [.., in / 2]
    codes: Tensor  # the same, uint8 [.., in]
    upper: Tensor  # int16 [.., in / 2], in the rows of ``values``, so each thread has its part in its core's cache


class Room:
    """Memory for ``count`` float32 weights. It is used again and again: new memory costs more time than widening."""

    def __init__(self, count: int, quantization: Quantization, device: torch.device | None = None) -> None:
        self.format = quantization
        self.values = torch.empty(count, device=device)
        self.work = torch.empty(count // 2, dtype=torch.int32, device=device)
        self.views: dict[torch.Size, _Views] = {}  # making them anew takes a tenth of the time of a tile of 2 MB

    def widen(self, weight: Tensor, scales: Tensor, biases: Tensor | None) -> Tensor:
        """The weights [.., in] of packed words, valid until the next call."""
        octets = weight.view(torch.uint8)
        if octets.shape not in self.views:
            self.views[octets.shape] = self._views(octets.shape)
        views = self.views[octets.shape]
        self._decode(octets, views)
        if self.format.mode == "affine":
            assert biases is not None
            views.groups.mul_(scales.float().unsqueeze(-1)).add_(biases.float().unsqueeze(-1))
        else:
            form = torch.float8_e4m3fn if self.format.mode == "nvfp4" else torch.float8_e8m0fnu
            views.groups.mul_(scales.view(form).float().unsqueeze(-1))
        return views.values

    def _views(self, shape: torch.Size) -> _Views:
        """The views for bytes of this shape."""
        rows, size = shape[:-1], shape[-1] * 8 // self.format.bits
        count = prod(rows) * size
        values = self.values[:count].view(*rows, size)
        pairs = self.work.view(torch.int16)[: count // 2].view(*rows, size // 2)
        groups = values.unflatten(-1, (-1, self.format.group_size))
        return _Views(values, groups, pairs, pairs.view(torch.uint8), values.view(torch.int16)[..., : size // 2])

    def _decode(self, octets: Tensor, views: _Views) -> None:
        """Write the values of the codes in bytes [.., in * bits / 8] to ``views.values``."""
        bits, mode = self.format.bits, self.format.mode
        if bits == 8:
            views.values.copy_(octets.view(torch.float8_e4m3fn) if mode == "mxfp8" else octets)
        elif bits == 4 and mode == "affine":  # a byte holds two codes, which become the two bytes of an int16
            torch.bitwise_and(views.pairs.copy_(octets), 0xF0, out=views.upper)
            views.pairs.add_(views.upper, alpha=15)  # from 16 times the upper code to 256 times
            views.values.copy_(views.codes)
        elif bits == 4:  # here a byte becomes one 8-byte entry of a table: many times faster than looking up each code
            places = self.work[: octets.numel()].copy_(octets.flatten())
            torch.index_select(_pairs(octets.device), 0, places, out=views.values.view(torch.float64).view(-1))
        else:  # eight codes fill ``bits`` bytes, and each code lies within two neighbouring bytes
            units = octets.unflatten(-1, (-1, bits))
            start = torch.arange(0, 8 * bits, bits, device=octets.device)
            low, high = start // 8, (start // 8 + 1).clamp(max=bits - 1)
            codes = (units[..., low].int() | units[..., high].int() << 8) >> (start % 8).int() & (1 << bits) - 1
            views.values.copy_(codes.flatten(-2))


@cache
def _pairs(device: torch.device) -> Tensor:
    """For each byte, the values of its two E2M1 codes: two float32 stored as one float64 [256]."""
    values = torch.tensor(_E2M1, device=device)
    codes = torch.arange(256, device=device)
    return torch.stack((values[codes & 15], values[codes >> 4]), dim=-1).view(torch.float64).flatten()


class _Tiles:
    """Widens packed matrices of one shape [out, in], tile by tile."""

    def __init__(self, shape: tuple[int, int], quantization: Quantization) -> None:
        count, size = shape
        self.large = min(max(1, _TILE // size), count)
        self.small = min(torch.get_num_threads() * 16 * max(1, round(_PART / (16 * size))), count)
        self.room = Room(max(self.large, self.small) * size, quantization)

    def of(self, rows: int, weight: Tensor, scales: Tensor, biases: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """Slices of a matrix's output rows, and their weights [n, in] for ``rows`` rows of x, valid until the next slice."""
        step = self.small if rows < _FEW else self.large
        for start in range(0, len(weight), step):
            tile = slice(start, min(start + step, len(weight)))
            yield tile, self.room.widen(weight[tile], scales[tile], None if biases is None else biases[tile])


def _multiply(x: Tensor, tiles: Iterable[tuple[slice, Tensor]], result: Tensor) -> None:
    """Write x [M, in] times the transpose of a matrix in tiles [n, in] to ``result`` [M, out]."""
    threads = torch.get_num_threads()
    copies = x.expand(threads, -1, -1)
    for tile, values in tiles:
        if len(x) >= _FEW or len(values) % threads:
            torch.mm(x, values.T, out=result[:, tile])
        else:  # each thread multiplies by the part that it widened
            products = torch.bmm(copies, values.view(threads, -1, x.shape[1]).mT)  # [threads, M, n / threads]
            result[:, tile].view(len(x), threads, -1).copy_(products.transpose(0, 1))
