"""Elementwise formulas that MLX makes into one GPU kernel each (``mx.compile``), and the kernel that sums a token's experts.

On a CPU, MLX runs the same primitives one by one: values do not depend on what is fused. T tokens, H hidden size, D head size,
V vocabulary. A number that changes between steps is an array here, since a Python number would be compiled in.
"""

import mlx.core as mx
from mlx import nn


@mx.compile
def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) * up, with the tanh approximation of gelu."""
    return nn.gelu_approx(gate) * up


@mx.compile
def rotate(
    x: mx.array,
    swapped: mx.array,
    weights: mx.array,
    swapped_weights: mx.array,
    cos: mx.array,
    sin: mx.array,
    is_value: mx.array,
) -> mx.array:
    """Normalized heads times their norms' weights, and rotated unless they are values.

    Args:
        x: [T, heads, 2, D / 2], the two halves of each head. The pairs of a rotation are (i, i + D / 2).
        swapped: the same with the halves swapped.
        weights, swapped_weights: [heads, 2, D / 2], those of ``x`` and of ``swapped``.
        cos, sin: [T, 1, 1 or 2, D / 2]; the first half of ``sin`` is negative.
        is_value: bool [heads, 1, 1].
    """
    own = x * weights
    return mx.where(is_value, own, own * cos + swapped * swapped_weights * sin)


@mx.compile
def three_inputs(x: mx.array, weights: mx.array, factors: mx.array) -> mx.array:
    """x [T, H] times each of ``weights`` [3, 1, H], and then of ``factors`` [3, 1, 1] -> [3, T, H]."""
    return x * weights * factors


@mx.compile
def scaled_sum(x: mx.array, y: mx.array, factor: mx.array) -> mx.array:
    """(x + y) * factor."""
    return (x + y) * factor


@mx.compile
def normalized(chosen: mx.array, scales: mx.array) -> mx.array:
    """The weights [T, K] of a token's experts: probabilities ``chosen`` made to sum to 1, times the experts' ``scales``."""
    parts = [chosen[:, index : index + 1] for index in range(chosen.shape[1])]
    return chosen / sum(parts[1:], parts[0]) * scales


@mx.compile
def weighted_sum(y: mx.array, weights: mx.array) -> mx.array:
    """The sum of y [T, K, H] over K with weights float32 [T, K], in float32, in y's type."""
    parts = [y[:, index] * weights[:, index, None] for index in range(y.shape[1])]
    return sum(parts[1:], parts[0]).astype(y.dtype)


@mx.compile
def tempered(raw: mx.array, cap: mx.array, temperature: mx.array) -> mx.array:
    """cap * tanh(raw / cap) / temperature, float32 [T, V]; temperature float32 [T]."""
    return mx.tanh(raw.astype(mx.float32) / cap) * (cap / temperature)[:, None]


@mx.compile
def exponentials(scores: mx.array, most: mx.array) -> tuple[mx.array, mx.array]:
    """exp(scores - most), and that times (scores - most); most [T, 1]."""
    shifted = scores - most
    weights = mx.exp(shifted)
    return weights, shifted * weights


@mx.compile
def rounded_exponentials(scores: mx.array, most: mx.array, like: mx.array) -> tuple[mx.array, mx.array]:
    """``most`` [T, 1] and the scores rounded to the type of ``like``: the former, and exp(scores - most), in float32."""
    highest = most.astype(like.dtype).astype(mx.float32)
    return highest, mx.exp(scores.astype(like.dtype).astype(mx.float32) - highest)


@mx.compile
def probabilities(raw: mx.array, cap: mx.array, temperature: mx.array, most: mx.array, total: mx.array) -> mx.array:
    """exp(s - most) / total in the type of ``raw``; s is cap * tanh(raw / cap) / temperature [T, V], rounded to that type."""
    scores = mx.tanh(raw.astype(mx.float32) / cap) * (cap / temperature)[:, None]
    return (mx.exp(scores.astype(raw.dtype).astype(mx.float32) - most[:, None]) / total[:, None]).astype(raw.dtype)


@mx.compile
def softened(scores: mx.array, most: mx.array) -> tuple[mx.array, mx.array]:
    """exp(scores - most) for a tile of attention, in float32 and in the scores' type."""
    weights = mx.exp(scores.astype(mx.float32) - most)
    return weights, weights.astype(scores.dtype)


@mx.compile
def added(mixed: mx.array, kept: mx.array, more: mx.array) -> mx.array:
    """mixed * kept + more, in float32."""
    return mixed * kept + more
