"""The denoising step: canvases in, three small arrays and the next step's self-conditioning out.

Scoring is here too: it applies the same head to given tokens. T positions of any number of canvases, H hidden size,
V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlx_diffgemma.backends import SCORE_TILE
from mlx_diffgemma.backends.stream import SoftEmbeddings
from mlx_diffgemma.backends.torch.model import Segment, TextModel
from mlx_diffgemma.backends.torch.statistics import statistics


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


def step(model: TextModel, segments: Sequence[Segment], given: Inputs) -> tuple[Tensor, Tensor, Tensor, SoftEmbeddings[Tensor]]:
    """One denoising step: argmax, sampled (int64 [T]), entropy (float32 [T], nats), and the next soft embeddings [T, H].

    At most SCORE_TILE positions have logits at a time, however many canvases there are.
    """
    hidden = model.denoise(given.canvases, segments, given.soft_embeddings)
    if len(hidden) <= SCORE_TILE:
        return _answer(model, hidden, given, slice(0, len(hidden)))
    tiles: list[tuple[Tensor, ...]] = []
    for start in range(0, len(hidden), SCORE_TILE):
        span = slice(start, start + SCORE_TILE)
        *found, soft = _answer(model, hidden[span], given, span)
        tiles.append((*found, soft.array()))
    argmax, sampled, entropy, whole = (torch.cat(parts) for parts in zip(*tiles, strict=True))
    return argmax, sampled, entropy, SoftEmbeddings(lambda: whole)


def _answer(
    model: TextModel, hidden: Tensor, given: Inputs, span: slice
) -> tuple[Tensor, Tensor, Tensor, SoftEmbeddings[Tensor]]:
    """The results of :func:`step` for the positions in ``span``, with hidden states [N, H]."""
    raw = model.embed_tokens.as_linear(hidden)  # [N, V]
    noise = None if given.noise is None else given.noise[span]
    frozen = None if given.frozen is None else given.frozen[span]
    found = statistics(raw, noise, model.config.final_logit_softcapping, given.temperature[span])
    argmax, entropy = found.argmax, found.entropy
    sampled = torch.where(given.drawn[span], found.sampled, argmax)
    if frozen is not None:
        known, token = frozen >= 0, frozen.clamp(min=0).long()
        argmax, sampled = torch.where(known, token, argmax), torch.where(known, token, sampled)
        entropy = torch.where(known, 0.0, entropy)

    def soft() -> Tensor:
        rows = model.soft_embeddings(found.probabilities())
        return rows if frozen is None else torch.where((frozen >= 0)[:, None], model.embed(frozen.clamp(min=0).long()), rows)

    return argmax, sampled, entropy, SoftEmbeddings(soft)


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
