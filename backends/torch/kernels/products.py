"""Triton kernels that multiply by packed weights. Words are loaded from memory to registers once, and widened there.

Codes come in units of eight: eight codes of ``bits`` bits fill ``bits`` bytes, at every width. A unit is loaded as one integer:
int16, int32 or int64 at 2, 4 or 8 bits, so that neighbouring threads load whole 128-bit lines; byte by byte at 3, 5 and 6 bits.
Constant shifts extract the codes. The codes are scaled in float32, rounded to the activations' dtype, and multiplied on tensor
cores with float32 accumulation (bfloat16), or in full float32 precision.

A row of a product has the same bits whatever other rows are in the batch. ``LinearTiles`` and ``WeightedTiles`` fix the order of
an element's sum. They depend on the matrix and the activations' dtype, not on the rows. The number of rows decides only which
rows share a program.

Every grid depends on shapes alone, and nothing waits for the device. Rows past the end read the last row again and are not
written, so their loads need no mask. An E4M3 NaN, which ``mx.quantize`` never writes, reads as 480.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlx_diffgemma.checkpoint import Quantization

#: A grid of fewer programs leaves multiprocessors idle; an H200 has 132 of them.
_ENOUGH_PROGRAMS = 264
_UNIT_DTYPES = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class LinearTiles:
    """How a product with the transpose of a matrix [N, K] is divided into programs. Each program computes one block of outputs.

    Only ``block_m`` may depend on the number of rows. A dot multiplies a block of the matrix [block_n, block_k] by a transposed
    block of rows. The rows are columns of the dot, and their number changes no sum. Different instructions, however, may sum in
    different orders, and Triton chooses the instruction by ``block_n``: on Hopper wgmma from 64 on, mma.sync below. So
    ``block_n`` is at least 64.
    """

    block_n: int  # outputs of a program
    block_k: int  # terms of a sum that one dot adds
    most_rows: int  # largest number of rows of a program
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, n_size: int, matrices: int, dtype: torch.dtype) -> Self:
        """The tiles for activations of ``dtype`` and ``matrices`` matrices of ``n_size`` outputs each."""
        if dtype == torch.float32:  # no tensor cores; smaller blocks, to fit the registers
            return cls(block_n=64, block_k=64, most_rows=32, num_warps=4, num_stages=2)
        if matrices * triton.cdiv(n_size, 128) >= _ENOUGH_PROGRAMS:  # a whole canvas in a block: its weights are widened once
            return cls(block_n=128, block_k=64, most_rows=256, num_warps=8, num_stages=3)
        return cls(block_n=64, block_k=64, most_rows=128, num_warps=4, num_stages=3)

    def block_m(self, rows: int) -> int:
        """Rows of a program for a matrix with about ``rows`` rows of input."""
        return min(max(triton.next_power_of_2(rows), 16), self.most_rows)

    def stages(self, block_m: int) -> int:
        """Blocks of rows that are loaded ahead: fewer of large ones, for the multiprocessor's memory. Changes no sum."""
        return 2 if block_m > 128 else self.num_stages


@dataclass(frozen=True)
class WeightedTiles:
    """How a product of rows with a matrix [V, H] is divided into programs.

    The sum over V is divided into ``slots``, enough for one block of rows to fill the device. ``block_m`` is fixed too: rows are
    the first dimension of a dot, and Triton chooses the instruction by that dimension (see ``LinearTiles``).
    """

    block_m: int  # rows of a program
    block_h: int  # outputs of a program
    block_v: int  # terms of a sum that one dot adds
    slots: int  # parts of a sum, each computed by its own program; they are added in order
    v_per_slot: int  # terms of a part, a multiple of block_v
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, v_size: int, h_size: int, dtype: torch.dtype) -> Self:
        """The tiles for probabilities of ``dtype`` and a matrix [v_size, h_size]."""
        full_precision = dtype == torch.float32  # no tensor cores; smaller blocks, to fit the registers
        block_h, block_v = 128, 32 if full_precision else 64
        slots = min(triton.cdiv(_ENOUGH_PROGRAMS, triton.cdiv(h_size, block_h)), triton.cdiv(v_size, block_v))
        v_per_slot = triton.cdiv(triton.cdiv(v_size, slots), block_v) * block_v
        return cls(
            block_m=16 if full_precision else 128,
            block_h=block_h,
            block_v=block_v,
            slots=triton.cdiv(v_size, v_per_slot),
            v_per_slot=v_per_slot,
            num_warps=4 if full_precision else 8,
            num_stages=2 if full_precision else 3,
        )


@triton.jit
def _minifloat(top, bits: tl.constexpr, mantissa: tl.constexpr, bias: tl.constexpr):
    """The small float (E2M1, or E4M3 except NaN) in the highest bits of int32 ``top``, as float32.

    Its fields are shifted to the place of a float32's fields. The result is too small by the difference of the two exponent
    biases, so it is multiplied by that power of 2. The arithmetic shift leaves the sign bit in place.
    """
    fields: tl.constexpr = (((1 << (bits - 1)) - 1) << (23 - mantissa)) - (1 << 31)
    moved = (top >> (9 + mantissa - bits)) & fields
    return moved.to(tl.float32, bitcast=True) * (2.0 ** (127 - bias))


@triton.jit
def _weight(units, index: tl.constexpr, scale, bias, bits: tl.constexpr, mode: tl.constexpr):
    """Weight ``index`` of each unit, as float32."""
    if mode == "affine":
        code = ((units >> (index * bits)).to(tl.int32) & ((1 << bits) - 1)).to(tl.float32)
        value = tl.fma(code, scale, bias)  # explicit, because the compiler may or may not fuse a product and a sum
    else:
        top = ((units << (8 * bits - (index + 1) * bits)) >> (8 * bits - 32)).to(tl.int32)
        value = _minifloat(top, bits, 1 if bits == 4 else 3, 1 if bits == 4 else 7) * scale
    return value


@triton.jit
def _units(weight, unit, mask, other, bits: tl.constexpr):
    """Load the units with indices ``unit`` as integers, with the first code in the lowest bits."""
    if 8 % bits == 0:
        units = tl.load(weight + unit, mask=mask, other=other)
    else:
        first = weight + unit * bits
        units = tl.load(first, mask=mask, other=other).to(tl.int64)
        for byte in tl.static_range(1, bits):
            units |= tl.load(first + byte, mask=mask, other=other).to(tl.int64) << (8 * byte)
    return units


@triton.jit
def _widened(
    weight, scales, biases, row, column,
    size: tl.constexpr, bits: tl.constexpr, group: tl.constexpr, mode: tl.constexpr, block: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The weights [rows, block] of the rows ``row`` from ``column`` on, in a matrix of ``size`` columns, as ``dtype``.

    A block consists of whole groups, or lies within one group.
    """
    per_row: tl.constexpr = size // 8
    groups: tl.constexpr = size // group
    unit = column // 8 + tl.arange(0, block // 8)[None, :]
    run: tl.constexpr = group if group < block else block
    at = column // group + tl.arange(0, block // run)[None, :]
    within = None if size % block == 0 else unit < per_row
    within_groups = None if size % block == 0 else at < groups
    other: tl.constexpr = None if size % block == 0 else 0
    units = _units(weight, row[:, None] * per_row + unit, within, other, bits)
    # A scale is loaded once per group, then spread over the group's units.
    scale = tl.load(scales + row[:, None] * groups + at, mask=within_groups, other=other)
    bias = None
    if mode == "affine":
        scale = scale.to(tl.float32)
        bias = _spread(tl.load(biases + row[:, None] * groups + at, mask=within_groups, other=other).to(tl.float32), run // 8)
    elif mode == "nvfp4":
        scale = _minifloat(scale.to(tl.int32) << 24, 8, 3, 7)
    else:
        scale = scale.to(tl.int32)  # E8M0 is the exponent of a float32; 0 is 2^-127, a subnormal float32
        scale = tl.where(scale == 0, 1 << 22, scale << 23).to(tl.float32, bitcast=True)
    scale = _spread(scale, run // 8)
    w0 = _weight(units, 0, scale, bias, bits, mode).to(dtype)
    w1 = _weight(units, 1, scale, bias, bits, mode).to(dtype)
    w2 = _weight(units, 2, scale, bias, bits, mode).to(dtype)
    w3 = _weight(units, 3, scale, bias, bits, mode).to(dtype)
    w4 = _weight(units, 4, scale, bias, bits, mode).to(dtype)
    w5 = _weight(units, 5, scale, bias, bits, mode).to(dtype)
    w6 = _weight(units, 6, scale, bias, bits, mode).to(dtype)
    w7 = _weight(units, 7, scale, bias, bits, mode).to(dtype)
    even = tl.interleave(tl.interleave(w0, w4), tl.interleave(w2, w6))
    odd = tl.interleave(tl.interleave(w1, w5), tl.interleave(w3, w7))
    return tl.interleave(even, odd)


@triton.jit
def _spread(x, times: tl.constexpr):
    """[rows, groups] -> [rows, groups * times]: repeat each column ``times`` times."""
    wide = tl.broadcast_to(x[:, :, None], x.shape[0], x.shape[1], times)
    return wide.reshape(x.shape[0], x.shape[1] * times)


@triton.jit(do_not_specialize=["m_size"])
def _linear(
    x, weight, scales, biases, ends, y, m_size, n_size,
    k_size: tl.constexpr, bits: tl.constexpr, group: tl.constexpr, mode: tl.constexpr,
    experts: tl.constexpr, experts_block: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum over k of x[m, k] * W[n, k]; with ``experts``, of W[expert of row m, n, k].

    The product is computed as W times x transposed. The long side of the tensor cores then holds the weights, and a few rows of
    x fill the short side (see ``LinearTiles``).
    """
    block = tl.program_id(0)
    start, end = 0, m_size
    n = tl.program_id(1) * block_n + tl.arange(0, block_n)
    row = tl.minimum(n, n_size - 1).to(tl.int64)
    if experts:
        # Each expert in turn gets as many blocks as its rows fill. Blocks left over have nothing to do.
        expert = tl.arange(0, experts_block)
        stops = tl.load(ends + expert, mask=expert < experts, other=0)
        starts = tl.load(ends + expert - 1, mask=(expert > 0) & (expert < experts), other=0)
        blocks = (stops - starts + block_m - 1) // block_m
        before = tl.cumsum(blocks, 0) <= block  # experts whose blocks all come before this one
        mine = tl.sum((before & (expert < experts)).to(tl.int32))
        if mine == experts:
            return
        block -= tl.sum(tl.where(before, blocks, 0))
        start = tl.load(ends + mine - 1, mask=mine > 0, other=0)
        end = tl.load(ends + mine)
        row += mine.to(tl.int64) * n_size
    m = start + block * block_m + tl.arange(0, block_m)
    from_x = x + tl.minimum(m, end - 1).to(tl.int64)[None, :] * k_size
    total = tl.zeros((block_n, block_m), dtype=tl.float32)
    for column in range(0, k_size, block_k):
        k = column + tl.arange(0, block_k)
        if k_size % block_k == 0:
            part = tl.load(from_x + k[:, None])
        else:
            part = tl.load(from_x + k[:, None], mask=k[:, None] < k_size, other=0.0)
        w = _widened(weight, scales, biases, row, column, k_size, bits, group, mode, block_k, part.dtype)
        total = tl.dot(w, part, total, input_precision="ieee")
    to_y = y + m.to(tl.int64)[None, :] * n_size + n[:, None]
    tl.store(to_y, total.to(y.dtype.element_ty), mask=(m < end)[None, :] & (n < n_size)[:, None])


@triton.jit(do_not_specialize=["m_size"])
def _weighted_rows(
    p, weight, scales, biases, partial, m_size, v_size, v_per_slot,
    h_size: tl.constexpr, bits: tl.constexpr, group: tl.constexpr, mode: tl.constexpr,
    block_m: tl.constexpr, block_v: tl.constexpr, block_h: tl.constexpr,
):  # fmt: skip
    """partial[s, m, h] = sum over the s-th ``v_per_slot`` rows v of p[m, v] * W[v, h]."""
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    column = tl.program_id(1) * block_h
    slot = tl.program_id(2)
    start = slot * v_per_slot
    end = tl.minimum(start + v_per_slot, v_size)
    from_p = p + tl.minimum(m, m_size - 1).to(tl.int64)[:, None] * v_size
    total = tl.zeros((block_m, block_h), dtype=tl.float32)
    for first in range(start, end, block_v):
        v = first + tl.arange(0, block_v)
        part = tl.load(from_p + v[None, :], mask=v[None, :] < end, other=0.0)
        row = tl.minimum(v, v_size - 1).to(tl.int64)
        w = _widened(weight, scales, biases, row, column, h_size, bits, group, mode, block_h, part.dtype)
        total = tl.dot(part, w, total, input_precision="ieee")
    h = column + tl.arange(0, block_h)
    to = partial + (slot.to(tl.int64) * m_size + m)[:, None] * h_size + h[None, :]
    tl.store(to, total, mask=(m < m_size)[:, None] & (h < h_size)[None, :])


@triton.jit(do_not_specialize=["size", "slots"])
def _added(partial, y, size, slots, block: tl.constexpr):
    """y[i] = sum of partial[s, i] over the slots s, in order. (The order of ``Tensor.sum`` may depend on the shape.)"""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    within = at < size
    part = partial + at
    total = tl.load(part, mask=within)
    for _ in range(1, slots):
        part += size
        total += tl.load(part, mask=within)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=within)


def linear(x: Tensor, weight: Tensor, scales: Tensor, biases: Tensor | None, quantization: Quantization) -> Tensor:
    """x [.., in] times the transpose of a packed matrix [out, in * bits / 32] -> [.., out], in the dtype of x."""
    flat = x.reshape(-1, x.shape[-1])
    m_size = flat.shape[0]
    y = _launch_linear(flat, weight, scales, biases, None, quantization, rows_per_matrix=m_size)
    return y.view(*x.shape[:-1], y.shape[-1])


def expert_linear(
    x: Tensor, ends: Tensor, weight: Tensor, scales: Tensor, biases: Tensor | None, quantization: Quantization
) -> Tensor:
    """Rows of x [M, in], sorted by expert, times the transpose of their expert's matrix [out, in * bits / 32] -> [M, out].

    ``ends`` is int32 [E]: the rows of expert e end at ``ends[e]``, and begin where those of expert e - 1 end.
    """
    # Routing is uneven. A block of twice the mean holds all rows of most experts, whose weights are then widened only once.
    mean = triton.cdiv(x.shape[0], ends.shape[0])
    return _launch_linear(x, weight, scales, biases, ends, quantization, rows_per_matrix=2 * mean)


def _launch_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    biases: Tensor | None,
    ends: Tensor | None,
    quantization: Quantization,
    rows_per_matrix: int,
) -> Tensor:
    (m_size, k_size), n_size = x.shape, weight.shape[-2]
    y = x.new_empty(m_size, n_size)
    if m_size == 0:
        return y
    experts = 0 if ends is None else ends.shape[0]
    tiles = LinearTiles.of(n_size, max(experts, 1), x.dtype)
    block_m = tiles.block_m(rows_per_matrix)
    # Each expert that has rows may end with a partial block, which takes one more block.
    blocks = triton.cdiv(m_size, block_m) + min(experts, m_size)
    _linear[blocks, triton.cdiv(n_size, tiles.block_n)](
        x.contiguous(), _as_units(weight, quantization), scales, biases, ends, y, m_size, n_size,
        k_size=k_size, bits=quantization.bits, group=quantization.group_size, mode=quantization.mode,
        experts=experts, experts_block=triton.next_power_of_2(max(experts, 1)),
        block_m=block_m, block_n=tiles.block_n, block_k=tiles.block_k,
        num_warps=tiles.num_warps, num_stages=tiles.stages(block_m), enable_fp_fusion=True,
    )  # fmt: skip
    return y


def weighted_rows(
    probabilities: Tensor, weight: Tensor, scales: Tensor, biases: Tensor | None, quantization: Quantization
) -> Tensor:
    """Probabilities [.., V] times a packed matrix [V, H * bits / 32] -> [.., H], in the dtype of the probabilities.

    The sum over V is divided into parts that fill the device. The parts are added in a fixed order, so results are repeatable.
    """
    p = probabilities.reshape(-1, probabilities.shape[-1]).contiguous()
    (m_size, v_size), h_size = p.shape, weight.shape[-1] * 32 // quantization.bits
    y = p.new_empty(m_size, h_size)
    if m_size:
        tiles = WeightedTiles.of(v_size, h_size, p.dtype)
        partial = torch.empty(tiles.slots, m_size, h_size, dtype=torch.float32, device=p.device)
        _weighted_rows[triton.cdiv(m_size, tiles.block_m), triton.cdiv(h_size, tiles.block_h), tiles.slots](
            p, _as_units(weight, quantization), scales, biases, partial, m_size, v_size, tiles.v_per_slot,
            h_size=h_size, bits=quantization.bits, group=quantization.group_size, mode=quantization.mode,
            block_m=tiles.block_m, block_v=tiles.block_v, block_h=tiles.block_h,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
        _added[(triton.cdiv(y.numel(), 1024),)](partial, y, y.numel(), tiles.slots, block=1024)
    return y.view(*probabilities.shape[:-1], h_size)


def _as_units(weight: Tensor, quantization: Quantization) -> Tensor:
    return weight.view(_UNIT_DTYPES.get(quantization.bits, torch.uint8))
