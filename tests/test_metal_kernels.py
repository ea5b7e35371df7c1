"""The Metal kernels' source, run as C++ on the CPU, against MLX's own operations. How it runs on a Mac, nobody has seen here."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import metal
from support.comparing import assert_close

mx = pytest.importorskip("mlx.core")
kernels = pytest.importorskip("mlx_diffgemma.backends.mlx.kernels")

pytestmark = pytest.mark.skipif(metal.COMPILER is None, reason="no C++ compiler here")


def numbers(array: Any) -> Any:
    """An mx.array as the shim takes it: bfloat16 as its bits."""
    return np.array(array.view(mx.uint16)) if array.dtype == mx.bfloat16 else np.array(array)


def name_of(dtype: Any) -> str:
    return "bfloat16" if dtype == mx.bfloat16 else "float32"


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=name_of)
@pytest.mark.parametrize(("size", "draws", "scale"), [(5_003, True, 8), (40, True, 2), (1_100, False, 60), (3_000, True, 0)])
def test_statistics(tmp_path: Path, dtype: Any, size: int, draws: bool, scale: float) -> None:
    """Sizes below and above one round of the threads; scores that saturate the softcap; all equal, where the first counts."""
    count, threads = 3, 256
    raw = (mx.random.normal((count, size), key=mx.random.key(size)) * scale).astype(dtype)
    noise = mx.arange(1, count + 1, dtype=mx.uint32) * 123_456_789
    cap, temperature = mx.array([30.0]), mx.array([0.4, 0.8, 1.3])
    expected = kernels.statistics(raw, noise if draws else None, cap, temperature)
    found = metal.run(
        tmp_path,
        kernels.STATISTICS,
        {name: numbers(array) for name, array in (("raw", raw), ("noise", noise), ("cap", cap), ("temperature", temperature))},
        {"argmax": ((count,), "int32"), "sampled": ((count,), "int32")}
        | {name: ((count,), "float32") for name in ("entropy", "largest", "total")},
        {"T": name_of(dtype), "V": size, "THREADS": threads, "DRAWS": draws},
        (count * threads, 1),
        threads,
    )
    assert found["argmax"].tolist() == expected.argmax.tolist()
    assert found["sampled"].tolist() == expected.sampled.tolist()
    assert_close(found["entropy"], np.array(expected.entropy), 1e-5, "entropy in nats")
    assert_close(found["largest"], np.array(expected.most), 1e-5, "largest rounded score")
    assert_close(found["total"] / np.array(expected.total), np.ones(count), 1e-5, "sum of exponentials")


@pytest.mark.parametrize("experts", [8, 128, 130])
def test_route(tmp_path: Path, experts: int) -> None:
    count, top_k = 9, 8
    scores = mx.random.normal((count, experts), key=mx.random.key(experts)) * 3
    scales = mx.linspace(0.5, 2.0, experts).astype(mx.bfloat16)
    chosen, weights = kernels.route(scores, scales, top_k)
    found = metal.run(
        tmp_path,
        kernels.ROUTE,
        {"scores": numbers(scores), "scales": numbers(scales)},
        {"experts": ((count, top_k), "uint32"), "weights": ((count, top_k), "float32")},
        {"E": experts, "K": top_k},
        (count * kernels.LANES, 1),
        kernels.LANES,
    )
    spread = np.zeros((2, count, experts))
    np.put_along_axis(spread[0], np.array(chosen).astype(int), np.array(weights), axis=1)
    np.put_along_axis(spread[1], found["experts"].astype(int), found["weights"], axis=1)
    assert (np.count_nonzero(spread, axis=2) == top_k).all()
    assert_close(spread[1], spread[0], 1e-6, "weights of the experts")


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=name_of)
def test_combine(tmp_path: Path, dtype: Any) -> None:
    count, top_k, size = 5, 8, 70
    y = mx.random.normal((count * top_k, size), key=mx.random.key(1)).astype(dtype)
    places = mx.argsort(mx.random.uniform(shape=(count * top_k,), key=mx.random.key(2)))
    weights = mx.random.uniform(shape=(count, top_k), key=mx.random.key(3))
    [found] = metal.run(
        tmp_path,
        kernels.COMBINE,
        {"y": numbers(y), "places": numbers(places), "weights": numbers(weights)},
        {"out": ((count, size), name_of(dtype))},
        {"T": name_of(dtype), "K": top_k, "H": size},
        (size, count),
        size,
    ).values()
    plain = np.array(kernels.combine(y, places, weights).astype(mx.float32))
    found = np.array(mx.array(found).view(dtype).astype(mx.float32)) if dtype == mx.bfloat16 else found
    assert_close(found, plain, 1e-6 if dtype == mx.float32 else 0.02, "the sums")
    wide = np.array(y.astype(mx.float32))[np.array(places)].reshape(count, top_k, size)
    exact = np.einsum("tkh,tk->th", wide.astype(np.float64), np.array(weights, np.float64))
    assert_close(plain, exact, 1e-5 if dtype == mx.float32 else 0.02, "against float64")
