"""The denoising step: canvases in, three small arrays and the next step's self-conditioning out.

Scoring is here too: it applies the same head to given tokens. T positions of any number of canvases, H hidden size,
V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_diffgemma.backends import SCORE_TILE
from mlx_diffgemma.backends.mlx import kernels
from mlx_diffgemma.backends.mlx.attention import in_turn
from mlx_diffgemma.backends.mlx.model import Segment, TextModel
from mlx_diffgemma.backends.stream import SoftEmbeddings


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


def step(
    model: TextModel, segments: Sequence[Segment], given: Inputs
) -> tuple[mx.array, mx.array, mx.array, SoftEmbeddings[mx.array]]:
    """One denoising step: argmax, sampled (int32 [T]), entropy (float32 [T], nats), and the next soft embeddings [T, H].

    At most SCORE_TILE positions have logits at a time, however many canvases there are.
    """
    hidden = model.denoise(given.canvases, segments, given.soft_embeddings)
    if len(hidden) <= SCORE_TILE:
        return _answer(model, hidden, given, slice(0, len(hidden)))
    tiles: list[tuple[mx.array, ...]] = []
    for start in range(0, len(hidden), SCORE_TILE):
        span = slice(start, start + SCORE_TILE)
        *found, soft = _answer(model, in_turn(hidden[span], tiles[-1] if tiles else ()), given, span)
        tiles.append((*found, soft.array()))
    argmax, sampled, entropy, whole = (mx.concatenate(list(parts)) for parts in zip(*tiles, strict=True))
    return argmax, sampled, entropy, SoftEmbeddings(lambda: whole, [whole])


def _answer(
    model: TextModel, hidden: mx.array, given: Inputs, span: slice
) -> tuple[mx.array, mx.array, mx.array, SoftEmbeddings[mx.array]]:
    """The results of :func:`step` for the positions in ``span``, with hidden states [N, H]."""
    raw = model.embed_tokens.as_linear(hidden)  # [N, V]
    noise = None if given.noise is None else given.noise[span]
    frozen = None if given.frozen is None else given.frozen[span]
    cap, temperature = mx.array([model.config.final_logit_softcapping]), given.temperature[span]
    found = kernels.statistics(raw, noise, cap, temperature)
    argmax, sampled, entropy = found.argmax, found.sampled, found.entropy
    sampled = mx.where(given.drawn[span], sampled, argmax)
    if frozen is not None:
        known, token = frozen >= 0, mx.maximum(frozen, 0)
        argmax, sampled = mx.where(known, token, argmax), mx.where(known, token, sampled)
        entropy = mx.where(known, 0.0, entropy)

    logits = None if found.weights is not None else raw

    def soft() -> mx.array:
        rows = model.soft_embeddings(found.probabilities(logits, cap, temperature))
        return rows if frozen is None else mx.where((frozen >= 0)[:, None], model.embed(mx.maximum(frozen, 0)), rows)

    needs = [logits, temperature, found.most, found.total, found.weights, frozen]
    return argmax, sampled, entropy, SoftEmbeddings(soft, [array for array in needs if array is not None])


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
        span = slice(start, start + SCORE_TILE)
        logits = model.head(in_turn(hidden[span], parts))
        logits = logits if temperature is None else logits / temperature[span, None]
        most = logits.max(axis=-1, keepdims=True)
        total = mx.log(kernels.last_sum(mx.exp(logits - most))) + most[..., 0]
        parts.append(mx.take_along_axis(logits, tokens[span, None], axis=-1)[:, 0] - total)
    return mx.concatenate(parts)
