"""Attention of queries over the keys that they see, in bounded memory.

H query heads share K key-value heads in groups; N queries, S keys, D the head size. Scores are not scaled.

MLX does not have fused attention for every head size. Where it has none, it scores all keys at once. Over more than KEY_TILE
keys, this module therefore computes the scores in tiles and adds them up as it goes.
"""

from collections.abc import Sequence

import mlx.core as mx

from mlx_diffgemma.backends import KEY_TILE, QUERY_TILE
from mlx_diffgemma.backends.mlx import fused

#: Head sizes for which Metal has a fused kernel for many queries, and takes it.
FUSED_SIZES = (64, 72, 80, 96, 128)
#: The head size, and the fewest queries, for which Metal has a causal kernel that goes over blocks of keys.
BLOCKED_SIZE, BLOCKED_COUNT = 512, 1024

#: The masks of one pass over one text, by the queries, the keys and the window.
Masks = dict[tuple[range, int, int, int | None], mx.array]


def bidirectional(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """Every query sees every key: [B, H, N, D] over [B, K, S, D] gives [B, H, N, D]. Queries are processed in tiles."""
    tiles: list[mx.array] = []
    for start in range(0, queries.shape[2], QUERY_TILE):
        tile = in_turn(queries[:, :, start : start + QUERY_TILE], tiles)
        if keys.shape[2] > KEY_TILE:
            tiles.append(_tiled(tile, keys, values))
        else:
            tiles.append(_attend(tile, keys, values))
    return mx.concatenate(tiles, axis=2) if len(tiles) > 1 else tiles[0]


def in_turn(array: mx.array, earlier: Sequence[mx.array]) -> mx.array:
    """``array``, which is used only after all of ``earlier`` are computed, so that few tiles are held.

    A GPU gets all tiles in this order at once. On a CPU, MLX makes room for a hundred operations ahead; there, this waits.
    """
    if not earlier:
        return array
    if mx.default_device() == mx.Device(mx.DeviceType.cpu):
        mx.eval(earlier)
        return array
    return mx.depends([array], list(earlier))[0]


def _attend(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None = None) -> mx.array:
    """Attention with scale 1.

    On Metal, MLX has a fused kernel for up to 8 queries and for some head sizes; else it multiplies the queries by the scale,
    scores them, and takes the softmax. These are the same operations without the scale. A ``mask`` [N, S] is added to the scores.
    """
    (rows, heads, count, size), shared = queries.shape, keys.shape[1]
    if count <= 8 or size in FUSED_SIZES:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, mask=mask, scale=1.0)
    factors = queries.reshape(rows, shared, heads // shared, count, size), keys[:, :, None].swapaxes(-1, -2)
    scores = mx.matmul(*factors) if mask is None else mx.addmm(mask, *factors)
    return (mx.softmax(scores, axis=-1, precise=True) @ values[:, :, None]).reshape(queries.shape)


def causal(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    window: int | None,
    images: Sequence[tuple[int, int]] = (),
    reach: int = 1,
    masks: Masks | None = None,
) -> mx.array:
    """Each query sees its own position and the window - 1 before it, or all before it if ``window`` is None.

    ``images`` are (start, stop) among the queries, in order. Within one of them, positions less than ``reach`` apart see each
    other too. The last N of the S keys are the queries' own positions. Queries are processed in tiles, so no mask is larger than
    [QUERY_TILE, S]. ``masks`` keeps the masks for the other layers of a pass.
    """
    count, total = queries.shape[2], keys.shape[2]
    before, masks = total - count, {} if masks is None else masks
    if queries.shape[3] == BLOCKED_SIZE and count >= BLOCKED_COUNT and total <= KEY_TILE and not window and not images:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, mask="causal", scale=1.0)
    tiles: list[mx.array] = []
    for start in range(0, count, QUERY_TILE):
        stop = min(start + QUERY_TILE, count)
        tile = in_turn(queries[:, :, start:stop], tiles)
        last = before + stop
        first = max(0, before + start - window + 1) if window else 0
        shared = [(before + one, before + other) for one, other in images if one < stop and other > start]
        if shared:  # keys of an image that began before this tile, or that ends after it
            first = min(first, max(shared[0][0], before + start - reach + 1))
            last = max(last, min(shared[-1][1], before + stop + reach - 1))
        seen = keys[:, :, first:last], values[:, :, first:last]
        rows = range(before + start, before + stop)
        if last - first > KEY_TILE and not window:
            tiles.append(_tiled(tile, *seen, _reached(rows, window, shared, reach)[1], before + start))
            continue
        place = (rows, first, last, window)
        if place not in masks:
            masks[place] = _mask(range(first, last), *_reached(rows, window, shared, reach), queries.dtype)
        tiles.append(_attend(tile, *seen, None if stop - start == 1 else masks[place]))
    return mx.concatenate(tiles, axis=2) if len(tiles) > 1 else tiles[0]


def _reached(
    queries: range, window: int | None, images: Sequence[tuple[int, int]], reach: int
) -> tuple[mx.array | None, mx.array]:
    """The lowest and the highest key [N, 1] that each query of :func:`causal` sees, with all between. None: all before, too."""
    own = mx.arange(queries.start, queries.stop)[:, None]
    lowest, highest = own - window + 1 if window else None, own
    for start, stop in images:
        inside = (own >= start) & (own < stop)
        highest = mx.where(inside, mx.minimum(own + reach - 1, stop - 1), highest)
        if lowest is not None:
            lowest = mx.where(inside, mx.minimum(lowest, mx.maximum(own - reach + 1, start)), lowest)
    return lowest, highest


def _mask(keys: range, lowest: mx.array | None, highest: mx.array, dtype: mx.Dtype) -> mx.array:
    """0 where a key is seen, and the lowest number elsewhere, [N, S]."""
    places = mx.arange(keys.start, keys.stop)[None, :]
    seen = places <= highest
    seen = seen if lowest is None else seen & (places >= lowest)
    return mx.where(seen, mx.array(0, dtype), mx.array(mx.finfo(dtype).min, dtype))


def _tiled(queries: mx.array, keys: mx.array, values: mx.array, highest: mx.array | None = None, common: int = 0) -> mx.array:
    """Softmax over KEY_TILE keys at a time, with the largest score, the sum of weights and the mean so far in float32.

    Each query sees the keys up to ``highest`` [N, 1], or all if that is None. All queries see the first ``common`` keys.
    """
    (rows, heads, count, size), (_, shared, total, _) = queries.shape, keys.shape
    grouped = queries.reshape(rows, shared, -1, size)  # [B, K, H / K * N, D]
    limit = None if highest is None else mx.tile(highest, (heads // shared, 1))
    most, weight, mixed = mx.array(-mx.inf), mx.array(0.0), mx.array(0.0)
    for start in range(0, total, KEY_TILE):
        stop = min(start + KEY_TILE, total)
        tile_keys = in_turn(keys[:, :, start:stop], [mixed, weight, most] if start else [])
        scores = grouped @ tile_keys.swapaxes(-1, -2)
        if limit is not None and stop > common:
            scores = mx.where(mx.arange(start, stop)[None, :] <= limit, scores, -mx.inf)
        highest = mx.maximum(most, scores.max(axis=-1, keepdims=True).astype(mx.float32))
        wide, weights = fused.softened(scores, highest)
        kept = mx.exp(most - highest)
        weight = fused.added(weight, kept, wide.sum(axis=-1, keepdims=True))
        mixed, most = fused.added(mixed, kept, weights @ values[:, :, start:stop]), highest
    return (mixed / weight).reshape(rows, heads, count, size).astype(queries.dtype)
