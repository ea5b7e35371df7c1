"""Attention in tiles, with every implementation, against the plain formula in float64."""

import importlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mlx_diffgemma.backends import KEY_TILE, QUERY_TILE
from support.comparing import assert_close
from support.long_context import array_of

HEADS, SHARED, SIZE = 4, 2, 8


def random(count: int, total: int) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Queries, keys and values [1, heads, N or S, D]; scores are of a few units."""
    draw = np.random.default_rng(count + total)
    shapes = (HEADS, count), (SHARED, total), (SHARED, total)
    queries, keys, values = (draw.standard_normal((1, *shape, SIZE), np.float32) for shape in shapes)
    return queries, keys, values


def plain(queries: Any, keys: Any, values: Any, seen: Any) -> NDArray[np.float64]:
    """Softmax over the scores that ``seen`` [N, S] allows."""
    wide = [np.repeat(each.astype(np.float64), HEADS // SHARED, axis=1) for each in (keys, values)]
    scores = np.where(seen, queries.astype(np.float64) @ wide[0].swapaxes(-1, -2), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed: NDArray[np.float64] = weights @ wide[1] / weights.sum(axis=-1, keepdims=True)
    return mixed


def run(backend_name: str, function: str, arrays: Any, *arguments: Any) -> NDArray[np.float64]:
    module = importlib.import_module(f"mlx_diffgemma.backends.{backend_name}.attention")
    return np.array(getattr(module, function)(*(array_of(backend_name, each) for each in arrays), *arguments).tolist())


@pytest.mark.parametrize("total", [1, 40, KEY_TILE, KEY_TILE + 1, 2 * KEY_TILE + 77])
def test_a_canvas_sees_everything(backend_name: str, total: int) -> None:
    arrays = random(min(total, 9), total)
    expected = plain(*arrays, np.ones((1, total), bool))
    assert_close(run(backend_name, "bidirectional", arrays), expected, 1e-4, f"{backend_name}, {total} keys")


@pytest.mark.parametrize("window", [None, 3, 300])
@pytest.mark.parametrize(
    ("count", "total"),
    [
        (1, 1),
        (1, 50),
        (7, 7),
        (QUERY_TILE + 5, QUERY_TILE + 5),
        (2 * QUERY_TILE + 1, 900),
        (5, KEY_TILE + 3),
        (300, 2 * KEY_TILE),
    ],
)
def test_a_position_sees_those_before_it(backend_name: str, count: int, total: int, window: int | None) -> None:
    arrays = random(count, total)
    if window and total > count + window - 1:  # the cache returns only the keys from the first that the first query sees
        arrays = (arrays[0], *(each[:, :, total - (count + window - 1) :] for each in arrays[1:]))
        total = count + window - 1
    places, keys = np.arange(total - count, total)[:, None], np.arange(total)[None]
    seen = (keys <= places) & (keys > places - (window or total + 1))
    found = run(backend_name, "causal", arrays, window)
    assert_close(found, plain(*arrays, seen), 1e-4, f"{backend_name}, {count} of {total}, window {window}")


def test_tiles_in_bfloat16() -> None:
    """On a GPU, tiles of scores and weights are in the activations' type, and what is added up is in float32."""
    mx = pytest.importorskip("mlx.core")
    from mlx_diffgemma.backends.mlx import attention

    queries, keys, values = (array_of("mlx", each).astype(mx.bfloat16) for each in random(9, 2 * KEY_TILE + 77))
    exact = plain(*(np.array(each.astype(mx.float32)) for each in (queries, keys, values)), np.ones((1, keys.shape[2]), bool))
    whole = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0)  # in one piece, in bfloat16
    tiled, piece = (
        np.abs(np.array(each.astype(mx.float32)) - exact).mean()
        for each in (attention.bidirectional(queries, keys, values), whole)
    )
    print(f"mean error {tiled:.1e} in tiles, {piece:.1e} in one piece")
    assert tiled < 1.2 * piece


#: Images among 700 queries: at the start, across ends of tiles, longer than a tile, of one token, at the end.
IMAGES = ((0, 3), (5, 6), (QUERY_TILE - 2, QUERY_TILE + 1), (300, 300 + QUERY_TILE + 20), (590, 600), (640, 700))


@pytest.mark.parametrize(
    ("before", "window", "reach"),
    [
        *((0, None, reach) for reach in (1, 2, 9, 300, 2**24)),
        *((8, 9, reach) for reach in (1, 2, 9, 300, 2**24)),
        *((before, 300, reach) for before in (20, 299) for reach in (300, 2**24)),
        *((before, None, 2**24) for before in (20, KEY_TILE - 100, KEY_TILE + 1)),
    ],
)
def test_positions_of_one_image_see_each_other(backend_name: str, before: int, window: int | None, reach: int) -> None:
    count = 700
    arrays = random(count, before + count)
    places, keys = np.arange(before, before + count)[:, None], np.arange(before + count)[None]
    image = np.full(before + count, -1)
    for index, (start, stop) in enumerate(IMAGES):
        image[before + start : before + stop] = index
    seen = (keys <= places) & (keys > places - (window or before + count))
    seen |= (image[places] == image[keys]) & (image[keys] >= 0) & (abs(places - keys) < reach)
    found = run(backend_name, "causal", arrays, window, IMAGES, reach)
    expected = plain(*arrays, seen)
    assert_close(found, expected, 1e-4, f"{backend_name}, {before} before, window {window}, reach {reach}")
    text = run(backend_name, "causal", arrays, window)
    assert (np.abs(text - expected).max() > 0.1) == (reach > 1), "images change nothing, or too much"
    outside = np.array([not any(start <= place < stop for start, stop in IMAGES) for place in range(count)])
    assert_close(text[:, :, outside], expected[:, :, outside], 1e-4, "queries outside images")


@pytest.mark.parametrize(("count", "total"), [(QUERY_TILE, 600), (QUERY_TILE + 1, 600), (2 * QUERY_TILE + 5, KEY_TILE + 50)])
def test_many_queries_see_everything(backend_name: str, count: int, total: int) -> None:
    arrays = random(count, total)
    expected = plain(*arrays, np.ones((1, total), bool))
    assert_close(run(backend_name, "bidirectional", arrays), expected, 1e-4, f"{backend_name}, {count} over {total}")


@pytest.mark.parametrize("masked", [False, True])
def test_the_way_on_cuda_is_the_same(masked: bool) -> None:
    """PyTorch's attention by groups, which CUDA needs, tested on the CPU."""
    arrays = random(6, 20)
    seen = np.arange(20)[None] <= np.arange(14, 20)[:, None] if masked else np.ones((6, 20), bool)
    mask = array_of("torch", seen) if masked else None
    assert_close(run("torch", "by_groups", arrays, mask), plain(*arrays, seen), 1e-5, "by groups")
