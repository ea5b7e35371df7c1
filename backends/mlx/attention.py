"""Attention of queries over the keys that they see, in bounded memory.

H query heads share K key-value heads in groups; N queries, S keys, D the head size. Scores are not scaled.

MLX does not have fused attention for every head size. Where it has none, it scores all keys at once. Over more than KEY_TILE
keys, this module therefore computes the scores in tiles and adds them up as it goes.
"""

from collections.abc import Sequence

import mlx.core as mx

from mlx_diffgemma.backends import KEY_TILE, QUERY_TILE


def bidirectional(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """Every query sees every key: [B, H, N, D] over [B, K, S, D] gives [B, H, N, D]. Queries are processed in tiles."""
    tiles: list[mx.array] = []
    for start in range(0, queries.shape[2], QUERY_TILE):
        mx.eval(tiles)  # the earlier tiles, so that only one holds its scores
        tile = queries[:, :, start : start + QUERY_TILE]
        if keys.shape[2] > KEY_TILE:
            tiles.append(_tiled(tile, keys, values))
        else:
            tiles.append(mx.fast.scaled_dot_product_attention(tile, keys, values, scale=1.0))
    return mx.concatenate(tiles, axis=2) if len(tiles) > 1 else tiles[0]


def causal(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    window: int | None,
    images: Sequence[tuple[int, int]] = (),
    reach: int = 1,
) -> mx.array:
    """Each query sees its own position and the window - 1 before it, or all before it if ``window`` is None.

    ``images`` are (start, stop) among the queries, in order. Within one of them, positions less than ``reach`` apart see each
    other too. The last N of the S keys are the queries' own positions. Queries are processed in tiles, so no mask is larger than
    [QUERY_TILE, S].
    """
    count, total = queries.shape[2], keys.shape[2]
    before = total - count
    tiles = []
    for start in range(0, count, QUERY_TILE):
        stop = min(start + QUERY_TILE, count)
        last = before + stop
        first = max(0, before + start - window + 1) if window else 0
        shared = [(before + one, before + other) for one, other in images if one < stop and other > start]
        if shared:  # keys of an image that began before this tile, or that ends after it
            first = min(first, max(shared[0][0], before + start - reach + 1))
            last = max(last, min(shared[-1][1], before + stop + reach - 1))
        seen = keys[:, :, first:last], values[:, :, first:last]
        lowest, highest = _reached(range(before + start, before + stop), window, shared, reach)
        if last - first > KEY_TILE and not window:
            tiles.append(_tiled(queries[:, :, start:stop], *seen, highest, before + start))
            continue
        mask = None if stop - start == 1 else _mask(range(first, last), lowest, highest)
        tiles.append(mx.fast.scaled_dot_product_attention(queries[:, :, start:stop], *seen, mask=mask, scale=1.0))
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


def _mask(keys: range, lowest: mx.array | None, highest: mx.array) -> mx.array:
    places = mx.arange(keys.start, keys.stop)[None, :]
    seen = places <= highest
    return seen if lowest is None else seen & (places >= lowest)


def _tiled(queries: mx.array, keys: mx.array, values: mx.array, highest: mx.array | None = None, common: int = 0) -> mx.array:
    """Softmax over KEY_TILE keys at a time, in float32, with the largest score and the sum of weights so far.

    Each query sees the keys up to ``highest`` [N, 1], or all if that is None. All queries see the first ``common`` keys.
    """
    (rows, heads, count, size), (_, shared, total, _) = queries.shape, keys.shape
    grouped = queries.astype(mx.float32).reshape(rows, shared, -1, size)  # [B, K, H / K * N, D]
    limit = None if highest is None else mx.tile(highest, (heads // shared, 1))
    most, weight, mixed = mx.array(-mx.inf), mx.array(0.0), mx.array(0.0)
    for start in range(0, total, KEY_TILE):
        stop = min(start + KEY_TILE, total)
        tile_keys, tile_values = keys[:, :, start:stop].astype(mx.float32), values[:, :, start:stop].astype(mx.float32)
        scores = grouped @ tile_keys.swapaxes(-1, -2)
        if limit is not None and stop > common:
            scores = mx.where(mx.arange(start, stop)[None, :] <= limit, scores, -mx.inf)
        highest = mx.maximum(most, scores.max(axis=-1, keepdims=True))
        weights, kept = mx.exp(scores - highest), mx.exp(most - highest)
        weight = weight * kept + weights.sum(axis=-1, keepdims=True)
        mixed, most = mixed * kept + weights @ tile_values, highest
        mx.eval(mixed, weight, most)  # lazy evaluation would hold the scores of many tiles at once
    return (mixed / weight).reshape(rows, heads, count, size).astype(queries.dtype)
