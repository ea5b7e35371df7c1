"""Proofreading: the tokens of a text that the model would have written otherwise. Experimental.

A canvas at a time, as it is: no token is replaced, and one denoising pass says what should be where, for errors look like the
noise that the model was trained to remove. The causal pass over the same tokens is the second opinion.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.backends import Backend, Piece, Row
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.editing.around import around, checked, editing_config
from mlx_diffgemma.pipeline import DiffusionGemma
from mlx_diffgemma.prefix_cache import read
from mlx_diffgemma.prompts import PieceRule, Prompt, chunks
from mlx_diffgemma.sampler import check_lengths

#: The user's turn of the chat in which a text is proofread, where no prompt is given.
INSTRUCTION = "Write the following text again without its mistakes, and nothing else.\n\n{text}"


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


def proofread(
    model: DiffusionGemma,
    text: str,
    *,
    prompt: Prompt | None = None,
    system: str | None = None,
    raw: bool = False,
    markup: bool = False,
    canvas_length: int | None = None,
) -> list[Doubt]:
    """The tokens of a text that the model doubts, the most doubtful first. Experimental.

    A token is doubted where the denoiser, which sees the text as it stands, finds another one likelier in its place. How much it
    is doubted is minus its log-probability from the denoiser and from the causal model. How well that finds errors depends on the
    model, and on the text being like those it was trained on; a doubt is no proof, and an error that is likely is not found.

    Args:
        prompt, system, raw, markup: as in :func:`~mlx_diffgemma.editing.infilling.infill`.
        canvas_length: tokens per canvas, if fewer than the model's own.

    Raises:
        InputError: before anything is computed.
    """
    config = editing_config(model, {"canvas_length": canvas_length})
    instruction = INSTRUCTION.format(text=checked(text))
    before, ending = around(model, instruction, prompt, system=system, raw=raw, markup=markup)
    ids = model.tokenizer.encode(text, markup=markup)
    spans = model.tokenizer.spans(ids, text)
    prefix, tokens = np.array(before, np.int32), np.array(ids, np.int32)
    opinions = second_look(model.backend, prefix, tokens, config, ending=ending, rule=model.piece_rule)
    doubts = [
        Doubt(start, end, text[start:end], model.tokenizer.decode([argmax]), float(canvas), float(causal))
        for (start, end), token, argmax, canvas, causal in zip(spans, ids, *opinions, strict=True)
        if argmax != token
    ]
    return sorted(doubts, key=lambda doubt: -doubt.doubt)


def second_look(
    backend: Backend,
    prompt: NDArray[np.int32],
    tokens: NDArray[np.int32],
    config: GenerationConfig,
    *,
    ending: Sequence[int] = (),
    rule: PieceRule | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
    """What the model thinks of each of ``tokens`` int32 [N] after ``prompt`` [M].

    Args:
        ending: what follows the tokens, its last token up to the end of the last canvas. Where it is empty, the last canvas
            is as short as what is left.
        rule: where the prompt is cut into pieces; by default nothing is known of it.

    Returns:
        The denoiser's likeliest tokens int32 [N], and the log-probabilities of the given ones, nats, float32 [N]: the denoiser's,
        which sees the whole canvas, and the causal model's.

    Raises:
        InputError: before anything is computed.
    """
    length = config.canvas_length or backend.config.canvas_length
    check_lengths(backend.config, config.replace(max_new_tokens=len(tokens)), len(prompt))
    count = ceil(len(tokens) / length)
    filled = tokens
    if ending:
        filled = np.array([*tokens, *ending, *[ending[-1]] * length][: count * length], np.int32)
    cache = read(backend, prompt, rule or PieceRule(length)).cache
    alone = cache.fork()
    causal = np.concatenate([backend.score([Piece(piece, alone)])[0] for piece in chunks(tokens)])
    argmax, canvas_logprobs = [], []
    for block in range(count):
        canvas = filled[block * length : (block + 1) * length]
        row = Row(canvas, cache, 1.0)
        argmax.append(backend.denoise([row])[0].argmax)
        canvas_logprobs += backend.score_canvas([row])
        if block + 1 < count:
            backend.encode([Piece(canvas, cache)])
    return np.concatenate(argmax)[: len(tokens)], np.concatenate(canvas_logprobs)[: len(tokens)], causal
