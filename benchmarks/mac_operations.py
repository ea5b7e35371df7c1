"""The parts of ``mac.py`` that time one operation each: sizes, timing, the Metal kernels, attention, rotation and products.

It says how to run them.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from sections import GROUP, WARMUP, Sizes, spread, tried

from mlx_diffgemma.backends import QUERY_TILE
from mlx_diffgemma.backends.mlx import attention, fused, kernels, products
from mlx_diffgemma.backends.mlx.model import Rope
from mlx_diffgemma.checkpoint import Quantization

TYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}


def device() -> str:
    """The device of everything that names no other: the GPU, if there is one."""
    return str(mx.default_device().type.name)


def model_type() -> str:
    """The number type of the model's activations there."""
    return "bfloat16" if device() == "gpu" else "float32"


def seconds(sizes: Sizes, compute: Callable[..., Any], first: mx.array, *others: Any) -> dict[str, float]:
    """Seconds of ``compute(first, *others)``. In a round, ``first`` waits for the result before it."""

    def run_round(count: int) -> float:
        mx.synchronize()
        started = time.perf_counter()
        result: Any = None
        for _ in range(count):
            result = compute(first if result is None else attention.in_turn(first, [_first(result)]), *others)
        mx.eval(result)
        mx.synchronize()
        return (time.perf_counter() - started) / count

    mx.eval(first, others)
    once = min(run_round(1) for _ in range(WARMUP))
    count = max(1, min(64, round(sizes.round_seconds / once)))
    run_round(count)
    return spread([run_round(count) for _ in range(sizes.repeats)])


def _first(result: Any) -> mx.array:
    return result if isinstance(result, mx.array) else _first(result[0])


def difference(one: mx.array, other: mx.array) -> float:
    """The largest difference."""
    largest: Any = mx.abs(one.astype(mx.float32) - other.astype(mx.float32)).max()
    return float(largest)


@contextmanager
def only_mlx() -> Iterator[None]:
    """Without our Metal kernels."""
    kept = set(kernels.enabled)
    kernels.enabled.clear()
    try:
        yield
    finally:
        kernels.enabled |= kept


def normal(*shape: int, dtype: str | None = None, scale: float = 1.0, seed: int = 0) -> mx.array:
    """Random normal numbers, in the type of the activations unless ``dtype`` is given."""
    return (mx.random.normal(shape, key=mx.random.key(seed)) * scale).astype(TYPES[dtype or model_type()])


def metal_kernels(sizes: Sizes) -> dict[str, Any]:
    """Each Metal kernel of ours against MLX's own operations, or why it is not used."""
    return {name: _kernels_of(sizes, name) for name in TYPES}


def _kernels_of(sizes: Sizes, dtype: str) -> dict[str, Any]:
    left_out = kernels.check(TYPES[dtype])
    canvas, pairs = sizes.canvas, sizes.canvas * sizes.top_k
    noise_bits = mx.arange(1, canvas + 1, dtype=mx.uint32) * 123_456_789
    places = mx.random.permutation(pairs, key=mx.random.key(1)).astype(mx.uint32)
    weights = mx.random.uniform(shape=(canvas, sizes.top_k), key=mx.random.key(2))
    raw, scores = normal(canvas, sizes.vocabulary, dtype=dtype, scale=8), normal(canvas, sizes.experts, dtype=dtype)
    calls: dict[str, tuple[Any, ...]] = {
        "statistics": (kernels.statistics, raw, noise_bits, mx.array([30.0]), mx.full((canvas,), 0.8)),
        "route": (kernels.route, scores, mx.ones((sizes.experts,), TYPES[dtype]), sizes.top_k),
        "combine": (kernels.combine, normal(pairs, sizes.hidden, dtype=dtype), places, weights),
    }
    found: dict[str, Any] = {"not_used": left_out if kernels.on_metal() else {"all": "there is no Metal here"}}
    for name, (function, *given) in calls.items():
        enabled = (name, TYPES[dtype]) in kernels.enabled
        with only_mlx():
            plain, expected = seconds(sizes, function, *given), function(*given)
            mx.eval(expected)
        found[name] = {"plain": plain, "kernel": None}
        if enabled:
            found[name] |= {"kernel": seconds(sizes, function, *given), **_compared(name, function(*given), expected)}
    return found


def _compared(name: str, found: Any, expected: Any) -> dict[str, float]:
    """How a kernel's results differ from those of MLX's operations."""
    if name == "statistics":
        different = {each: float((getattr(found, each) != getattr(expected, each)).sum()) for each in ("argmax", "sampled")}
        return {f"different_{each}": count for each, count in different.items()} | {
            f"{each}_difference": difference(getattr(found, each), getattr(expected, each)) for each in ("entropy", "most")
        }
    if name == "route":  # the order of a token's experts may differ
        return {"weights_difference": difference(mx.sort(found[1], axis=-1), mx.sort(expected[1], axis=-1))}
    return {"difference": difference(found, expected)}


def attentions(sizes: Sizes) -> dict[str, Any]:
    """Ours and MLX's fused attention: of a canvas over all keys, and in the causal pass."""
    found: dict[str, Any] = {"canvas": {}, "causal": {}}
    for shared, size in (sizes.sliding, sizes.full):
        for total in sizes.keys:
            given = _heads(sizes, sizes.canvas, total, shared, size)
            fused_attention = partial(mx.fast.scaled_dot_product_attention, scale=1.0)
            ways: dict[str, Callable[..., mx.array]] = {"ours": attention.bidirectional, "mlx": fused_attention}
            if "force_fused" in (mx.fast.scaled_dot_product_attention.__doc__ or ""):
                ways["mlx_force_fused"] = partial(fused_attention, force_fused=True)
            found["canvas"][f"{shared} heads of {size}, {total} keys"] = _ways(sizes, ways, given)
        for total in sizes.pass_keys:
            given = _heads(sizes, sizes.pass_length, total, shared, size)
            ways = {
                "ours": partial(attention.causal, window=None),
                "tiles": _tiles,
                "mlx": partial(mx.fast.scaled_dot_product_attention, mask="causal", scale=1.0),
            }
            found["causal"][f"{shared} heads of {size}, {total} keys"] = _ways(sizes, ways, given)
    return found


def _heads(sizes: Sizes, count: int, total: int, shared: int, size: int) -> tuple[mx.array, mx.array, mx.array]:
    """Queries, keys and values whose scores deviate by 1."""
    queries = normal(1, sizes.heads, count, size, scale=size**-0.25, seed=1)
    return queries, normal(1, shared, total, size, scale=size**-0.25, seed=2), normal(1, shared, total, size, seed=3)


def _tiles(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """The causal pass in our tiles of queries, each with its mask, whatever attention.causal prefers at this length."""
    count, tiles = queries.shape[2], list[mx.array]()
    for start in range(0, count, QUERY_TILE):
        tile = attention.in_turn(queries[:, :, start : start + QUERY_TILE], tiles)
        end = keys.shape[2] - count + start + tile.shape[2]
        tiles.append(attention.causal(tile, keys[:, :, :end], values[:, :, :end], None))
    return mx.concatenate(tiles, axis=2)


def _ways(sizes: Sizes, ways: dict[str, Callable[..., mx.array]], given: tuple[mx.array, ...]) -> dict[str, Any]:
    """Seconds of several ways to the same result, and how far each of the others is from ours."""
    expected = ways["ours"](*given)
    mx.eval(expected)

    def measure(way: Callable[..., mx.array]) -> dict[str, Any]:
        return {"seconds": seconds(sizes, way, *given), "difference": difference(way(*given), expected)}

    found = {name: tried(partial(measure, way)) for name, way in ways.items()}
    found["ours"].pop("difference", None)
    return found


def rotations(sizes: Sizes) -> dict[str, Any]:
    """Our rotation of queries and keys, which also multiplies by the norms' weights, and MLX's."""
    layer, start = sizes.config(1).layers[0], 1_000
    heads, size = sizes.heads + 2 * sizes.sliding[0], layer.head_dim
    x = normal(sizes.canvas, heads, size)
    tables = Rope(layer).tables(mx.arange(start, start + sizes.canvas, dtype=mx.float32), x.dtype)
    weights, is_value = mx.ones((heads, 2, size // 2), x.dtype), mx.zeros((heads, 1, 1), mx.bool_)
    periods = 1 / mx.array(layer.rope.inverse_frequencies(size), dtype=mx.float32)

    def ours(x: mx.array) -> mx.array:
        halves = x.reshape(*x.shape[:2], 2, -1)
        return fused.rotate(halves, halves[:, :, ::-1], weights, weights, *tables, is_value).reshape(x.shape)

    def theirs(x: mx.array) -> mx.array:
        turned = mx.fast.rope(x.swapaxes(0, 1), size, traditional=False, base=None, scale=1.0, offset=start, freqs=periods)
        return turned.swapaxes(0, 1)

    return _ways(sizes, {"ours": ours, "mlx": theirs}, (x,))


def packed(*shape: int, bits: int, seed: int = 0) -> tuple[mx.array, mx.array, mx.array, Quantization]:
    """A random packed weight [.., out, in] that keeps the deviation of its input."""
    *rows, size = shape
    scale = (12 / size) ** 0.5 / (2**bits - 1)
    words = mx.array(np.random.default_rng(seed).integers(0, 2**32, (*rows, size * bits // 32), np.uint32))
    groups = (*rows, size // GROUP)
    scales = mx.full(groups, scale, mx.bfloat16), mx.full(groups, -scale * (2**bits - 1) / 2, mx.bfloat16)
    return words, *scales, Quantization(GROUP, bits)


def matrix_products(sizes: Sizes) -> dict[str, Any]:
    """Products with packed weights at the model's sizes."""
    found: dict[str, Any] = {}
    hidden, canvas = sizes.hidden, sizes.canvas
    pairs = canvas * sizes.top_k
    experts = mx.sort(mx.random.randint(0, sizes.experts, (pairs,), key=mx.random.key(4))).astype(mx.uint32)
    for rows, size in ((2 * sizes.expert_inner, hidden), (hidden, sizes.expert_inner)):
        weight = packed(sizes.experts, rows, size, bits=4)
        x = normal(pairs, 1, size)
        found[f"experts, 4 bits [{rows}, {size}]"] = _rate(sizes, products.expert_linear, x, experts, weights=[weight])
    x = normal(canvas, hidden)
    shared = sizes.sliding[0] * sizes.sliding[1]
    for parts in ((sizes.heads * sizes.sliding[1], shared, shared), (sizes.inner, sizes.inner)):
        label = f"8 bits [{sum(parts)}, {hidden}]"
        apart = [packed(rows, hidden, bits=8) for rows in parts]
        joined = packed(sum(parts), hidden, bits=8)
        found[f"joined, {label}"] = _rate(sizes, products.linear, x, weights=[joined])
        found[f"in {len(parts)} parts, {label}"] = _rate(sizes, products.linear, x, weights=apart)
    head = packed(sizes.vocabulary, hidden, bits=8)
    found[f"output head, 8 bits [{sizes.vocabulary}, {hidden}]"] = _rate(sizes, products.linear, x, weights=[head])
    y = mx.softmax(normal(canvas, sizes.vocabulary, scale=6), axis=-1)
    found[f"mean embeddings, 8 bits [{sizes.vocabulary}, {hidden}]"] = _rate(sizes, products.weighted_rows, y, weights=[head])
    return found


def _rate(
    sizes: Sizes, product: Callable[..., mx.array], x: mx.array, *others: mx.array, weights: Sequence[Any]
) -> dict[str, Any]:
    """Seconds, GB/s and TFLOP/s of the products of x [M, .., in] with each of the packed weights. Each weight is read once."""

    def compute(x: mx.array) -> list[mx.array]:
        return [product(x, *others, *weight) for weight in weights]

    mx.eval([list(weight[:3]) for weight in weights])
    taken, outputs = seconds(sizes, compute, x), compute(x)
    nbytes = sum(array.nbytes for weight in weights for array in weight[:3]) + x.nbytes + sum(each.nbytes for each in outputs)
    widths = [weight[0].shape[-2] * weight[0].shape[-1] * 32 // weight[3].bits for weight in weights]
    operations = 2 * len(x) * sum(widths)
    rates = {"gb_per_second": nbytes / taken["median"] / 1e9, "tflops": operations / taken["median"] / 1e12}
    return {"seconds": taken, **rates}
