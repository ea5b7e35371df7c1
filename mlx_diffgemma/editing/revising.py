"""Revising: a text that is there already, as what the canvases begin with.

Each token of the draft is replaced by noise with probability ``strength`` (:func:`mlx_diffgemma.noise.replaced`), and the sampler
begins with what that gives, block by block, on its usual schedule: the temperature of a first step, no self-conditioning, and
what it is not sure of is renoised whether it was replaced or not. A block sees the draft of its own canvas only.

At strength 1 that is a cold start, equal to generating as many tokens with the same seed. Where nothing is replaced, as at
strength 0, the draft comes back and the model is not run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma import noise
from mlx_diffgemma.backends import Backend
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.editing.around import around, checked, editing_config
from mlx_diffgemma.editing.infilling import up_to_end
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.options import DenoisingOptions, spelled_out
from mlx_diffgemma.pipeline import DiffusionGemma
from mlx_diffgemma.prefix_cache import read
from mlx_diffgemma.prompts import PieceRule, Prompt
from mlx_diffgemma.sampler import FREE, Block, Text, block_diffusion, check_text
from mlx_diffgemma.writing import fresh_seed

#: The user's turn of the chat in which a text is revised, where no prompt is given.
INSTRUCTION = "Revise the following text. Write the revised text and nothing else.\n\n{text}"


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


@spelled_out
def revise(
    model: DiffusionGemma,
    text: str,
    strength: float,
    *,
    prompt: Prompt | None = None,
    keep: Sequence[tuple[int, int]] = (),
    system: str | None = None,
    raw: bool = False,
    markup: bool = False,
    seed: int | None = None,
    **options: Unpack[DenoisingOptions],
) -> Revision:
    """Write a text again, beginning with the text itself; the module says how.

    Args:
        strength: 0 to 1, the probability with which noise replaces a token of the draft: 0 gives the text back, 1 writes
            a new one, the same as generating from the prompt with this seed.
        prompt: what the text answers, instead of the instruction; a text, a conversation or token ids.
        keep: spans of characters (start, end) that stay as they are. An end token that the model writes before one ends what
            it writes there, and the text goes on with the span.
        system, raw, markup, seed, options: as in :func:`~mlx_diffgemma.editing.infilling.infill`. A raw text keeps its number of
            tokens.

    Raises:
        InputError: before anything is computed.
    """
    config, seed = editing_config(model, options), fresh_seed() if seed is None else seed
    instruction = INSTRUCTION.format(text=checked(text))
    before, ending = around(model, instruction, prompt, system=system, raw=raw, markup=markup)
    pieces = _pieces(text, check_spans(keep, len(text)))
    ids = [model.tokenizer.encode(piece, markup=markup) for piece, _ in pieces]
    draft = np.array([token for part in ids for token in part] + list(ending[:1]), np.int32)
    keeping = np.zeros(len(draft), bool)
    starts = np.cumsum([0, *map(len, ids)])
    for (_, kept), start, end in zip(pieces, starts, starts[1:], strict=False):
        keeping[start:end] = kept
    if ending:
        length = config.canvas_length or model.backend.config.canvas_length
        fill = ceil(len(draft) / length) * length - len(draft)
        draft, keeping = np.pad(draft, (0, fill), constant_values=ending[-1]), np.pad(keeping, (0, fill))
    original = Original(np.array(before, np.int32), draft, keeping)
    tokens, replaced, steps = rewrite(model.backend, original, config, strength=strength, seed=seed, rule=model.piece_rule)
    if (tokens == draft).all():
        return Revision(text, replaced, steps, seed)
    starts[-1] = len(tokens)  # what is behind the text is part of its last piece
    revised = [
        piece if kept else model.tokenizer.decode(up_to_end(tokens[start:end].tolist(), config.eos_token_ids))
        for (piece, kept), start, end in zip(pieces, starts, starts[1:], strict=False)
    ]
    return Revision("".join(revised), replaced, steps, seed)


@dataclass(frozen=True, eq=False)
class Original:
    """Token ids to revise.

    Attributes:
        prompt: int32 [N], what comes before.
        tokens: int32 [P].
        keep: bool [P], tokens that stay as they are. Where there are any, an end token does not end the text.
    """

    prompt: NDArray[np.int32]
    tokens: NDArray[np.int32]
    keep: NDArray[np.bool_]


def rewrite(
    backend: Backend, draft: Original, config: GenerationConfig, *, strength: float, seed: int, rule: PieceRule | None = None
) -> tuple[NDArray[np.int32], int, tuple[int, ...]]:
    """Write a draft of token ids again.

    Args:
        config: its ``max_new_tokens`` does not count.
        rule: where the prompt is cut into pieces; by default nothing is known of it.

    Returns:
        Tokens int32 [P], padded behind the end; how many were replaced; denoising steps of each block.

    Raises:
        InputError: before anything is computed.
    """
    check_strength(strength)
    count, length = len(draft.tokens), config.canvas_length or backend.config.canvas_length
    config = config.replace(max_new_tokens=count, eos_token_ids=() if draft.keep.any() else None)
    text = Text(draft.prompt, seed, frozen=np.where(draft.keep, draft.tokens, FREE).astype(np.int32))
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
    """The text in pieces that are kept and pieces that are not; the last one is not, and may be empty."""
    pieces, end = [], 0
    for start, stop in keep:
        pieces += [(text[end:start], False), (text[start:stop], True)]
        end = stop
    return [*pieces, (text[end:], False)]
