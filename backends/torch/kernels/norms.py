"""Triton kernels for what lies between the products: norms, residuals, rotations and gates, each read and written once.

A program computes one row, or one head of a token, so a row's bits depend on no other row. Values are rounded to the activations'
type where the operations of model.py round them. Sums of squares are in float32, over one block of the whole row.
T tokens, H hidden size, D head size.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rounded(values, like):
    """Float32 values rounded to the type of the pointer ``like``, as float32."""
    return values.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _row(pointer, row, columns, size: tl.constexpr):
    return tl.load(pointer + row.to(tl.int64) * size + columns, mask=columns < size, other=0.0).to(tl.float32)


@triton.jit
def _weights(pointer, columns, size: tl.constexpr):
    return tl.load(pointer + columns, mask=columns < size, other=0.0).to(tl.float32)


@triton.jit
def _unit(values, eps, size: tl.constexpr):
    """Float32 values of a row divided by their root mean square."""
    return values / tl.sqrt(tl.sum(values * values, axis=0) / size + eps)


@triton.jit
def _rms_norm(x, weight, y, eps, size: tl.constexpr, block: tl.constexpr, weighted: tl.constexpr):
    row, columns = tl.program_id(0), tl.arange(0, block)
    values = _unit(_row(x, row, columns, size), eps, size)
    if weighted:
        values *= _weights(weight, columns, size)
    tl.store(y + row.to(tl.int64) * size + columns, values.to(y.dtype.element_ty), mask=columns < size)


@triton.jit
def _after_attention(
    x, attended, weight, dense_weight, sparse_weight, router_scale, total, dense, sparse, routed, eps, factor,
    size: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row, columns = tl.program_id(0), tl.arange(0, block)
    at, within = row.to(tl.int64) * size + columns, columns < size
    added = _rounded(_unit(_row(attended, row, columns, size), eps, size) * _weights(weight, columns, size), x)
    values = _rounded(_row(x, row, columns, size) + added, x)
    tl.store(total + at, values.to(total.dtype.element_ty), mask=within)
    unit = _unit(values, eps, size)
    tl.store(dense + at, (unit * _weights(dense_weight, columns, size)).to(dense.dtype.element_ty), mask=within)
    tl.store(sparse + at, (unit * _weights(sparse_weight, columns, size)).to(sparse.dtype.element_ty), mask=within)
    scaled = _rounded(_rounded(unit, x) * _weights(router_scale, columns, size), x)
    tl.store(routed + at, (scaled * factor).to(routed.dtype.element_ty), mask=within)


@triton.jit
def _after_experts(
    x, dense, sparse, dense_weight, sparse_weight, weight, scalar, y, eps, size: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    row, columns = tl.program_id(0), tl.arange(0, block)
    one = _rounded(_unit(_row(dense, row, columns, size), eps, size) * _weights(dense_weight, columns, size), x)
    other = _rounded(_unit(_row(sparse, row, columns, size), eps, size) * _weights(sparse_weight, columns, size), x)
    both = _rounded(one + other, x)
    added = _rounded(_unit(both, eps, size) * _weights(weight, columns, size), x)
    values = _rounded(_row(x, row, columns, size) + added, x) * tl.load(scalar).to(tl.float32)
    tl.store(y + row.to(tl.int64) * size + columns, values.to(y.dtype.element_ty), mask=columns < size)


@triton.jit
def _turned(first, second, cos, sin, x):
    """One half of a rotated head: first * cos + second * sin, rounded as three operations."""
    return _rounded(_rounded(first * cos, x) + _rounded(second * sin, x), x)


@triton.jit
def _heads(
    x, weight, cos, sin, y, eps, heads, row_stride, size: tl.constexpr, half: tl.constexpr, block: tl.constexpr,
    weighted: tl.constexpr, rotated: tl.constexpr,
):  # fmt: skip
    token, head, columns = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, block)
    within = columns < half
    source = x + token * row_stride + head * size + columns
    first = tl.load(source, mask=within, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=within, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt((tl.sum(first * first, axis=0) + tl.sum(second * second, axis=0)) / size + eps)
    first, second = first * scale, second * scale
    if weighted:
        first *= tl.load(weight + columns, mask=within, other=0.0).to(tl.float32)
        second *= tl.load(weight + half + columns, mask=within, other=0.0).to(tl.float32)
    first, second = _rounded(first, x), _rounded(second, x)
    if rotated:  # the tables [T, D] repeat over the halves
        c = tl.load(cos + token * size + columns, mask=within, other=0.0).to(tl.float32)
        s = tl.load(sin + token * size + columns, mask=within, other=0.0).to(tl.float32)
        first, second = _turned(first, -second, c, s, x), _turned(second, first, c, s, x)
    target = y + (token * heads + head) * size + columns
    tl.store(target, first.to(y.dtype.element_ty), mask=within)
    tl.store(target + half, second.to(y.dtype.element_ty), mask=within)


@triton.jit
def _geglu(gate, up, y, columns_size, gate_stride, up_stride, block: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    within = columns < columns_size
    x = tl.load(gate + row * gate_stride + columns, mask=within, other=0.0).to(tl.float32)
    # 0.5 x (1 + tanh(u)) is x / (1 + exp(-2 u)).
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    active = _rounded(x / (1.0 + tl.exp(-2.0 * u)), gate)
    other = tl.load(up + row * up_stride + columns, mask=within, other=0.0).to(tl.float32)
    tl.store(y + row * columns_size + columns, (active * other).to(y.dtype.element_ty), mask=within)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x [.., H] / rms(x), times ``weight`` [H] if there is one."""
    rows, y = x.reshape(-1, x.shape[-1]).contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    if len(rows):
        size = x.shape[-1]
        _rms_norm[(len(rows),)](
            rows, weight, y, eps, size=size, block=triton.next_power_of_2(size), weighted=weight is not None,
            num_warps=_warps(size), enable_fp_fusion=True,
        )  # fmt: skip
    return y


def after_attention(
    x: Tensor, attended: Tensor, weights: Sequence[Tensor], scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`mlx_diffgemma.backends.torch.fused.after_attention`."""
    results = tuple(torch.empty_like(x) for _ in range(4))
    size = x.shape[-1]
    if len(x):
        _after_attention[(len(x),)](
            x.contiguous(), attended.contiguous(), *weights, scale, *results, eps, size**-0.5,
            size=size, block=triton.next_power_of_2(size), num_warps=_warps(size), enable_fp_fusion=True,
        )  # fmt: skip
    total, dense, sparse, routed = results
    return total, dense, sparse, routed


def after_experts(x: Tensor, dense: Tensor, sparse: Tensor, weights: Sequence[Tensor], scalar: Tensor, eps: float) -> Tensor:
    """:func:`mlx_diffgemma.backends.torch.fused.after_experts`."""
    y, size = torch.empty_like(x), x.shape[-1]
    if len(x):
        _after_experts[(len(x),)](
            x.contiguous(), dense.contiguous(), sparse.contiguous(), *weights, scalar, y, eps,
            size=size, block=triton.next_power_of_2(size), num_warps=_warps(size), enable_fp_fusion=True,
        )  # fmt: skip
    return y


def heads(x: Tensor, weight: Tensor | None, rope: tuple[Tensor, Tensor] | None, eps: float) -> Tensor:
    """The norm of each head of x [T, heads, D], times ``weight`` [D], rotated by cosines and sines [T, 1, D] if there are any.

    The heads of a token are neighbours; the rows of tokens may be part of longer ones.
    """
    count, number, size = x.shape
    y = torch.empty(count, number, size, dtype=x.dtype, device=x.device)
    x = x if x.stride()[1:] == (size, 1) else x.contiguous()
    if count:
        cos, sin = (x, x) if rope is None else (table.contiguous() for table in rope)
        _heads[(count, number)](
            x, weight, cos, sin, y, eps, number, x.stride(0), size=size, half=size // 2,
            block=triton.next_power_of_2(size // 2), weighted=weight is not None, rotated=rope is not None,
            num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up for [.., I], with the tanh approximation of gelu. Rows may be parts of longer ones."""
    size = gate.shape[-1]
    rows = [x.reshape(-1, size) if x.stride(-1) == 1 else x.contiguous().view(-1, size) for x in (gate, up)]
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if len(rows[0]):
        block = 1024
        grid = len(rows[0]), triton.cdiv(size, block)
        _geglu[grid](*rows, y, size, rows[0].stride(0), rows[1].stride(0), block=block, num_warps=4, enable_fp_fusion=True)
    return y


def _warps(size: int) -> int:
    return 8 if size > 1024 else 4
