"""Proofreading: finds the tokens of a text that the model would have written differently. Experimental.

The text is put into canvases unchanged, and one denoising pass per canvas says which token should be at each position. This works
because errors look like the noise that the model was trained to remove. A causal pass over the same tokens is a second opinion.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.arguments import checked
from mlx_diffgemma.backends import Backend, Piece, Row, check_computed, scored, scored_canvas
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.editing.around import around, editing_config, not_empty
from mlx_diffgemma.pipeline import DiffusionGemma
from mlx_diffgemma.prefix_cache import read
from mlx_diffgemma.prompts import PieceRule, Prompt, PromptTokens, chunks
from mlx_diffgemma.sampler import check_lengths
from mlx_diffgemma.steps import run

#: The user's turn of the chat in which a text is proofread, if no prompt is given.
INSTRUCTION = "Write the following text again without its mistakes, and nothing else.\n\n{text}"


@dataclass(frozen=True)
class Doubt:
    """A token that the model would have written differently.

    Attributes:
        start, end: the characters of the text that the token lies in.
        text: these characters.
        suggestion: the text that the model would write for this token.
        canvas_logprob: log-probability of the token when the denoiser sees the whole canvas, including the token; nats.
        causal_logprob: log-probability of the token given the tokens before it; nats.
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


@checked
def proofread(
    model: DiffusionGemma,
    text: str,
    *,
    prompt: Prompt | None = None,
    images: Sequence[Any] = (),
    system: str | None = None,
    raw: bool = False,
    markup: bool = False,
    canvas_length: int | None = None,
) -> list[Doubt]:
    """Find the tokens of a text that the model doubts, the most doubtful first. Experimental.

    A token is doubted if the denoiser, which sees the unchanged text, finds another token more likely in its place. The size of
    the doubt is minus the sum of its log-probabilities from the denoiser and from the causal model. How well this finds errors
    depends on the model, and on whether the text is like the texts it was trained on. A doubt is no proof, and likely errors are
    not found.

    Args:
        prompt, images, system, raw, markup: as in :func:`~mlx_diffgemma.editing.infilling.infill`.
        canvas_length: tokens per canvas, if fewer than the model's own.

    Raises:
        InputError: before anything is computed.
    """
    config = editing_config(model, {"canvas_length": canvas_length})
    instruction = INSTRUCTION.format(text=not_empty(text))
    before, ending = run(around(model, instruction, prompt, images=images, system=system, raw=raw, markup=markup))
    ids = model.tokenizer.encode(text, markup=markup)
    spans = model.tokenizer.spans(ids, text)
    tokens = np.array(ids, np.int32)
    opinions = second_look(model.backend, before, tokens, config, ending=ending, rule=model.piece_rule)
    doubts = [
        Doubt(start, end, text[start:end], model.tokenizer.decode([argmax]), float(canvas), float(causal))
        for (start, end), token, argmax, canvas, causal in zip(spans, ids, *opinions, strict=True)
        if argmax != token
    ]
    return sorted(doubts, key=lambda doubt: -doubt.doubt)


def second_look(
    backend: Backend,
    prompt: PromptTokens,
    tokens: NDArray[np.int32],
    config: GenerationConfig,
    *,
    ending: Sequence[int] = (),
    rule: PieceRule | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
    """The opinions of the denoiser and of the causal model on each of ``tokens`` int32 [N] after a prompt.

    Args:
        ending: the tokens after the text. Its last token is repeated up to the end of the last canvas. If it is empty, the last
            canvas has only the tokens that are left.
        rule: cuts the prompt into pieces. By default a rule without end tokens and reply starts.

    Returns:
        The denoiser's most likely tokens int32 [N], and two log-probabilities of the given tokens, float32 [N], nats: from the
        denoiser, which sees the whole canvas, and from the causal model.

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
    causal = np.concatenate([scored(backend, Piece(piece, alone)) for piece in chunks(tokens)])
    argmax, canvas_logprobs = [], []
    for block in range(count):
        canvas = filled[block * length : (block + 1) * length]
        row = Row(canvas, cache, 1.0)
        [answer] = backend.denoise([row])
        check_computed(answer.entropy, "a denoising step")
        argmax.append(answer.argmax)
        canvas_logprobs.append(scored_canvas(backend, row))
        if block + 1 < count:
            backend.encode([Piece(canvas, cache)])
    return np.concatenate(argmax)[: len(tokens)], np.concatenate(canvas_logprobs)[: len(tokens)], causal
