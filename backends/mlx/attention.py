"""Attention of queries over the keys that they see, in bounded memory.

H query heads share K key-value heads in groups; N queries, S keys, D the head size. Scores are not scaled.

MLX does not have fused attention for every head size. Where it has none, it scores all keys at once. Over more than KEY_TILE
keys, this module therefore computes the scores in tiles and adds them up as it goes.
"""

import mlx.core as mx

from mlx_diffgemma.backends import KEY_TILE, QUERY_TILE


def bidirectional(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """Every query sees every key: [B, H, N, D] over [B, K, S, D] gives [B, H, N, D]."""
    if keys.shape[2] > KEY_TILE:
        return _tiled(queries, keys, values, unseen=0)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0)


def causal(queries: mx.array, keys: mx.array, values: mx.array, window: int | None) -> mx.array:
    """Each query sees its own position and the window - 1 before it, or all before it if ``window`` is None.

    The last N of the S keys are the queries' own positions. Queries are processed in tiles, so no mask is larger than
    [QUERY_TILE, S].
    """
    count, total = queries.shape[2], keys.shape[2]
    tiles = []
    for start in range(0, count, QUERY_TILE):
        stop = min(start + QUERY_TILE, count)
        last = total - count + stop
        first = max(0, total - count + start - window + 1) if window else 0
        seen = keys[:, :, first:last], values[:, :, first:last]
        if last - first > KEY_TILE and not window:
            tiles.append(_tiled(queries[:, :, start:stop], *seen, unseen=stop - start))
            continue
        mask = _causal_mask(stop - start, last - first, window)
        tiles.append(mx.fast.scaled_dot_product_attention(queries[:, :, start:stop], *seen, mask=mask, scale=1.0))
    return mx.concatenate(tiles, axis=2) if len(tiles) > 1 else tiles[0]


def _causal_mask(count: int, total: int, window: int | None) -> mx.array | None:
    """The mask [count, total] of ``count`` queries at the end of ``total`` keys; None if nothing is masked."""
    if count == 1:
        return None
    queries = mx.arange(total - count, total)[:, None]
    keys = mx.arange(total)[None, :]
    seen = keys <= queries
    return seen & (keys > queries - window) if window else seen


def _tiled(queries: mx.array, keys: mx.array, values: mx.array, *, unseen: int) -> mx.array:
    """Softmax over KEY_TILE keys at a time, in float32, with the largest score and the sum of weights so far.

    Queries see all keys if ``unseen`` is 0. Otherwise ``unseen`` is the number of queries, the last keys are their own
    positions, and no query sees past its own.
    """
    (rows, heads, count, size), (_, shared, total, _) = queries.shape, keys.shape
    grouped = queries.astype(mx.float32).reshape(rows, shared, -1, size)  # [B, K, H / K * N, D]
    places = mx.tile(mx.arange(total - count, total), heads // shared)[:, None]
    most, weight, mixed = mx.array(-mx.inf), mx.array(0.0), mx.array(0.0)
    for start in range(0, total, KEY_TILE):
        stop = min(start + KEY_TILE, total)
        tile_keys, tile_values = keys[:, :, start:stop].astype(mx.float32), values[:, :, start:stop].astype(mx.float32)
        scores = grouped @ tile_keys.swapaxes(-1, -2)
        if stop > total - unseen:
            scores = mx.where(mx.arange(start, stop)[None, :] <= places, scores, -mx.inf)
        highest = mx.maximum(most, scores.max(axis=-1, keepdims=True))
        weights, kept = mx.exp(scores - highest), mx.exp(most - highest)
        weight = weight * kept + weights.sum(axis=-1, keepdims=True)
        mixed, most = mixed * kept + weights @ tile_values, highest
        mx.eval(mixed, weight, most)  # lazy evaluation would hold the scores of many tiles at once
    return (mixed / weight).reshape(rows, heads, count, size).astype(queries.dtype)
