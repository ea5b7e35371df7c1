"""Triton kernels for the statistics of a denoising step. They read the logits as the head wrote them; only results are float32.

``statistics`` cuts a row of logits into slots. Each program reads one slot of one row and writes its maxima, their places and
its sums; a second kernel combines the slots of each row. The slots depend on the vocabulary alone, so a row has the same bits
whatever other rows there are. T rows, V vocabulary.

Tanh is computed here, because Triton has none that its interpreter also knows.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Most tokens of a slot: 64 slots a row at V = 262,144, enough programs for a device even with few rows.
SLOT = 4096
#: The interpreter's conversion to bfloat16 truncates.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_NO_PLACE = tl.constexpr(0x7FFFFFFF)


def slot_size(v_size: int) -> int:
    """Tokens of a slot in a vocabulary of ``v_size``."""
    return min(SLOT, triton.next_power_of_2(v_size))


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """float32 ``x`` rounded to ``dtype`` (float32 or bfloat16), as float32."""
    if dtype == tl.bfloat16 and _INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    else:
        nearest = x.to(dtype).to(tl.float32)
    return nearest


@triton.jit
def _exp(x):
    """e^x, as a power of 2: Triton's own exp adds three instructions for results below 2^-126, which no sum here needs."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _tempered(raw, inverse_cap, scale):
    """cap * tanh(raw / cap) / temperature, float32; scale is cap / temperature."""
    x = raw.to(tl.float32) * inverse_cap
    far = 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)  # e^2x = 2^(2x / ln 2)
    # Near 0 that cancels. The polynomial is that of Cephes (S. Moshier), tanhf.c.
    z = x * x
    near = tl.fma(tl.fma(z, -5.70498872745e-3, 2.06390887954e-2), z, -5.37397155531e-2)
    near = tl.fma(tl.fma(near, z, 1.33314422036e-1), z, -3.33332819422e-1)
    near = tl.fma(near * z, x, x)
    return tl.where(z < 0.390625, near, far) * scale


@triton.jit
def _mixed(x):
    """:func:`mlx_diffgemma.noise.mix` of uint32 words."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _log(x):
    """Natural logarithm of normal x > 0, of Cephes (S. Moshier), logf.c, in a third fewer instructions than Triton's own."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & -8388608  # of x / m, with m in sqrt(1/2) .. sqrt(2); a multiple of 2^23
    m = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    z = m * m
    y = tl.fma(tl.fma(m, 7.0376836292e-2, -1.1514610310e-1), m, 1.1676998740e-1)
    y = tl.fma(tl.fma(y, m, -1.2420140846e-1), m, 1.4249322787e-1)
    y = tl.fma(tl.fma(y, m, -1.6668057665e-1), m, 2.0000714765e-1)
    y = tl.fma(tl.fma(tl.fma(y, m, -2.4999993993e-1), m, 3.3333331174e-1), m, -0.5)
    return tl.fma(exponent.to(tl.float32), 8.262958288192749e-08, tl.fma(y, z, m))  # ln 2 / 2^23


@triton.jit
def _gumbel(words):
    """Gumbel noise float32 of uint32 words, as :func:`mlx_diffgemma.noise.gumbel` defines it."""
    u = words.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # * 2^-32 + 2^-33
    # log1p(-u) is the logarithm of the rounded 1 - u, plus what the rounding took.
    rest = 1.0 - u
    noise = -_log(-(_log(rest) + ((1.0 - rest) - u)))
    return tl.where(rest > 0.0, noise, float("-inf"))


@triton.jit
def _slots(
    raw, noise, temperature, sums, places, v_size, slots, cap, inverse_cap,
    block: tl.constexpr, draws: tl.constexpr,
):  # fmt: skip
    """What a slot of a row gives, for its tempered logits s and its largest one.

    sums[row, slot] = largest; sums of exp(s - largest), of that times (s - largest), and of exp(r - largest r) with r the rounded
    s; largest of s + noise. places[row, slot] = tokens of the largest s and of the largest s + noise.
    """
    slot = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    token = slot * block + tl.arange(0, block)
    inside = token < v_size
    scale = tl.div_rn(cap, tl.load(temperature + row))
    score = _tempered(tl.load(raw + row * v_size + token, mask=inside, other=0.0), inverse_cap, scale)
    score = tl.where(inside, score, -1e30)  # finite, so that its product with a weight of 0 is 0
    best = tl.max(score, 0)
    weight = _exp(score - best)
    to_sums = sums + (row * slots + slot) * 5
    to_places = places + (row * slots + slot) * 2
    tl.store(to_sums, best)
    tl.store(to_places, tl.min(tl.where(score == best, token, _NO_PLACE), 0))
    total = tl.sum(weight, 0)
    tl.store(to_sums + 1, total)
    tl.store(to_sums + 2, tl.sum((score - best) * weight, 0))
    if raw.dtype.element_ty != tl.float32:
        rounded = _rounded(score, raw.dtype.element_ty)
        total = tl.sum(_exp(rounded - _rounded(best, raw.dtype.element_ty)), 0)
    tl.store(to_sums + 3, total)
    if draws:
        word = _mixed(token.to(tl.uint32) ^ tl.load(noise + row).to(tl.uint32, bitcast=True))
        noisy = score + _gumbel(word)
        best = tl.max(noisy, 0)
        tl.store(to_sums + 4, best)
        tl.store(to_places + 1, tl.min(tl.where(noisy == best, token, _NO_PLACE), 0))


@triton.jit
def _combined(
    sums, places, argmax, sampled, entropy, most, total, v_size, slots,
    slots_block: tl.constexpr, dtype: tl.constexpr, draws: tl.constexpr,
):  # fmt: skip
    """The statistics of a row from its slots."""
    row = tl.program_id(0)
    slot = tl.arange(0, slots_block)
    inside = slot < slots
    from_sums = sums + (row * slots + slot) * 5
    from_places = places + (row * slots + slot) * 2
    best = tl.load(from_sums, mask=inside, other=float("-inf"))
    largest = tl.max(best, 0)
    token = tl.min(tl.where(best == largest, tl.load(from_places, mask=inside, other=_NO_PLACE), _NO_PLACE), 0)
    tl.store(argmax + row, tl.minimum(token, v_size - 1).to(tl.int64))  # NaN equals nothing
    shift = tl.where(inside, best - largest, 0.0)
    kept = _exp(shift)
    weights = tl.load(from_sums + 1, mask=inside, other=0.0)
    products = tl.load(from_sums + 2, mask=inside, other=0.0)
    whole = tl.sum(weights * kept, 0)
    tl.store(entropy + row, tl.log(whole) - tl.sum((products + shift * weights) * kept, 0) / whole)
    if dtype != tl.float32:
        largest = _rounded(largest, dtype)
        kept = _exp(tl.where(inside, _rounded(best, dtype) - largest, 0.0))
        whole = tl.sum(tl.load(from_sums + 3, mask=inside, other=0.0) * kept, 0)
    tl.store(most + row, largest)
    tl.store(total + row, whole)
    if draws:
        noisy = tl.load(from_sums + 4, mask=inside, other=float("-inf"))
        at_noisy = tl.load(from_places + 1, mask=inside, other=_NO_PLACE)
        token = tl.min(tl.where(noisy == tl.max(noisy, 0), at_noisy, _NO_PLACE), 0)
        tl.store(sampled + row, tl.minimum(token, v_size - 1).to(tl.int64))


@triton.jit
def _probabilities(raw, temperature, most, total, out, v_size, cap, inverse_cap, block: tl.constexpr):
    """out[row, token] = exp(r - most) / total, with r the tempered logit rounded to the type of ``raw``."""
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * block + tl.arange(0, block)
    inside = token < v_size
    dtype = raw.dtype.element_ty
    scale = tl.div_rn(cap, tl.load(temperature + row))
    score = _tempered(tl.load(raw + row * v_size + token, mask=inside, other=0.0), inverse_cap, scale)
    weight = _exp(_rounded(score, dtype) - tl.load(most + row))
    part = _rounded(weight * tl.div_rn(1.0, tl.load(total + row)), dtype)
    tl.store(out + row * v_size + token, part.to(dtype), mask=inside)


def statistics(
    raw: Tensor, noise: Tensor | None, cap: float, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The statistics of s = cap * tanh(raw / cap) / temperature, in two launches.

    Args:
        raw: [T, V], the head's output before the softcap, float32 or bfloat16; rows are contiguous.
        noise: int32 [T], the noise bits of each position, or None to draw nothing.
        temperature: float32 [T].

    Returns:
        argmax, sampled: int64 [T], the first of the largest s, and of the largest s + noise.
        entropy: float32 [T], nats.
        most, total: float32 [T], the largest of the s rounded to the type of ``raw``, and the sum of exp(rounded s - most).
    """
    rows, v_size = raw.shape
    block = slot_size(v_size)
    slots = triton.cdiv(v_size, block)
    sums = torch.empty(rows, slots, 5, dtype=torch.float32, device=raw.device)
    places = torch.empty(rows, slots, 2, dtype=torch.int32, device=raw.device)
    # Each in memory of its own, which is aligned. Triton compiles a kernel again for pointers of another alignment.
    argmax, sampled = (torch.empty(rows, dtype=torch.int64, device=raw.device) for _ in range(2))
    entropy, most, total = (torch.empty(rows, dtype=torch.float32, device=raw.device) for _ in range(3))
    draws = noise is not None
    _slots[slots, rows](
        raw, noise, temperature, sums, places, v_size, slots, cap, 1 / cap,
        block=block, draws=draws, num_warps=_warps(block), enable_fp_fusion=True,
    )  # fmt: skip
    _combined[(rows,)](
        sums, places, argmax, sampled, entropy, most, total, v_size, slots,
        slots_block=triton.next_power_of_2(slots), dtype=_TYPES[raw.dtype], draws=draws, num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    return argmax, sampled if draws else argmax, entropy, most, total


def probabilities(raw: Tensor, cap: float, temperature: Tensor, most: Tensor, total: Tensor) -> Tensor:
    """The float32 softmax [T, V] of the rounded s, in the type of ``raw``. The arguments are those of :func:`statistics`."""
    rows, v_size = raw.shape
    out, block = torch.empty_like(raw), slot_size(v_size)
    _probabilities[triton.cdiv(v_size, block), rows](
        raw, temperature, most, total, out, v_size, cap, 1 / cap,
        block=block, num_warps=_warps(block), enable_fp_fusion=True,
    )  # fmt: skip
    return out


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


def _warps(block: int) -> int:
    """Sixteen tokens of a slot for each thread."""
    return max(block // 512, 1)
