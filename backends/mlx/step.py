"""The denoising step: canvases in, three small arrays and the next step's self-conditioning out. Nothing large outlives it.

Scoring is here too: it applies the same head to given tokens. T positions of any number of canvases, H hidden size,
V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_diffgemma.backends import SCORE_TILE
from mlx_diffgemma.backends.mlx.model import Segment, TextModel
from mlx_diffgemma.backends.mlx.noise import gumbel, words


class Inputs(NamedTuple):
    """The inputs of a denoising step, for canvases one after another.

    Attributes:
        canvases: int32 [T].
        temperature: float32 [T].
        noise: uint32 [T], the bits of :func:`mlx_diffgemma.noise.bits` at each position, or None to draw nothing.
        drawn: bool [T], whether the position uses the noise.
        soft_embeddings: [T, H] from the previous step, zeros for a canvas in its first step; None if all are in their first.
        frozen: int32 [T], -1 where the model may write, or None.
    """

    canvases: mx.array
    temperature: mx.array
    noise: mx.array | None
    drawn: mx.array
    soft_embeddings: mx.array | None
    frozen: mx.array | None


def step(model: TextModel, segments: Sequence[Segment], given: Inputs) -> tuple[mx.array, ...]:
    """One denoising step: argmax, sampled (int32 [T]), entropy (float32 [T], nats), and the next soft embeddings [T, H].

    At most SCORE_TILE positions have logits at a time, however many canvases there are.
    """
    hidden = model.denoise(given.canvases, segments, given.soft_embeddings)
    tiles: list[tuple[mx.array, ...]] = []
    for start in range(0, len(hidden), SCORE_TILE):
        mx.eval(tiles)  # the earlier tiles, so that only one holds its logits
        tiles.append(_answer(model, hidden, given, slice(start, start + SCORE_TILE)))
    return tuple(mx.concatenate(list(parts)) for parts in zip(*tiles, strict=True))


def _answer(model: TextModel, hidden: mx.array, given: Inputs, span: slice) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """The results of :func:`step` for the positions in ``span``."""
    raw = model.embed_tokens.as_linear(hidden[span]).astype(mx.float32)  # [N, V]
    noise = None if given.noise is None else given.noise[span]
    cap, temperature = model.config.final_logit_softcapping, given.temperature[span]
    argmax, sampled, entropy, probabilities = statistics(raw, noise, hidden.dtype, cap=cap, temperature=temperature)
    soft = model.soft_embeddings(probabilities)
    sampled = mx.where(given.drawn[span], sampled, argmax)
    if given.frozen is not None:
        known, token = given.frozen[span] >= 0, mx.maximum(given.frozen[span], 0)
        argmax, sampled = mx.where(known, token, argmax), mx.where(known, token, sampled)
        entropy = mx.where(known, 0.0, entropy)
        soft = mx.where(known[:, None], model.embed(token), soft)
    return argmax, sampled, entropy, soft


def score(model: TextModel, tokens: mx.array, segments: Sequence[Segment]) -> mx.array:
    """Encode tokens int32 [T]; the log-probability of each after all before it in its text, float32 [T].

    The value for a text's first token is meaningless.
    """
    lasts = [segment.cache.last for segment in segments]
    hidden = model.encode(tokens, segments)
    before = []
    for (start, stop, *_), last in zip(segments, lasts, strict=True):
        before += [mx.zeros_like(hidden[:1]) if last is None else last, hidden[start : stop - 1]]
    return logprobs(model, mx.concatenate(before), tokens)


def logprobs(model: TextModel, hidden: mx.array, tokens: mx.array, temperature: mx.array | None = None) -> mx.array:
    """Log-probability float32 [T] of tokens int32 [T] under final hidden states [T, H]; temperature float32 [T]."""
    parts: list[mx.array] = []
    for start in range(0, len(tokens), SCORE_TILE):
        mx.eval(parts)  # the earlier tiles, so that only one holds its logits
        span = slice(start, start + SCORE_TILE)
        logits = model.head(hidden[span])
        logits = logits if temperature is None else logits / temperature[span, None]
        parts.append(mx.take_along_axis(logits, tokens[span, None], axis=-1)[:, 0] - _logsumexp(logits))
    return mx.concatenate(parts)


def statistics(
    raw: mx.array, noise: mx.array | None, dtype: mx.Dtype, *, cap: float, temperature: mx.array
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Argmax, sample, entropy and probabilities of cap * tanh(raw / cap) / temperature.

    Args:
        raw: float32 [T, V], the head's output before the softcap.
        noise, temperature: as in :class:`Inputs`.

    Returns:
        argmax, sampled (int32 [T]), entropy (float32 [T], nats), and the probabilities [T, V] in ``dtype``: the float32 softmax
        of the tempered logits rounded to ``dtype``.
    """
    scores = mx.tanh(raw / cap) * (cap / temperature)[:, None]
    argmax = scores.argmax(axis=-1).astype(mx.int32)
    sampled = argmax if noise is None else _sample(scores, noise)
    shifted = scores - scores.max(axis=-1, keepdims=True)
    weights = mx.exp(shifted)
    total = _sum(weights)
    entropy = mx.log(total) - _sum(shifted * weights) / total
    if dtype == mx.float32:
        return argmax, sampled, entropy, weights / total[:, None]
    return argmax, sampled, entropy, mx.softmax(scores.astype(dtype).astype(mx.float32), axis=-1).astype(dtype)


def _sample(scores: mx.array, noise: mx.array) -> mx.array:
    """argmax(scores + Gumbel noise) of scores float32 [T, V]; noise uint32 [T]."""
    return (scores + gumbel(words(noise, scores.shape[-1]))).argmax(axis=-1).astype(mx.int32)


def _logsumexp(logits: mx.array) -> mx.array:
    """Over the last axis."""
    most = logits.max(axis=-1, keepdims=True)
    return mx.log(_sum(mx.exp(logits - most))) + most[..., 0]


def _sum(x: mx.array) -> mx.array:
    """Sum over the last axis in two levels. One plain float32 pass over 262,144 terms is off by more than 1e-3 nats."""
    size = x.shape[-1]
    inner = 512 if size >= 512 else 1
    padded = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -size % inner)])
    return padded.reshape(*x.shape[:-1], -1, inner).sum(axis=-1).sum(axis=-1)
