"""Triton kernels that multiply by packed weights: words go from memory to registers once, and are widened there.

Codes come in units of eight: eight codes of ``bits`` bits fill ``bits`` bytes, at every width. A unit is loaded as one integer
(int16, int32 or int64 at 2, 4 or 8 bits, so that neighbouring threads load whole 128-bit lines; byte by byte at 3, 5 and 6),
its codes are taken out by constant shifts, scaled in float32, rounded to the activations' dtype, and multiplied on tensor cores
with float32 accumulation (bfloat16), or in full float32 precision.

Every grid follows from shapes alone, and nothing waits for the device. Rows past the end are read again from the last one and not
written, which spares their loads a mask. An E4M3 NaN, which ``mx.quantize`` never writes, reads as 480.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlx_diffgemma.checkpoint import Quantization

#: Programs below which a grid leaves multiprocessors idle; an H200 has 132.
_ENOUGH_PROGRAMS = 264
_UNIT_DTYPES = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _minifloat(top, bits: tl.constexpr, mantissa: tl.constexpr, bias: tl.constexpr):
    """The small float (E2M1, E4M3; not its NaN) in the highest bits of int32 ``top``, as float32.

    Its fields, moved down to a float32's, make a value short of the difference of the two exponent biases. The arithmetic shift
    leaves the sign where it is.
    """
    fields: tl.constexpr = (((1 << (bits - 1)) - 1) << (23 - mantissa)) - (1 << 31)
    moved = (top >> (9 + mantissa - bits)) & fields
    return moved.to(tl.float32, bitcast=True) * (2.0 ** (127 - bias))


@triton.jit
def _weight(units, index: tl.constexpr, scale, bias, bits: tl.constexpr, mode: tl.constexpr):
    """Weight ``index`` of each unit, as float32."""
    if mode == "affine":
        value = ((units >> (index * bits)).to(tl.int32) & ((1 << bits) - 1)).to(tl.float32) * scale + bias
    else:
        top = ((units << (8 * bits - (index + 1) * bits)) >> (8 * bits - 32)).to(tl.int32)
        value = _minifloat(top, bits, 1 if bits == 4 else 3, 1 if bits == 4 else 7) * scale
    return value


@triton.jit
def _units(weight, unit, mask, other, bits: tl.constexpr):
    """Load the units numbered ``unit`` as integers, their first code lowest."""
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
    """The weights [rows, block] of ``row`` from ``column`` on, of a matrix of ``size`` columns, as ``dtype``."""
    per_row: tl.constexpr = size // 8
    groups: tl.constexpr = size // group
    unit = column // 8 + tl.arange(0, block // 8)[None, :]
    at = column // group + tl.arange(0, block // group)[None, :]
    within = None if size % block == 0 else unit < per_row
    within_groups = None if size % block == 0 else at < groups
    other: tl.constexpr = None if size % block == 0 else 0
    units = _units(weight, row[:, None] * per_row + unit, within, other, bits)
    # Scales are loaded once a group, then spread over the group's units.
    scale = tl.load(scales + row[:, None] * groups + at, mask=within_groups, other=other)
    bias = None
    if mode == "affine":
        scale = scale.to(tl.float32)
        bias = _spread(tl.load(biases + row[:, None] * groups + at, mask=within_groups, other=other).to(tl.float32), group // 8)
    elif mode == "nvfp4":
        scale = _minifloat(scale.to(tl.int32) << 24, 8, 3, 7)
    else:
        scale = scale.to(tl.int32)  # E8M0: the exponent of a float32; 0 is 2^-127, which has no exponent of its own there
        scale = tl.where(scale == 0, 1 << 22, scale << 23).to(tl.float32, bitcast=True)
    scale = _spread(scale, group // 8)
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
    """[rows, groups] -> [rows, groups * times], each column ``times`` times in a row."""
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

    The product is taken as W times x transposed: the tensor cores' long side then holds the weights, and few rows of x fill the
    short one.
    """
    block = tl.program_id(0)
    start, end = 0, m_size
    n = tl.program_id(1) * block_n + tl.arange(0, block_n)
    row = tl.minimum(n, n_size - 1).to(tl.int64)
    if experts:
        # Blocks are dealt to the experts in turn, each getting as many as its rows fill; those left over have nothing to do.
        expert = tl.arange(0, experts_block)
        stops = tl.load(ends + expert, mask=expert < experts, other=0)
        starts = tl.load(ends + expert - 1, mask=(expert > 0) & (expert < experts), other=0)
        blocks = (stops - starts + block_m - 1) // block_m
        before = tl.cumsum(blocks, 0) <= block  # experts whose blocks all come earlier
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
    p, weight, scales, biases, partial, m_size, v_size, v_per_program,
    h_size: tl.constexpr, bits: tl.constexpr, group: tl.constexpr, mode: tl.constexpr,
    block_m: tl.constexpr, block_v: tl.constexpr, block_h: tl.constexpr,
):  # fmt: skip
    """partial[s, m, h] = sum over the s-th ``v_per_program`` rows v of p[m, v] * W[v, h]."""
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    column = tl.program_id(1) * block_h
    slot = tl.program_id(2)
    start = slot * v_per_program
    end = tl.minimum(start + v_per_program, v_size)
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

    ``ends`` is int32 [E]: the rows of expert e end there, and begin where those of e - 1 end.
    """
    # Routing is uneven: blocks of twice the mean hold most experts' rows, whose weights are then widened but once.
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
    full_precision = x.dtype == torch.float32  # no tensor cores; smaller blocks, so that registers suffice
    block_m = min(max(triton.next_power_of_2(rows_per_matrix), 16), 32 if full_precision else 128)
    # A matrix with a part of a block left over takes one block more: at most one an expert that has rows.
    blocks = triton.cdiv(m_size, block_m) + min(experts, m_size)
    block_n = 64 if full_precision else 128
    while block_n > 32 and blocks * triton.cdiv(n_size, block_n) < _ENOUGH_PROGRAMS:
        block_n //= 2
    block_k = max(64 if block_m == 128 else 128, quantization.group_size)
    _linear[blocks, triton.cdiv(n_size, block_n)](
        x.contiguous(), _as_units(weight, quantization), scales, biases, ends, y, m_size, n_size,
        k_size=k_size, bits=quantization.bits, group=quantization.group_size, mode=quantization.mode,
        experts=experts, experts_block=triton.next_power_of_2(max(experts, 1)),
        block_m=block_m, block_n=block_n, block_k=block_k,
        num_warps=8 if block_n == 128 else 4, num_stages=2 if full_precision else 3, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def weighted_rows(
    probabilities: Tensor, weight: Tensor, scales: Tensor, biases: Tensor | None, quantization: Quantization
) -> Tensor:
    """Probabilities [.., V] times a packed matrix [V, H * bits / 32] -> [.., H], in the dtype of the probabilities.

    The sum over V is cut into parts to fill the device; the parts are added in a fixed order, so that results repeat.
    """
    p = probabilities.reshape(-1, probabilities.shape[-1]).contiguous()
    (m_size, v_size), h_size = p.shape, weight.shape[-1] * 32 // quantization.bits
    full_precision = p.dtype == torch.float32
    block_m = min(max(triton.next_power_of_2(m_size), 16), 16 if full_precision else 128)
    block_h, block_v = 128, 32 if full_precision else 64
    tiles = triton.cdiv(m_size, block_m) * triton.cdiv(h_size, block_h)
    slots = min(max(triton.cdiv(_ENOUGH_PROGRAMS, max(tiles, 1)), 1), triton.cdiv(v_size, block_v))
    v_per_program = triton.cdiv(triton.cdiv(v_size, slots), block_v) * block_v
    slots = triton.cdiv(v_size, v_per_program)
    partial = torch.empty(slots, m_size, h_size, dtype=torch.float32, device=p.device)
    if m_size:
        _weighted_rows[triton.cdiv(m_size, block_m), triton.cdiv(h_size, block_h), slots](
            p, _as_units(weight, quantization), scales, biases, partial, m_size, v_size, v_per_program,
            h_size=h_size, bits=quantization.bits, group=quantization.group_size, mode=quantization.mode,
            block_m=block_m, block_v=block_v, block_h=block_h,
            num_warps=8 if block_m == 128 else 4, num_stages=2 if full_precision else 3, enable_fp_fusion=True,
        )  # fmt: skip
    return partial.sum(dim=0).to(p.dtype).view(*probabilities.shape[:-1], h_size)


def _as_units(weight: Tensor, quantization: Quantization) -> Tensor:
    return weight.view(_UNIT_DTYPES.get(quantization.bits, torch.uint8))
