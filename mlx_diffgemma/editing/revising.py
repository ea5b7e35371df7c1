"""Revising and proofreading: a text that is there already, as what the canvases begin with.

Both are at the level of token ids; :meth:`mlx_diffgemma.DiffusionGemma.revise` and ``proofread`` take texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma import noise
from mlx_diffgemma.backends import Backend
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.sampler import FREE, Block, block_diffusion, row_seeds

#: The user's turns of the chats in which a text is revised and proofread, where no prompt is given.
REVISE_INSTRUCTION = "Revise the following text. Write the revised text and nothing else.\n\n{text}"
PROOFREAD_INSTRUCTION = "Write the following text again without its mistakes, and nothing else.\n\n{text}"


@dataclass(frozen=True)
class Revision:
    """A revised text.

    Attributes:
        replaced: tokens of the draft that noise took the place of.
        denoising_steps: of each block; none where nothing was replaced.
        seed: with the text and the options, it gives the same revision again.
    """

    text: str
    replaced: int
    denoising_steps: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Doubt:
    """A token that the model would have written otherwise.

    Attributes:
        start, end: the characters of the text that it lies in.
        text: these characters.
        suggestion: what the model would write for this token.
        canvas_logprob: log-probability of the token where the denoiser sees the whole canvas, the token included; nats.
        causal_logprob: log-probability of the token after those before it; nats.
    """

    start: int
    end: int
    text: str
    suggestion: str
    canvas_logprob: float
    causal_logprob: float

    @property
    def doubt(self) -> float:
        """Nats, at least 0: minus the sum of the two log-probabilities."""
        return -(self.canvas_logprob + self.causal_logprob)


def check_strength(strength: float) -> None:
    """Raise InputError unless ``strength`` is a probability."""
    if not 0 <= strength <= 1:
        raise InputError(f"strength must be a number from 0 to 1, got {strength!r}")


def check_spans(spans: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """Spans (start, end) of a text of ``length`` characters in order; raises InputError for what is outside or overlaps."""
    ordered = sorted((start, end) for start, end in spans)
    for start, end in ordered:
        if not 0 <= start < end <= length:
            raise InputError(f"the span ({start}, {end}) does not lie in the text of {length} characters")
    for (_, before), (start, end) in pairwise(ordered):
        if start < before:
            raise InputError(f"the span ({start}, {end}) overlaps another one; join them")
    return ordered


def revise(
    backend: Backend,
    prompt: NDArray[np.int32],
    draft: NDArray[np.int32],
    config: GenerationConfig,
    *,
    strength: float,
    seed: int,
    keep: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.int32], int, tuple[int, ...]]:
    """Write ``draft`` again.

    Each token of the draft is replaced by noise with probability ``strength`` (:func:`mlx_diffgemma.noise.replaced`), and the
    sampler begins with what that gives, block by block, on its usual schedule: the temperature of a first step, no
    self-conditioning, and what it is not sure of is renoised whether it was replaced or not. A block sees the draft of its own
    canvas only.

    At strength 1 that is a cold start, equal to generating as many tokens with the same seed. Where nothing is replaced, as
    at strength 0, the draft comes back and the model is not run.

    Args:
        prompt: int32 [1, N].
        draft: int32 [P].
        config: its ``max_new_tokens`` does not count.
        keep: bool [P], tokens that stay as they are. Where there are any, an end token does not end the text.

    Returns:
        Tokens int32 [P], padded behind the end; how many were replaced; denoising steps of each block.

    Raises:
        InputError: before anything is computed.
    """
    check_strength(strength)
    seeds, keep = row_seeds(seed, 1), np.zeros(draft.shape, bool) if keep is None else keep
    length = config.canvas_length or backend.config.canvas_length
    blocks = range(ceil(len(draft) / length))
    chosen = np.concatenate([noise.replaced(seeds, block, length, strength)[0] for block in blocks])[: len(draft)] & ~keep
    config = config.replace(max_new_tokens=len(draft), eos_token_ids=() if keep.any() else None)
    events = block_diffusion(
        backend,
        prompt,
        config,
        seed=seeds,
        frozen=np.where(keep, draft, FREE).astype(np.int32),
        canvas=np.where(chosen, FREE, draft).astype(np.int32),
    )
    if not chosen.any():
        return draft, 0, ()
    finished = [event for event in events if isinstance(event, Block)]
    tokens = np.full(len(blocks) * length, config.pad_token_id, np.int32)
    written = np.concatenate([block.tokens[0] for block in finished])
    tokens[: len(written)] = written
    return tokens[: len(draft)], int(chosen.sum()), tuple(int(block.steps[0]) for block in finished)


def proofread(
    backend: Backend,
    prompt: NDArray[np.int32],
    tokens: NDArray[np.int32],
    config: GenerationConfig,
    *,
    ending: Sequence[int] = (),
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
    """What the model thinks of each of ``tokens`` int32 [N] after ``prompt`` [1, M]. Experimental.

    A canvas at a time, as it is: no token is replaced, and one denoising pass says what should be where, for errors look like
    the noise that the model was trained to remove. The causal pass over the same tokens is the second opinion.

    Args:
        ending: what follows the tokens, its last token up to the end of the last canvas. Where it is empty, the last canvas
            is as short as what is left.

    Returns:
        The denoiser's likeliest tokens int32 [N], and the log-probabilities of the given ones, nats, float32 [N]: the denoiser's,
        which sees the whole canvas, and the causal model's.
    """
    length = config.canvas_length or backend.config.canvas_length
    count = ceil(len(tokens) / length)
    filled = tokens
    if ending:
        filled = np.array([*tokens, *ending, *[ending[-1]] * length][: count * length], np.int32)
    cache = backend.new_cache(1)
    backend.encode(prompt, cache)
    causal = backend.score(tokens[None], cache.repeated(1))[0]
    argmax, canvas_logprobs = [], []
    for block in range(count):
        canvas = filled[None, block * length : (block + 1) * length]
        argmax.append(backend.denoise(canvas, cache, temperature=1.0).argmax[0])
        canvas_logprobs.append(backend.score_canvas(canvas, cache)[0])
        if block + 1 < count:
            backend.encode(canvas, cache)
    return np.concatenate(argmax)[: len(tokens)], np.concatenate(canvas_logprobs)[: len(tokens)], causal
