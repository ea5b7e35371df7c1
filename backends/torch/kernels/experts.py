"""Triton kernels for the experts of a layer: bfloat16 activations, and weights of 4 bits in affine groups of 64.

Nothing waits for the device. ``_route`` chooses each token's experts; a (token, expert) pair is named by its index in the
choices. ``_prepare`` sorts the pairs by expert, ``_gate_up`` multiplies twice and applies GELU, ``_down`` multiplies again, and
``_sum`` adds a token's experts.

A code becomes a bfloat16 by bit operations: 0x4300 | code is 128 + code. Two fused multiply-adds then widen two weights at once,
``(v - 128) * scale + bias``; the first is exact, the second rounds once. A thread loads four words of eight codes, and they
are what it passes to the tensor cores: nothing moves between threads. For that, a dot takes its terms in another order than
memory has them (``_column``). ``_prepare`` and ``_gate_up`` write activations in that order. A thread's words belong to one
group, and neighbouring threads' to different ones. So Triton, which lays a load out by what is contiguous, gives a thread the
scales of its own words; it would give it two if it knew that they are aligned, hence ``do_not_specialize_on_alignment``.

Rounding, as in ``model.Experts``: weights, gate, up, GELU, GELU times up, and the outputs of the experts are rounded to bfloat16.
Sums are in float32, and so are the weights of the experts. An element's sum has one order, whatever rows are in the batch:
all blocks are constants but ``block_m``, which divides no sum (see ``products.LinearTiles``, also for ``block_n``).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import os
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: weight int32 [E, out, in / 8], scales and biases bfloat16 [E, out, in / 64].
Packed = tuple[Tensor, Tensor, Tensor]

#: Arguments of the two products that Triton must not take for aligned (see above).
UNALIGNED = ["scales", "biases"]
# The interpreter knows neither PTX nor bfloat16 products, and truncates to bfloat16 where GPUs round.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _column(place, order: tl.constexpr):
    """The column whose value has this place. A place counts (j, i, t, h) or, with order 4, (j // 2, i, t, j % 2, h).

    That is code j + 4 h of the i-th of the four words that the t-th of four threads loads: see ``_words``.
    """
    h = place % 2
    if order == 2:
        t, i, j = place // 2 % 4, place // 8 % 4, place // 32 % 4
    else:
        t, i, j = place // 4 % 4, place // 16 % 4, place // 64 % 2 * 2 + place // 2 % 2
    return place // 128 * 128 + (t % 2 * 8 + t // 2 * 4 + i) * 8 + j + 4 * h


@triton.jit
def _place(column, order: tl.constexpr):
    """The inverse of ``_column``."""
    h, j, i = column // 4 % 2, column % 4, column // 8 % 4
    t = column // 32 % 2 * 2 + column // 64 % 2
    if order == 2:
        return column // 128 * 128 + ((j * 4 + i) * 4 + t) * 2 + h
    else:
        return column // 128 * 128 + (((j // 2 * 4 + i) * 4 + t) * 2 + j % 2) * 2 + h


@triton.jit
def _rounded(x):
    """float32 rounded to bfloat16, to the nearest or even."""
    if _INTERPRETED:
        word = x.to(tl.int32, bitcast=True)
        word = word + 0x7FFF + ((word >> 16) & 1)
        return (word >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def _scaled(codes, scale, bias):
    """(v - 128) * scale + bias of two bfloat16 in each int32, rounded once."""
    if _INTERPRETED:
        low = ((codes << 16).to(tl.float32, bitcast=True) - 128.0) * (scale << 16).to(tl.float32, bitcast=True)
        high = ((codes & -65536).to(tl.float32, bitcast=True) - 128.0) * (scale & -65536).to(tl.float32, bitcast=True)
        low = (low + (bias << 16).to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
        high = (high + (bias & -65536).to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
        low = ((low + 0x7FFF + ((low >> 16) & 1)) >> 16) & 0xFFFF
        return low | ((high + 0x7FFF + ((high >> 16) & 1)) & -65536)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 code, minus, one;
            mov.b32 minus, 0xC300C300;
            mov.b32 one, 0x3F803F80;
            fma.rn.bf16x2 code, $1, one, minus;
            fma.rn.bf16x2 $0, code, $2, $3;
            }""",
            "=r,r,r,r", [codes, scale, bias], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _widened(words, scale, bias, block_n: tl.constexpr, order: tl.constexpr):
    """Words [block_n, 16], and scales and biases [block_n, 4] of four words each -> weights [block_n, 128], in order of place.

    Row (a, b, c) of the words becomes row (b, a, c), of 2, block_n / 16 and 8: see ``_rows``.
    """
    even = tl.join(words & 0x000F000F, (words >> 8) & 0x000F000F)
    odd = tl.join((words >> 4) & 0x000F000F, (words >> 12) & 0x000F000F)
    pairs = _scaled(tl.join(even, odd) | 0x43004300, _spread(scale), _spread(bias))  # [.., 16, j // 2, j % 2]
    low = (pairs & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    w = tl.join(low, high).reshape(2, block_n // 16, 8, 4, 4, 2, 2, 2)  # a b c t i j//2 j%2 h
    if order == 2:
        placed = w.permute(1, 0, 2, 5, 6, 4, 3, 7).reshape(block_n, 128)
    else:
        placed = w.permute(1, 0, 2, 5, 4, 3, 6, 7).reshape(block_n, 128)
    return placed


@triton.jit
def _spread(x):
    """Scales [n, 4] -> [n, 16, 2, 2] int32, each for four words of eight codes, and as two bfloat16."""
    pair = (x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x10001
    return pair.reshape(x.shape[0], 4, 1, 1, 1).broadcast_to(x.shape[0], 4, 4, 2, 2).reshape(x.shape[0], 16, 2, 2)


@triton.jit
def _rows(block_n: tl.constexpr):
    """The rows of a matrix in the order of loading. A thread of a warp holds rows 8 apart of each 16."""
    a = tl.arange(0, 2)[:, None, None]
    b = tl.arange(0, block_n // 16)[None, :, None]
    c = tl.arange(0, 8)[None, None, :]
    return (b * 16 + a * 8 + c).reshape(block_n)


@triton.jit
def _words():
    """Words in the order of loading, four for a thread."""
    at = tl.arange(0, 16)
    return at // 4 % 2 * 8 + at // 8 * 4 + at % 4


@triton.jit
def _dot(w, part, total):
    if _INTERPRETED:
        return tl.dot(w.to(tl.float32), part.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(w, part, total)


@triton.jit
def _route(
    scores, scale, weights, chosen,
    experts: tl.constexpr, experts_block: tl.constexpr, top_k: tl.constexpr, top_block: tl.constexpr,
):  # fmt: skip
    """A token's experts: softmax, the ``top_k`` largest (of equal ones the first), their weights."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, experts_block)
    score = tl.load(scores + token * experts + expert, mask=expert < experts, other=float("-inf")).to(tl.float32)
    p = tl.exp(score - tl.max(score, 0))
    p /= tl.sum(p, 0)
    left = tl.where(score > float("-inf"), score, float("-inf"))  # NaN reaches the weights by p, and confuses no comparison
    place = tl.arange(0, top_block)
    best = tl.zeros((top_block,), dtype=tl.float32)
    index = tl.zeros((top_block,), dtype=tl.int32)
    for k in tl.static_range(top_k):
        first = tl.argmax(left, 0)
        best = tl.where(place == k, tl.sum(tl.where(expert == first, p, 0.0), 0), best)
        index = tl.where(place == k, first, index)
        left = tl.where(expert == first, float("-inf"), left)
    weight = best / tl.sum(best, 0) * tl.load(scale + index).to(tl.float32)
    tl.store(weights + token * top_k + place, weight, mask=place < top_k)
    tl.store(chosen + token * top_k + place, index.to(tl.int64), mask=place < top_k)


@triton.jit(do_not_specialize=["pairs"])
def _prepare(
    chosen, x, order, table, arranged, pairs,
    k_size: tl.constexpr, experts: tl.constexpr, block_m: tl.constexpr, x_order: tl.constexpr,
):  # fmt: skip
    """Sort pairs by expert, in ``order``, and divide them into blocks; arrange the columns of x by place.

    table[block] = expert or -1, first pair, end of the expert's pairs. The blocks of expert e begin at e + (pairs before it) //
    block_m. There no two experts overlap, and no program needs the counts of others.
    """
    program = tl.program_id(0)
    if program < experts:
        at = tl.arange(0, 1024)
        before = tl.zeros((1024,), dtype=tl.int32)
        until = tl.zeros((1024,), dtype=tl.int32)
        for first in range(0, pairs, 1024):
            expert = tl.load(chosen + first + at, mask=first + at < pairs, other=experts).to(tl.int32)
            before += (expert < program).to(tl.int32)
            until += (expert <= program).to(tl.int32)
        start = tl.sum(before)
        end = tl.sum(until)
        to = order + start
        for first in range(0, pairs, 1024):
            expert = tl.load(chosen + first + at, mask=first + at < pairs, other=experts).to(tl.int32)
            mine = (expert == program).to(tl.int32)
            tl.store(to + tl.cumsum(mine, 0) - 1, first + at, mask=expert == program)
            to += tl.sum(mine)
        first_block = start // block_m + program
        for block in range(first_block, end // block_m + program + 1):
            first = start + (block - first_block) * block_m
            tl.store(table + block * 4, tl.where(first < end, program, -1))
            tl.store(table + block * 4 + 1, first)
            tl.store(table + block * 4 + 2, end)
    else:
        row = (program - experts).to(tl.int64) * k_size
        for first in tl.static_range(0, k_size, 1024):
            place = first + tl.arange(0, 1024)
            value = tl.load(x + row + _column(place, x_order), mask=place < k_size)
            tl.store(arranged + row + place, value, mask=place < k_size)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def _gate_up(
    x, weight, scales, biases, order, table, h,
    k_size: tl.constexpr, n_size: tl.constexpr, top_k: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, x_order: tl.constexpr,
):  # fmt: skip
    """h[m, place of n] = gelu(sum over k of x[token, k] * W[n, k]) * (sum over k of x[token, k] * W[n_size + n, k])."""
    mine = tl.load(table + tl.program_id(0) * 4)
    start = tl.load(table + tl.program_id(0) * 4 + 1)
    end = tl.load(table + tl.program_id(0) * 4 + 2)
    if mine < 0:
        return
    m = start + tl.arange(0, block_m)
    token = tl.load(order + tl.minimum(m, end - 1)) // top_k  # rows past the end repeat the last one, and are not written
    from_x = x + token.to(tl.int64)[None, :] * k_size + tl.arange(0, 128)[:, None]
    n = tl.program_id(1) * block_n
    row = mine.to(tl.int64) * (2 * n_size) + n + _rows(block_n)[:, None]
    gate_words = weight + row * (k_size // 8) + _words()[None, :]
    up_words = gate_words + n_size * (k_size // 8)
    gate_group = row * (k_size // 64) + (tl.arange(0, 4) % 2)[None, :]
    up_group = gate_group + n_size * (k_size // 64)
    gate = tl.zeros((block_n, block_m), dtype=tl.float32)
    up = tl.zeros((block_n, block_m), dtype=tl.float32)
    # Triton prefetches words, but not loads as short as the scales. They are loaded one block ahead.
    gate_scale, gate_bias = tl.load(scales + gate_group), tl.load(biases + gate_group)
    up_scale, up_bias = tl.load(scales + up_group), tl.load(biases + up_group)
    for column in range(0, k_size, 128):
        ahead = tl.minimum(column + 128, k_size - 128) // 64
        next_gate_scale, next_gate_bias = tl.load(scales + gate_group + ahead), tl.load(biases + gate_group + ahead)
        next_up_scale, next_up_bias = tl.load(scales + up_group + ahead), tl.load(biases + up_group + ahead)
        part = tl.load(from_x + column)
        gates = tl.load(gate_words + column // 8)
        ups = tl.load(up_words + column // 8)
        gate = _dot(_widened(gates, gate_scale, gate_bias, block_n, x_order), part, gate)
        up = _dot(_widened(ups, up_scale, up_bias, block_n, x_order), part, up)
        gate_scale, gate_bias = next_gate_scale, next_gate_bias
        up_scale, up_bias = next_up_scale, next_up_bias
    g = _rounded(gate).to(tl.float32)
    # GELU by tanh: (1 + tanh(z)) / 2 is sigmoid(2 z).
    gelu = _rounded(g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))).to(tl.float32)
    out = _rounded(gelu * _rounded(up).to(tl.float32))
    padded: tl.constexpr = (n_size + 127) // 128 * 128
    column = n + tl.arange(0, block_n)
    to_h = h + m.to(tl.int64)[None, :] * padded + _place(column, x_order)[:, None]
    tl.store(to_h, out, mask=(m < end)[None, :])
    if padded > n_size:  # the last program also fills the other half of the last 128 columns: column + 64 is t + 1
        rest = (m < end)[None, :] & (column + 64 >= n_size)[:, None]
        tl.store(to_h + x_order, tl.zeros_like(out), mask=rest)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def _down(
    h, weight, scales, biases, order, table, y,
    k_size: tl.constexpr, n_size: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, x_order: tl.constexpr,
):  # fmt: skip
    """y[pair, n] = sum over k of h[m, place of k] * W[n, k]: back in the tokens' order."""
    mine = tl.load(table + tl.program_id(0) * 4)
    start = tl.load(table + tl.program_id(0) * 4 + 1)
    end = tl.load(table + tl.program_id(0) * 4 + 2)
    if mine < 0:
        return
    padded: tl.constexpr = (k_size + 127) // 128 * 128
    m = start + tl.arange(0, block_m)
    from_h = h + tl.minimum(m, end - 1).to(tl.int64)[None, :] * padded + tl.arange(0, 128)[:, None]
    n = tl.program_id(1) * block_n
    row = mine.to(tl.int64) * n_size + n + _rows(block_n)[:, None]
    word = _words()[None, :]
    group = (tl.arange(0, 4) % 2)[None, :]
    words = weight + row * (k_size // 8) + word
    scales += row * (k_size // 64) + group
    biases += row * (k_size // 64) + group
    total = tl.zeros((block_n, block_m), dtype=tl.float32)
    within = group < k_size // 64
    scale, bias = tl.load(scales, mask=within, other=0.0), tl.load(biases, mask=within, other=0.0)
    for column in range(0, padded, 128):
        ahead = column // 64 + 2
        within = group + ahead < k_size // 64
        next_scale = tl.load(scales + ahead, mask=within, other=0.0)
        next_bias = tl.load(biases + ahead, mask=within, other=0.0)
        part = tl.load(from_h + column)
        codes = tl.load(words + column // 8, mask=word + column // 8 < k_size // 8, other=0)
        total = _dot(_widened(codes, scale, bias, block_n, x_order), part, total)
        scale, bias = next_scale, next_bias
    pair = tl.load(order + tl.minimum(m, end - 1)).to(tl.int64)
    tl.store(y + pair[None, :] * n_size + (n + tl.arange(0, block_n))[:, None], _rounded(total), mask=(m < end)[None, :])


@triton.jit
def _sum(y, weights, out, n_size: tl.constexpr, top_k: tl.constexpr, block: tl.constexpr):
    """out[token, n] = sum over k, in order, of weights[token, k] * y[token, k, n]."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * block + tl.arange(0, block)
    total = tl.zeros((block,), dtype=tl.float32)
    for k in tl.static_range(top_k):
        part = tl.load(y + (token * top_k + k) * n_size + n, mask=n < n_size, other=0.0)
        total += part.to(tl.float32) * tl.load(weights + token * top_k + k)
    tl.store(out + token * n_size + n, _rounded(total), mask=n < n_size)


@dataclass(frozen=True)
class Launch:
    """A kernel as it is launched for sizes: its grid, constants and options."""

    kernel: Any
    grid: tuple[int, ...]
    constants: dict[str, int]
    options: dict[str, int]

    def __call__(self, *arguments: Tensor | int) -> None:
        self.kernel[self.grid](*arguments, **self.constants, **self.options, enable_fp_fusion=True)


@lru_cache(maxsize=64)
def launches(
    tokens: int, hidden: int, inner: int, experts: int, top_k: int, capability: tuple[int, int]
) -> tuple[Launch, Launch, Launch, Launch]:
    """The launches of ``mixed`` for ``tokens`` tokens on a device of ``capability``: prepare, gate and up, down, sum."""
    pairs = tokens * top_k
    # Routing is uneven. A block of twice the mean holds all rows of most experts, whose weights are then widened only once.
    block_m = min(max(triton.next_power_of_2(2 * triton.cdiv(pairs, experts)), 16), 64)
    blocks = pairs // block_m + experts
    # Neighbouring terms that a thread gives to an instruction: 2 for wgmma, 4 for mma.sync (Triton's kWidth of two bfloat16).
    shared = {"block_m": block_m, "x_order": 2 if capability[0] == 9 else 4}
    options = {"num_warps": 4, "num_stages": 3}
    return (
        Launch(
            _prepare,
            (experts + tokens,),
            {"k_size": hidden, "experts": experts} | shared,
            options,
        ),
        Launch(
            _gate_up,
            (blocks, inner // 64),
            {"k_size": hidden, "n_size": inner, "top_k": top_k, "block_n": 64} | shared,
            options,
        ),
        Launch(
            _down,
            (blocks, hidden // 128),
            {"k_size": inner, "n_size": hidden, "block_n": 128} | shared,
            options,
        ),
        Launch(
            _sum,
            (tokens, triton.cdiv(hidden, 1024)),
            {"n_size": hidden, "top_k": top_k, "block": 1024},
            options,
        ),
    )


def routing(tokens: int, experts: int, top_k: int) -> Launch:
    """The launch of ``routed`` for ``tokens`` tokens."""
    blocks = {"experts_block": triton.next_power_of_2(experts), "top_block": triton.next_power_of_2(top_k)}
    return Launch(
        _route,
        (tokens,),
        {"experts": experts, "top_k": top_k} | blocks,
        {"num_warps": 1, "num_stages": 3},
    )


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)  # the interpreter runs on a CPU


def routed(scores: Tensor, scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The weights (float32) and the experts (int64) [T, K] of tokens with ``scores`` [T, E]: see fused.py."""
    tokens, experts = scores.shape
    weights = scores.new_empty(tokens, top_k, dtype=torch.float32)
    chosen = scores.new_empty(tokens, top_k, dtype=torch.int64)
    if tokens:
        routing(tokens, experts, top_k)(scores.contiguous(), scale, weights, chosen)
    return weights, chosen


def mixed(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Packed, down: Packed) -> Tensor:
    """Send each token of x [T, H] through its experts ``chosen`` [T, K], and sum their outputs weighted by ``weights`` [T, K].

    ``gate_up`` is packed from [E, 2 I, H], gate before up, and ``down`` from [E, H, I]. H is a multiple of 128, and I of 64.
    Everything is on one device, x in bfloat16 and weights in float32.
    """
    (tokens, hidden), (experts, _, words) = x.shape, down[0].shape
    inner, top_k = words * 8, chosen.shape[1]
    out = x.new_empty(tokens, hidden)
    if not tokens:
        return out
    prepare, first, second, add = launches(tokens, hidden, inner, experts, top_k, _capability(x.device))
    pairs = tokens * top_k
    order = chosen.new_empty(pairs, dtype=torch.int32)
    table = chosen.new_empty(first.grid[0], 4, dtype=torch.int32)
    arranged, h, y = out.new_empty(tokens, hidden), x.new_empty(pairs, triton.cdiv(inner, 128) * 128), x.new_empty(pairs, hidden)
    prepare(chosen.contiguous(), x.contiguous(), order, table, arranged, pairs)
    first(arranged, *gate_up, order, table, h)
    second(h, *down, order, table, y)
    add(y, weights.contiguous(), out)
    return out
