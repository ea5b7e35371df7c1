"""Triton kernels for the attention of a canvas over its text's keys and its own, whose number is data on the device.

The canvas is written into the room behind the committed positions, so what it sees is one stretch of a buffer. Where the stretch
begins and ends is an int32 tensor: a CUDA graph that was captured once can be replayed while the text grows within its buffers.

The keys are divided into ``SPLITS`` parts. A program goes through one part in blocks, with a running maximum (FlashAttention-2,
Dao 2023; parts as in Flash-Decoding). A second kernel adds the parts in order. The query heads that share a key-value head are
rows of one product, so they share what is loaded.

A row of the result has the same bits whatever other rows there are: blocks depend on the head size and the GPU, and parts on the
number of keys that are seen. Neither depends on the number of queries, nor on the size of the buffer.

Why not PyTorch's own attention:

- ``scaled_dot_product_attention`` takes the number of keys from shapes. With a mask it computes over the whole buffer, and its
  flash kernel takes no mask and no head size above 256.
- FlexAttention has fused kernels only under ``torch.compile``; otherwise it stores all scores. It takes another kernel for fewer
  than 128 queries, so a row could have other bits in a longer canvas, and its main kernel does not share keys between the
  heads of a group (torch 2.13, ``torch/_inductor/kernel/flex/flex_decoding.py``).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Head sizes whose tiles are known to compile without spills.
SIZES = (256, 512)

#: Parts of the keys. With 256 queries and 16 heads, four parts make 128 or 256 programs; an H100 has 132 multiprocessors. A
#: canvas of a few tokens makes as few as 16 programs; more parts would cost the usual canvas more memory traffic.
SPLITS = 4

#: Rows whose parts one program adds.
COMBINED = 8


@dataclass(frozen=True)
class Tiles:
    """How attention with heads of one size is divided. Nothing here may depend on the number of rows.

    An accumulator [128, 512] does not fit the registers of 8 warps. At size 512, two programs each compute half of the output's
    columns, and both compute the scores, so 1.5 times as many products as needed. Where Triton has no wgmma, the queries take
    registers too. There the same is done at size 256, and at size 512 queries and keys are read in pieces of the head.
    """

    columns: int  # of the output, in a program
    block_m: int  # rows (a query of one head) in a program; on Hopper wgmma takes 64 for each 4 warps
    block_n: int  # keys in a block
    block_d: int  # terms of a score that one dot adds
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, size: int, hopper: bool) -> Self:
        """The tiles for heads of ``size``: within 227 KB of shared memory on Hopper, within 99 KB elsewhere."""
        columns, block_n, block_d, num_stages = (256, 64, 256, 2) if hopper else (128, 32, 256, 2)
        if size > 256:
            columns, block_n, block_d, num_stages = (256, 32, 512, 2) if hopper else (256, 32, 64, 3)
        return cls(min(columns, size), 128, block_n, min(block_d, size), 8, num_stages)


@triton.jit
def _keys_in_part(begin, end, splits: tl.constexpr, block_n: tl.constexpr):
    """Keys in each part but the last, in whole blocks. A short stretch fills fewer than ``splits`` parts."""
    return tl.cdiv(tl.cdiv(end - begin, block_n), splits) * block_n


@triton.jit(do_not_specialize=["count"])
def _attend(
    queries, keys, values, seen, partial, peaks, sums, count,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    shared: tl.constexpr, group: tl.constexpr, size: tl.constexpr, splits: tl.constexpr,
    columns: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """One part of the keys: for each row the maximum of its scores, the sum of its weights, and the weighted sum of values."""
    pieces: tl.constexpr = size // columns
    batch, head = tl.program_id(1) // shared, tl.program_id(1) % shared
    split, piece = tl.program_id(2) // pieces, tl.program_id(2) % pieces
    begin, end = tl.load(seen + 2 * batch), tl.load(seen + 2 * batch + 1)
    length = _keys_in_part(begin, end, splits, block_n)
    first = begin + split * length
    if first >= end:
        return
    last = tl.minimum(first + length, end)

    # Rows and keys past the end read the last one again, so loads need no mask. What lies behind it may be NaN.
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    row = tl.minimum(m, group * count - 1)
    from_q = queries + batch.to(tl.int64) * query_batch + (head * group + row // count) * query_head + row % count * query_row
    from_k = keys + batch.to(tl.int64) * key_batch + head.to(tl.int64) * key_head
    from_v = values + batch.to(tl.int64) * value_batch + head.to(tl.int64) * value_head
    d, column = tl.arange(0, block_d), piece * columns + tl.arange(0, columns)
    if block_d == size:
        q = tl.load(from_q[:, None] + d[None, :])
    peak = tl.full((block_m,), float("-inf"), tl.float32)
    total = tl.zeros((block_m,), tl.float32)
    mixed = tl.zeros((block_m, columns), tl.float32)
    for start in range(first, last, block_n):
        n = start + tl.arange(0, block_n)
        key = tl.minimum(n, last - 1)
        if block_d == size:
            k = tl.load(from_k + key[None, :] * key_row + d[:, None])
            scores = tl.dot(q, k, input_precision="ieee")
        else:
            scores = tl.zeros((block_m, block_n), tl.float32)
            for term in range(0, size, block_d):
                part = tl.load(from_q[:, None] + (term + d)[None, :])
                k = tl.load(from_k + key[None, :] * key_row + (term + d)[:, None])
                scores = tl.dot(part, k, scores, input_precision="ieee")
        scores = tl.where((n < last)[None, :], scores * 1.4426950408889634, float("-inf"))  # log2(e), for exp2
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights, faded = tl.exp2(scores - higher[:, None]), tl.exp2(peak - higher)
        total = total * faded + tl.sum(weights, 1)
        v = tl.load(from_v + key[:, None] * value_row + column[None, :])
        mixed = tl.dot(weights.to(v.dtype), v, mixed * faded[:, None], input_precision="ieee")
        peak = higher

    place = (tl.program_id(1).to(tl.int64) * splits + split) * (group * count) + m
    within = m < group * count
    tl.store(partial + place[:, None] * size + column[None, :], mixed, mask=within[:, None])
    if piece == 0:
        tl.store(peaks + place, peak, mask=within)
        tl.store(sums + place, total, mask=within)


@triton.jit(do_not_specialize=["count"])
def _combine(
    partial, peaks, sums, seen, mixed, count,
    shared: tl.constexpr, group: tl.constexpr, size: tl.constexpr, splits: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    """Add the parts that have keys, in order, and divide by the sum of the weights."""
    batch, head = tl.program_id(1) // shared, tl.program_id(1) % shared
    begin, end = tl.load(seen + 2 * batch), tl.load(seen + 2 * batch + 1)
    parts = tl.cdiv(end - begin, _keys_in_part(begin, end, splits, block_n))
    rows = group * count
    m, d = tl.program_id(0) * block_m + tl.arange(0, block_m), tl.arange(0, size)
    row = tl.minimum(m, rows - 1)
    place = tl.program_id(1).to(tl.int64) * splits * rows + row
    peak = tl.full((block_m,), float("-inf"), tl.float32)
    for part in range(0, parts):
        peak = tl.maximum(peak, tl.load(peaks + place + part * rows))
    total = tl.zeros((block_m,), tl.float32)
    result = tl.zeros((block_m, size), tl.float32)
    for part in range(0, parts):
        at = place + part * rows
        faded = tl.exp2(tl.load(peaks + at) - peak)
        total += tl.load(sums + at) * faded
        result += tl.load(partial + at[:, None] * size + d[None, :]) * faded[:, None]
    to = mixed + ((batch * count + row % count) * (shared * group) + head * group + row // count).to(tl.int64)[:, None] * size
    tl.store(to + d[None, :], (result / total[:, None]).to(mixed.dtype.element_ty), mask=(m < rows)[:, None])


def attend(queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """Attention of every query over one stretch of its text's keys. Scores are not scaled.

    Args:
        queries: [B, H, N, D] with D one of ``SIZES``, bfloat16.
        keys: [B, K, S, D], a whole buffer or a view of one. H is a multiple of K, S may exceed what is seen.
        values: like ``keys``.
        seen: int32 [B, 2] on the device. The queries of text b see the keys from ``seen[b, 0]`` to ``seen[b, 1]`` - 1: at least
            one, all within S. Nothing checks this, as the host never reads it.

    Returns:
        [B, H, N, D], a view of [B, N, H, D].
    """
    hopper = queries.is_cuda and torch.cuda.get_device_capability(queries.device)[0] == 9
    return attend_with(Tiles.of(queries.shape[-1], hopper), queries, keys, values, seen)


def attend_with(tiles: Tiles, queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """:func:`attend` with other tiles than those of the device."""
    (batch, heads, count, size), shared = queries.shape, keys.shape[1]
    assert queries.stride(-1) == keys.stride(-1) == values.stride(-1) == 1, "the head must be contiguous"
    assert (seen.dtype, seen.shape, seen.is_contiguous()) == (torch.int32, (batch, 2), True), "seen must be int32 [B, 2]"
    rows, groups = heads // shared * count, batch * shared
    partial = torch.empty(groups, SPLITS, rows, size, dtype=torch.float32, device=queries.device)
    peaks, sums = partial.new_empty(2, groups, SPLITS, rows)
    mixed = queries.new_empty(batch, count, heads, size)
    form = {"shared": shared, "group": heads // shared, "size": size, "splits": SPLITS, "block_n": tiles.block_n}
    _attend[triton.cdiv(rows, tiles.block_m), groups, SPLITS * (size // tiles.columns)](
        queries, keys, values, seen, partial, peaks, sums, count,
        *queries.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        columns=tiles.columns, block_m=tiles.block_m, block_d=tiles.block_d, **form,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    _combine[triton.cdiv(rows, COMBINED), groups](
        partial, peaks, sums, seen, mixed, count, block_m=COMBINED, **form, enable_fp_fusion=True
    )  # fmt: skip
    return mixed.transpose(1, 2)
