"""Three Metal kernels in place of many operations: the statistics of a step, the router's choice, and the sum over the experts.

Each function here has the same formula twice: as MLX's own operations, which run everywhere, and as a Metal kernel, which reads
its input once. On a Mac, :func:`check` compares the two when a model is loaded. A kernel that does not compile there, or that
differs, is left out, so that no answer depends on it. T tokens, V vocabulary, E experts, K of them for a token, H hidden size.
"""

import logging
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_diffgemma.backends.mlx import fused
from mlx_diffgemma.backends.mlx.noise import gumbel, words

_log = logging.getLogger(__name__)

#: The kernels in use, and the type of the activations. Empty, except on Metal after :func:`check`.
enabled: set[tuple[str, mx.Dtype]] = set()

#: Threads of a threadgroup of the statistics, and of a SIMD group.
THREADS, LANES = 1024, 32


class Statistics(NamedTuple):
    """What one reading of the logits gives, for tempered logits s [T, V].

    Attributes:
        argmax, sampled: int32 [T], the arguments of the largest s, and of the largest s + noise.
        entropy: float32 [T], nats.
        most, total: float32 [T], the largest of the s after rounding to the weights' type, and the sum of exp(rounded s - most).
        weights: exp(s - most) [T, V] where nothing is rounded and they are at hand, or None.
    """

    argmax: mx.array
    sampled: mx.array
    entropy: mx.array
    most: mx.array
    total: mx.array
    weights: mx.array | None = None

    def probabilities(self, raw: mx.array | None, cap: mx.array, temperature: mx.array) -> mx.array:
        """The softmax [T, V] of the rounded s, in the type of ``raw``.

        The arguments are those of :func:`statistics`; ``raw`` may be None if ``weights`` is not.
        """
        if self.weights is not None:
            return self.weights / self.total[:, None]
        assert raw is not None
        return fused.probabilities(raw, cap, temperature, self.most, self.total)


#: A thread goes over every 1,024th token. It keeps the largest score, and the sums of exp(s - largest) and of its product with
#: s - largest, which it rescales when a larger score comes (the online softmax: Milakov and Gimelshein, arXiv 1805.02867).
STATISTICS = """
uint row = threadgroup_position_in_grid.x;
uint thread_index = thread_position_in_threadgroup.x;
uint lane = thread_index_in_simdgroup;
uint group = simdgroup_index_in_threadgroup;
float scale = cap[0] / temperature[row];
float best = -INFINITY, best_noisy = -INFINITY, best_rounded = -INFINITY;
uint at = 0xFFFFFFFF, at_noisy = 0xFFFFFFFF;
float sum = 0, product = 0, sum_rounded = 0;
for (uint v = thread_index; v < V; v += THREADS) {
    float s = metal::precise::tanh(float(raw[row * V + v]) / cap[0]) * scale;
    if (at == 0xFFFFFFFF) {
        best = s;
        at = v;
    } else if (s > best) {
        float kept = metal::precise::exp(best - s);
        product = (product + (best - s) * sum) * kept;
        sum = sum * kept;
        best = s;
        at = v;
    }
    float weight = metal::precise::exp(s - best);
    sum += weight;
    product += (s - best) * weight;
    float rounded = float(T(s));
    if (rounded > best_rounded) {
        sum_rounded = sum_rounded * metal::precise::exp(best_rounded - rounded);
        best_rounded = rounded;
    }
    sum_rounded += metal::precise::exp(rounded - best_rounded);
    if (DRAWS) {
        uint word = v ^ noise[row];
        word = (word ^ (word >> 16)) * 0x7FEB352D;
        word = (word ^ (word >> 15)) * 0x846CA68B;
        word = word ^ (word >> 16);
        float uniform = float(word) * 2.3283064365386963e-10f + 1.1641532182693481e-10f;
        float noisy = s - metal::precise::log(-log1p(-uniform));
        if (noisy > best_noisy || at_noisy == 0xFFFFFFFF) {
            best_noisy = noisy;
            at_noisy = v;
        }
    }
}
threadgroup float bests[32], sums[32], products[32], bests_rounded[32], sums_rounded[32], bests_noisy[32];
threadgroup uint ats[32], ats_noisy[32];
for (uint turn = 0; turn < 2; turn++) {
    float most = simd_max(best);
    float shift = at == 0xFFFFFFFF ? 0 : best - most;
    float kept = at == 0xFFFFFFFF ? 0 : metal::precise::exp(shift);
    product = simd_sum((product + shift * sum) * kept);
    sum = simd_sum(sum * kept);
    at = simd_min(best == most ? at : 0xFFFFFFFF);
    best = most;
    most = simd_max(best_rounded);
    sum_rounded = simd_sum(best_rounded == -INFINITY ? 0 : sum_rounded * metal::precise::exp(best_rounded - most));
    best_rounded = most;
    most = simd_max(best_noisy);
    at_noisy = simd_min(best_noisy == most ? at_noisy : 0xFFFFFFFF);
    best_noisy = most;
    if (turn == 0) {
        if (lane == 0) {
            bests[group] = best;
            ats[group] = at;
            sums[group] = sum;
            products[group] = product;
            bests_rounded[group] = best_rounded;
            sums_rounded[group] = sum_rounded;
            bests_noisy[group] = best_noisy;
            ats_noisy[group] = at_noisy;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        best = bests[lane];
        at = ats[lane];
        sum = sums[lane];
        product = products[lane];
        best_rounded = bests_rounded[lane];
        sum_rounded = sums_rounded[lane];
        best_noisy = bests_noisy[lane];
        at_noisy = ats_noisy[lane];
    }
}
if (thread_index == 0) {
    argmax[row] = int(at);
    sampled[row] = DRAWS ? int(at_noisy) : int(at);
    entropy[row] = metal::precise::log(sum) - product / sum;
    largest[row] = best_rounded;
    total[row] = sum_rounded;
}
"""

#: A SIMD group takes a token: each lane holds every 32nd expert, and the largest probability is taken K times.
ROUTE = """
uint token = threadgroup_position_in_grid.x;
uint lane = thread_index_in_simdgroup;
float probability[(E + 31) / 32];
float most = -INFINITY;
for (uint i = 0; i < (E + 31) / 32; i++) {
    uint expert = lane + 32 * i;
    probability[i] = expert < E ? float(scores[token * E + expert]) : -INFINITY;
    most = max(most, probability[i]);
}
most = simd_max(most);
float all = 0;
for (uint i = 0; i < (E + 31) / 32; i++) {
    probability[i] = metal::precise::exp(probability[i] - most);
    all += probability[i];
}
all = simd_sum(all);
float chosen_sum = 0, own = 0;
uint own_expert = 0;
for (uint k = 0; k < K; k++) {
    float best = -1;
    uint at = 0xFFFFFFFF;
    for (uint i = 0; i < (E + 31) / 32; i++) {
        if (lane + 32 * i < E && probability[i] > best) {
            best = probability[i];
            at = lane + 32 * i;
        }
    }
    float largest = simd_max(best);
    uint expert = simd_min(best == largest ? at : 0xFFFFFFFF);
    for (uint i = 0; i < (E + 31) / 32; i++) {
        if (lane + 32 * i == expert) {
            probability[i] = -1;
        }
    }
    chosen_sum += largest / all;
    if (lane == k) {
        own = largest / all;
        own_expert = expert;
    }
}
if (lane < K) {
    experts[token * K + lane] = own_expert;
    weights[token * K + lane] = own / chosen_sum * float(scales[own_expert]);
}
"""

COMBINE = """
uint column = thread_position_in_grid.x;
uint token = thread_position_in_grid.y;
float sum = 0;
for (uint k = 0; k < K; k++) {
    sum += float(y[places[token * K + k] * H + column]) * weights[token * K + k];
}
out[token * H + column] = T(sum);
"""


def statistics(raw: mx.array, noise: mx.array | None, cap: mx.array, temperature: mx.array) -> Statistics:
    """The statistics of cap * tanh(raw / cap) / temperature.

    Args:
        raw: [T, V], the head's output before the softcap, in the weights' type.
        noise: uint32 [T], the noise bits of each position; None to draw nothing.
        cap: float32 [1].
        temperature: float32 [T].
    """
    if _use("statistics", raw):
        return _statistics_kernel(raw, noise, cap, temperature)
    scores = fused.tempered(raw, cap, temperature)
    argmax = scores.argmax(axis=-1)[:, None]
    most = mx.take_along_axis(scores, argmax, axis=-1)
    sampled = argmax[:, 0] if noise is None else _perturbed(scores, noise).argmax(axis=-1)
    weights, products = fused.exponentials(scores, most)
    total = last_sum(weights)
    entropy = mx.log(total) - last_sum(products) / total
    found = argmax[:, 0].astype(mx.int32), sampled.astype(mx.int32), entropy
    if raw.dtype == mx.float32:
        return Statistics(*found, most[:, 0], total, weights)
    most, weights = fused.rounded_exponentials(scores, most, mx.zeros((), raw.dtype))
    return Statistics(*found, most[:, 0], last_sum(weights))


def route(scores: mx.array, scales: mx.array, top_k: int) -> tuple[mx.array, mx.array]:
    """A token's experts uint32 [T, K], the most probable ones, and their weights float32 [T, K].

    Args:
        scores: [T, E].
        scales: [E], factors of the experts' weights.
    """
    if top_k <= LANES and _use("route", scores):
        return _route_kernel(scores, scales, top_k)
    probabilities = mx.softmax(scores.astype(mx.float32), axis=-1)
    experts = mx.argpartition(probabilities, -top_k, axis=-1)[:, -top_k:]
    chosen = mx.take_along_axis(probabilities, experts, axis=-1)
    return experts, fused.normalized(chosen, scales[experts])


def combine(y: mx.array, places: mx.array, weights: mx.array) -> mx.array:
    """The sum [T, H] of each token's rows of y [T * K, H], which are at ``places`` uint32 [T * K], by weights float32 [T, K]."""
    if _use("combine", y):
        return _combine_kernel(y, places, weights)
    return fused.weighted_sum(y[places].reshape(*weights.shape, -1), weights)


def last_sum(x: mx.array) -> mx.array:
    """Sum over the last axis in two levels. One plain float32 pass over 262,144 terms is off by more than 1e-3 nats."""
    size = x.shape[-1]
    inner = 512 if size >= 512 else 1
    if size % inner:
        x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -size % inner)])
    return x.reshape(*x.shape[:-1], -1, inner).sum(axis=-1).sum(axis=-1)


def _use(name: str, activations: mx.array) -> bool:
    return (name, activations.dtype) in enabled and on_metal()


def on_metal() -> bool:
    """Whether operations run on Metal here."""
    return mx.metal.is_available() and mx.default_device() == mx.Device(mx.DeviceType.gpu)


@mx.compile
def _perturbed(scores: mx.array, noise: mx.array) -> mx.array:
    """Scores float32 [T, V] plus Gumbel noise."""
    return scores + gumbel(words(noise, scores.shape[-1]))


@cache
def _kernel(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str) -> Any:
    return mx.fast.metal_kernel(name=f"diffgemma_{name}", input_names=inputs, output_names=outputs, source=source)


def _statistics_kernel(raw: mx.array, noise: mx.array | None, cap: mx.array, temperature: mx.array) -> Statistics:
    count, size = raw.shape
    kernel = _kernel(
        "statistics",
        ("raw", "noise", "cap", "temperature"),
        ("argmax", "sampled", "entropy", "largest", "total"),
        STATISTICS,
    )
    results = kernel(
        inputs=[raw, mx.zeros((count,), mx.uint32) if noise is None else noise, cap, temperature],
        template=[("T", raw.dtype), ("V", size), ("THREADS", THREADS), ("DRAWS", noise is not None)],
        grid=(count * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(count,)] * 5,
        output_dtypes=[mx.int32, mx.int32, mx.float32, mx.float32, mx.float32],
    )
    return Statistics(*results)


def _route_kernel(scores: mx.array, scales: mx.array, top_k: int) -> tuple[mx.array, mx.array]:
    count, experts = scores.shape
    chosen, weights = _kernel("route", ("scores", "scales"), ("experts", "weights"), ROUTE)(
        inputs=[scores, scales],
        template=[("E", experts), ("K", top_k)],
        grid=(count * LANES, 1, 1),
        threadgroup=(LANES, 1, 1),
        output_shapes=[(count, top_k)] * 2,
        output_dtypes=[mx.uint32, mx.float32],
    )
    return chosen, weights


def _combine_kernel(y: mx.array, places: mx.array, weights: mx.array) -> mx.array:
    (count, top_k), size = weights.shape, y.shape[-1]
    [out] = _kernel("combine", ("y", "places", "weights"), ("out",), COMBINE)(
        inputs=[y, places, weights],
        template=[("T", y.dtype), ("K", top_k), ("H", size)],
        grid=(size, count, 1),
        threadgroup=(min(size, 256), 1, 1),
        output_shapes=[(count, size)],
        output_dtypes=[y.dtype],
    )
    return out


def check(dtype: mx.Dtype) -> dict[str, str]:
    """On Metal, enable the kernels that compile and agree with MLX's own operations on random numbers of this type.

    Returns why each of the others is left out.
    """
    left_out: dict[str, str] = {}
    if not on_metal():
        return left_out
    before = {(name, other) for name, other in enabled if other != dtype}
    enabled.clear()  # else a kernel would be compared with itself
    for name, differs in (("statistics", _statistics_differ), ("route", _routes_differ), ("combine", _sums_differ)):
        try:
            difference = differs(dtype)
        except Exception as error:  # noqa: BLE001 (a compiler's complaint has no type of its own)
            difference = f"{type(error).__name__}: {error}"
        if difference:
            left_out[name] = difference
            _log.warning("the Metal kernel %r is not used on this machine: %s", name, difference)
        else:
            before.add((name, dtype))
    enabled.update(before)
    return left_out


def _statistics_differ(dtype: mx.Dtype) -> str:
    """What differs, or nothing. Two positions in a hundred may draw another token, where the noise is nearly a tie."""
    size, count = 5_000, 64
    raw = (mx.random.normal((count, size), key=mx.random.key(1)) * 8).astype(dtype)
    given = mx.arange(count, dtype=mx.uint32) * 77, mx.array([30.0]), mx.linspace(0.4, 0.8, count)
    plain, found = statistics(raw, *given), _statistics_kernel(raw, *given)
    wrong = float((plain.argmax != found.argmax).sum()), float((plain.sampled != found.sampled).sum())
    if wrong[0] or wrong[1] > count / 50:
        return f"{wrong[0]:.0f} argmaxes and {wrong[1]:.0f} samples of {count} differ"
    for name in ("entropy", "most", "total"):
        one, other = getattr(plain, name), getattr(found, name)
        difference = float((mx.abs(one - other) / (1 + mx.abs(one))).max())
        if not difference < 1e-4:
            return f"{name} differs by {difference:.1e}"
    return ""


def _routes_differ(dtype: mx.Dtype) -> str:
    count, experts, top_k = 65, 128, 8
    order = mx.argsort(mx.random.uniform(shape=(count, experts), key=mx.random.key(2)), axis=1)
    scores = ((order.astype(mx.float32) - 64) / 16).astype(dtype)  # exact in bfloat16, without ties
    scales = mx.linspace(0.5, 2.0, experts).astype(dtype)

    def spread(chosen: mx.array, weights: mx.array) -> mx.array:
        return mx.put_along_axis(mx.zeros((count, experts)), chosen.astype(mx.uint32), weights, axis=1)

    difference = float(mx.abs(spread(*route(scores, scales, top_k)) - spread(*_route_kernel(scores, scales, top_k))).max())
    return "" if difference < 1e-5 else f"weights differ by {difference:.1e}"


def _sums_differ(dtype: mx.Dtype) -> str:
    count, top_k, size = 33, 8, 300
    y = mx.random.normal((count * top_k, size), key=mx.random.key(3)).astype(dtype)
    places = mx.argsort(mx.random.uniform(shape=(count * top_k,), key=mx.random.key(4)))
    weights = mx.random.uniform(shape=(count, top_k), key=mx.random.key(5))
    difference = float(mx.abs(combine(y, places, weights).astype(mx.float32) - _combine_kernel(y, places, weights)).max())
    return "" if difference < (1e-5 if dtype == mx.float32 else 0.05) else f"sums differ by {difference:.1e}"
