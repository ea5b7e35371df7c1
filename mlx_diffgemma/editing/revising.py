"""Revising: rewrites a text. The canvases begin with the text itself, a draft, instead of random tokens.

Each token of the draft is replaced by noise with probability ``strength`` (:func:`mlx_diffgemma.noise.replaced`). The sampler
then starts from the result, block by block, on its usual schedule: it begins with the temperature of a first step and without
self-conditioning, and it renoises every position that it does not accept, replaced or not. A block sees only the draft of its own
canvas.

At strength 1 the result equals generating as many tokens with the same seed. If no token is replaced, as at strength 0, the draft
is returned and the model does not run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma import noise
from mlx_diffgemma.arguments import checked
from mlx_diffgemma.backends import Backend
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.editing.around import around, editing_config, not_empty
from mlx_diffgemma.editing.infilling import up_to_end
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.options import DenoisingOptions, spelled_out
from mlx_diffgemma.pipeline import DiffusionGemma
from mlx_diffgemma.prefix_cache import read
from mlx_diffgemma.prompts import PieceRule, Prompt, PromptTokens
from mlx_diffgemma.sampler import FREE, Block, Text, block_diffusion, check_lengths, check_text
from mlx_diffgemma.steps import run
from mlx_diffgemma.writing import fresh_seed

#: The user's turn of the chat in which a text is revised, if no prompt is given.
INSTRUCTION = "Revise the following text. Write the revised text and nothing else.\n\n{text}"


@dataclass(frozen=True)
class Revision:
    """A revised text.

    Attributes:
        replaced: how many tokens of the draft were replaced by noise.
        denoising_steps: how many steps each block took. Empty if no token was replaced.
        seed: with the same text and options, it gives the same revision again.
    """

    text: str
    replaced: int
    denoising_steps: tuple[int, ...]
    seed: int


def check_strength(strength: float) -> None:
    """Raise InputError unless ``strength`` is from 0 to 1."""
    if not 0 <= strength <= 1:
        raise InputError(f"strength must be a number from 0 to 1, got {strength!r}")


def check_spans(spans: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """Sort spans (start, end) of a text of ``length`` characters. Raises InputError if one is outside it or overlaps another."""
    ordered = sorted((start, end) for start, end in spans)
    for start, end in ordered:
        if not 0 <= start < end <= length:
            raise InputError(f"the span ({start}, {end}) is empty or outside the text of {length} characters")
    for (_, before), (start, end) in pairwise(ordered):
        if start < before:
            raise InputError(f"the span ({start}, {end}) overlaps another span; join them")
    return ordered


@spelled_out
@checked
def revise(
    model: DiffusionGemma,
    text: str,
    strength: float,
    *,
    prompt: Prompt | None = None,
    images: Sequence[Any] = (),
    keep: Sequence[tuple[int, int]] = (),
    system: str | None = None,
    raw: bool = False,
    markup: bool = False,
    seed: int | None = None,
    **options: Unpack[DenoisingOptions],
) -> Revision:
    """Rewrite a text, starting from the text itself. The module's docstring says how.

    Args:
        strength: 0 to 1, the probability that noise replaces a token of the draft. 0 returns the text unchanged. 1 writes a new
            text, the same as generating from the prompt with this seed.
        prompt: the prompt that the text answers, instead of the instruction: a text, a conversation or token ids.
        keep: spans of characters (start, end) that stay unchanged. If the model writes an end token before a span, its own text
            ends there, and the text continues with the span.
        images, system, raw, markup, seed, options: as in :func:`~mlx_diffgemma.editing.infilling.infill`. A raw text keeps its
            number of tokens.

    Raises:
        InputError: before anything is computed.
    """
    config, seed = editing_config(model, options), fresh_seed() if seed is None else seed
    instruction = INSTRUCTION.format(text=not_empty(text))
    before, ending = run(around(model, instruction, prompt, images=images, system=system, raw=raw, markup=markup))
    pieces = _pieces(text, check_spans(keep, len(text)))
    ids = [model.tokenizer.encode(piece, markup=markup) for piece, _ in pieces]
    draft = np.array([token for part in ids for token in part] + list(ending[:1]), np.int32)
    keeping = np.zeros(len(draft), bool)
    starts = np.cumsum([0, *map(len, ids)])
    for (_, kept), start, end in zip(pieces, starts, starts[1:], strict=False):
        keeping[start:end] = kept
    if ending:
        length = config.canvas_length or model.config.canvas_length
        fill = ceil(len(draft) / length) * length - len(draft)
        draft, keeping = np.pad(draft, (0, fill), constant_values=ending[-1]), np.pad(keeping, (0, fill))
    original = Original(before, draft, keeping)
    check_lengths(model.config, config.replace(max_new_tokens=len(draft)), len(before))  # before the weights are needed
    tokens, replaced, steps = rewrite(model.backend, original, config, strength=strength, seed=seed, rule=model.piece_rule)
    if (tokens == draft).all():
        return Revision(text, replaced, steps, seed)
    starts[-1] = len(tokens)  # the tokens after the text belong to its last piece
    revised = [
        piece if kept else model.tokenizer.decode(up_to_end(tokens[start:end].tolist(), config.eos_token_ids))
        for (piece, kept), start, end in zip(pieces, starts, starts[1:], strict=False)
    ]
    return Revision("".join(revised), replaced, steps, seed)


@dataclass(frozen=True, eq=False)
class Original:
    """Token ids to revise.

    Attributes:
        prompt: the tokens before the text.
        tokens: int32 [P], the tokens of the text.
        keep: bool [P], which tokens stay unchanged. If there are any, an end token does not end the text.
    """

    prompt: PromptTokens
    tokens: NDArray[np.int32]
    keep: NDArray[np.bool_]


def rewrite(
    backend: Backend, draft: Original, config: GenerationConfig, *, strength: float, seed: int, rule: PieceRule | None = None
) -> tuple[NDArray[np.int32], int, tuple[int, ...]]:
    """Rewrite a draft of token ids.

    Args:
        config: its ``max_new_tokens`` is ignored.
        rule: cuts the prompt into pieces. By default a rule without end tokens and reply starts.

    Returns:
        Tokens int32 [P], padded after the end; how many tokens were replaced; the denoising steps of each block.

    Raises:
        InputError: before anything is computed.
    """
    check_strength(strength)
    count, length = len(draft.tokens), config.canvas_length or backend.config.canvas_length
    config = config.replace(max_new_tokens=count, eos_token_ids=() if draft.keep.any() else None)
    text = Text(draft.prompt.ids, seed, frozen=np.where(draft.keep, draft.tokens, FREE).astype(np.int32))
    check_text(backend.config, text, config)
    blocks = range(ceil(count / length))
    chosen = np.concatenate([noise.replaced(seed, block, length, strength) for block in blocks])[:count] & ~draft.keep
    if not chosen.any():
        return draft.tokens, 0, ()
    cache = read(backend, draft.prompt, rule or PieceRule(length)).cache
    canvas = np.where(chosen, FREE, draft.tokens).astype(np.int32)
    text = Text(np.empty(0, np.int32), seed, cache, text.frozen, canvas)
    finished = [event for event in block_diffusion(backend, text, config) if isinstance(event, Block)]
    tokens = np.full(len(blocks) * length, config.pad_token_id, np.int32)
    written = np.concatenate([block.tokens for block in finished])
    tokens[: len(written)] = written
    return tokens[:count], int(chosen.sum()), tuple(block.steps for block in finished)


def _pieces(text: str, keep: Sequence[tuple[int, int]]) -> list[tuple[str, bool]]:
    """Split the text into pieces, and say which are kept. The last piece is not kept and may be empty."""
    pieces, end = [], 0
    for start, stop in keep:
        pieces += [(text[end:start], False), (text[start:stop], True)]
        end = stop
    return [*pieces, (text[end:], False)]
