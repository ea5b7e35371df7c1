"""The denoising step: canvases in, three small arrays and the next step's self-conditioning out. Nothing large outlives it.

Scoring is here too: it applies the same head to given tokens. T positions of any number of canvases, H hidden size,
V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlx_diffgemma.backends import SCORE_TILE
from mlx_diffgemma.backends.torch import tiling
from mlx_diffgemma.backends.torch.model import Segment, TextModel
from mlx_diffgemma.backends.torch.noise import gumbel, words


class Inputs(NamedTuple):
    """The inputs of a denoising step, for canvases one after another.

    Attributes:
        canvases: int64 [T].
        temperature: float32 [T].
        noise: int32 [T], the bits of :func:`mlx_diffgemma.noise.bits` at each position, or None to draw nothing.
        drawn: bool [T], whether the position uses the noise.
        soft_embeddings: [T, H] from the previous step, zeros for a canvas in its first step; None if all are in their first.
        frozen: int64 [T], -1 where the model may write, or None.
    """

    canvases: Tensor
    temperature: Tensor
    noise: Tensor | None
    drawn: Tensor
    soft_embeddings: Tensor | None
    frozen: Tensor | None


def step(model: TextModel, segments: Sequence[Segment], given: Inputs) -> tuple[Tensor, ...]:
    """One denoising step: argmax, sampled (int64 [T]), entropy (float32 [T], nats), and the next soft embeddings [T, H].

    At most SCORE_TILE positions have logits at a time, however many canvases there are.
    """
    hidden = model.denoise(given.canvases, segments, given.soft_embeddings)
    tiles = [_answer(model, hidden, given, slice(start, start + SCORE_TILE)) for start in range(0, len(hidden), SCORE_TILE)]
    return tuple(torch.cat(parts) for parts in zip(*tiles, strict=True))


def _answer(model: TextModel, hidden: Tensor, given: Inputs, span: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of :func:`step` for the positions in ``span``."""
    raw = model.embed_tokens.as_linear(hidden[span]).float()  # [N, V]
    noise = None if given.noise is None else given.noise[span]
    cap, temperature = model.config.final_logit_softcapping, given.temperature[span]
    argmax, sampled, entropy, probabilities = statistics(raw, noise, hidden.dtype, cap=cap, temperature=temperature)
    soft = model.soft_embeddings(probabilities)
    sampled = torch.where(given.drawn[span], sampled, argmax)
    if given.frozen is not None:
        known, token = given.frozen[span] >= 0, given.frozen[span].clamp(min=0).long()
        argmax, sampled = torch.where(known, token, argmax), torch.where(known, token, sampled)
        entropy = torch.where(known, 0.0, entropy)
        soft = torch.where(known[:, None], model.embed(token), soft)
    return argmax, sampled, entropy, soft


def score(model: TextModel, tokens: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Encode tokens int64 [T]; the log-probability of each after all before it in its text, float32 [T].

    The value for a text's first token is meaningless.
    """
    lasts = [segment.cache.last for segment in segments]
    hidden = model.encode(tokens, segments)
    before = []
    for (start, stop, *_), last in zip(segments, lasts, strict=True):
        before += [torch.zeros_like(hidden[:1]) if last is None else last, hidden[start : stop - 1]]
    return logprobs(model, torch.cat(before), tokens)


def logprobs(model: TextModel, hidden: Tensor, tokens: Tensor, temperature: Tensor | None = None) -> Tensor:
    """Log-probability float32 [T] of tokens int64 [T] under final hidden states [T, H]; temperature float32 [T]."""
    parts = []
    for start in range(0, len(tokens), SCORE_TILE):
        span = slice(start, start + SCORE_TILE)
        logits = model.head(hidden[span])
        logits = logits if temperature is None else logits / temperature[span, None]
        parts.append(logits.gather(1, tokens[span, None])[:, 0] - logits.logsumexp(dim=-1))
    return torch.cat(parts)


def statistics(
    raw: Tensor, noise: Tensor | None, dtype: torch.dtype, *, cap: float, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Argmax, sample, entropy and probabilities of cap * tanh(raw / cap) / temperature.

    Args:
        raw: float32 [T, V], the head's output before the softcap; overwritten on a CPU.
        noise, temperature: as in :class:`Inputs`.

    Returns:
        argmax, sampled (int64 [T]), entropy (float32 [T], nats), and the probabilities [T, V] in ``dtype``: the float32 softmax
        of the tempered logits rounded to ``dtype``.
    """
    if raw.device.type == "cpu":
        return tiling.statistics(raw, noise, dtype, cap=cap, temperature=temperature)
    scores = torch.tanh(raw / cap) * (cap / temperature)[:, None]
    argmax = scores.argmax(dim=-1)
    sampled = argmax if noise is None else _sample(scores, noise)
    shifted = scores - scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(shifted)
    total = weights.sum(dim=-1)
    entropy = torch.log(total) - (shifted * weights).sum(dim=-1) / total
    if dtype == torch.float32:
        return argmax, sampled, entropy, weights / total[:, None]
    return argmax, sampled, entropy, torch.softmax(scores.to(dtype), dim=-1, dtype=torch.float32).to(dtype)


def _sample(scores: Tensor, noise: Tensor) -> Tensor:
    """argmax(scores + Gumbel noise) of scores float32 [T, V]; noise int32 [T]."""
    return (scores + gumbel(words(noise, scores.shape[-1]))).argmax(dim=-1)
