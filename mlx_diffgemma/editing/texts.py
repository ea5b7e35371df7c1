"""Editing inside a text, from text to text: the methods of a loaded model that fill in, revise and proofread.

All of them have a text stand where a model's answer would: after a prompt, from its first token on. By default the prompt is a
chat of one user turn, the instruction, which holds the text too (:data:`~mlx_diffgemma.editing.infilling.INSTRUCTION`,
:data:`~mlx_diffgemma.editing.revising.REVISE_INSTRUCTION`, :data:`~mlx_diffgemma.editing.revising.PROOFREAD_INSTRUCTION`), and the text is followed
by the end of the turn and padding up to the end of its last canvas. A ``raw`` text comes after nothing but the
beginning-of-sequence token, and nothing follows it. A ``prompt`` takes the place of either.
"""

import secrets
from collections.abc import Sequence
from functools import cached_property
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.backends import Backend
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.editing import infilling as infill
from mlx_diffgemma.editing import revising as revise
from mlx_diffgemma.editing.infilling import MARKER, Filling, Hole, Infill, parse_template
from mlx_diffgemma.editing.revising import Doubt, Revision, check_spans
from mlx_diffgemma.errors import InputError

if TYPE_CHECKING:
    from mlx_diffgemma.pipeline import Prompt
    from mlx_diffgemma.tokenizer import Tokenizer


class Editing:
    """What :class:`~mlx_diffgemma.pipeline.DiffusionGemma` inherits."""

    checkpoint: Checkpoint
    backend: Backend

    if TYPE_CHECKING:

        @cached_property
        def tokenizer(self) -> Tokenizer: ...

        def prompt_ids(
            self, prompt: Prompt, *, raw: bool = False, system: str | None = None, escape: bool = False
        ) -> NDArray[np.int32]: ...

    def infill(
        self,
        template: str | Sequence[str | Hole],
        *,
        marker: str = MARKER,
        prompt: "Prompt | None" = None,
        raw: bool = False,
        system: str | None = None,
        seed: int | None = None,
        escape: bool = False,
        **options: Any,
    ) -> Infill:
        """Fill the holes of a text; :mod:`mlx_diffgemma.editing.infilling` says how, and how lengths that are not known are ranked.

        In a chat, a text that fits into one canvas with its longest holes lies there from its first token on, as an answer
        would. Otherwise what is before the first hole is in the cache, and the canvases begin with that hole.

        The text around the holes comes back as it was given, to the character. A hole's text is decoded from its own tokens
        alone: an end token ends it, turn markers are dropped, and a character that is broken off at its edge becomes U+FFFD.

        Args:
            template: a text with markers (see :func:`~mlx_diffgemma.editing.infilling.parse_template`), or known texts and holes in order.
            prompt: what the text answers, instead of the instruction; a text, a conversation or token ids.
            raw: leave the chat template away. What does not fit into the canvas behind the last hole is then an error, as it is
                with a ``prompt``; otherwise the instruction shows it.
            seed: 0 to 2^64 - 1; by default a fresh one, which the result tells.
            escape: take markup such as ``<|turn>`` in all of these as plain text, where others wrote them.
            options: fields of :class:`~mlx_diffgemma.config.GenerationConfig`, but for ``max_new_tokens``.

        Raises:
            InputError: before anything is computed.
        """
        parts = parse_template(template, marker) if isinstance(template, str) else list(template)
        config, seed = self._config(options), _seed(seed)
        before, ending = self._around(infill.instruction(parts), prompt, raw=raw, system=system, escape=escape)
        known = [part if isinstance(part, Hole) else self.tokenizer.encode(part, escape=escape) for part in parts]
        longest = sum(part.most if isinstance(part, Hole) else len(part) for part in known)
        fits = longest <= (config.canvas_length or self.backend.config.canvas_length)
        candidates = infill.infill(
            self.backend,
            [before, *known],
            config,
            seed=seed,
            ending=ending,
            tail_in_prompt=prompt is None and not raw,
            in_canvas=_before_hole(known) if fits and not raw else 0,
        )
        fillings = []
        for candidate in candidates:
            holes = tuple(map(self.tokenizer.decode, candidate.holes))
            texts = iter(holes)
            text = "".join(next(texts) if isinstance(part, Hole) else part for part in parts)
            fillings.append(Filling(text, holes, candidate))
        return Infill(tuple(fillings), seed)

    def revise(
        self,
        text: str,
        strength: float,
        *,
        prompt: "Prompt | None" = None,
        keep: Sequence[tuple[int, int]] = (),
        raw: bool = False,
        system: str | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Revision:
        """Write a text again, beginning with the text itself; :func:`mlx_diffgemma.editing.revising.revise` says how.

        Args:
            strength: 0 to 1, the probability with which noise replaces a token of the draft: 0 gives the text back, 1 writes
                a new one, the same as generating from the prompt with this seed.
            prompt: what the text answers, instead of the instruction; a text, a conversation or token ids.
            keep: spans of characters (start, end) that stay as they are. An end token that the model writes before one ends what
                it writes there, and the text goes on with the span.
            raw, system, seed, options: as in :meth:`infill`. A raw text keeps its number of tokens.

        Raises:
            InputError: before anything is computed.
        """
        config, seed = self._config(options), _seed(seed)
        before, ending = self._around(revise.REVISE_INSTRUCTION.format(text=_checked(text)), prompt, raw=raw, system=system)
        pieces = _pieces(text, check_spans(keep, len(text)))
        ids = [self.tokenizer.encode(piece) for piece, _ in pieces]
        draft = np.array([token for part in ids for token in part] + list(ending[:1]), np.int32)
        keeping = np.zeros(len(draft), bool)
        starts = np.cumsum([0, *map(len, ids)])
        for (_, kept), start, end in zip(pieces, starts, starts[1:], strict=False):
            keeping[start:end] = kept
        if ending:
            length = config.canvas_length or self.backend.config.canvas_length
            fill = ceil(len(draft) / length) * length - len(draft)
            draft, keeping = np.pad(draft, (0, fill), constant_values=ending[-1]), np.pad(keeping, (0, fill))
        tokens, replaced, steps = revise.revise(
            self.backend, np.array([before], np.int32), draft, config, strength=strength, seed=seed, keep=keeping
        )
        if (tokens == draft).all():
            return Revision(text, replaced, steps, seed)
        starts[-1] = len(tokens)  # what is behind the text is part of its last piece
        revised = [
            piece if kept else self.tokenizer.decode(infill.up_to_end(tokens[start:end].tolist(), config.eos_token_ids))
            for (piece, kept), start, end in zip(pieces, starts, starts[1:], strict=False)
        ]
        return Revision("".join(revised), replaced, steps, seed)

    def proofread(
        self,
        text: str,
        *,
        prompt: "Prompt | None" = None,
        raw: bool = False,
        system: str | None = None,
        canvas_length: int | None = None,
    ) -> list[Doubt]:
        """The tokens of a text that the model doubts, the most doubtful first. Experimental.

        A token is doubted where the denoiser, which sees the text as it stands, finds another one likelier in its place; how
        much, is minus its log-probability from the denoiser and from the causal model (:func:`mlx_diffgemma.editing.revising.proofread`).
        How well that finds errors depends on the model, and on the text being like those it was trained on; a doubt is no proof,
        and an error that is likely is not found.

        Args:
            prompt, raw, system: as in :meth:`infill`.
            canvas_length: tokens per canvas, if fewer than the model's own.
        """
        config = self._config({"canvas_length": canvas_length})
        before, ending = self._around(revise.PROOFREAD_INSTRUCTION.format(text=_checked(text)), prompt, raw=raw, system=system)
        ids = self.tokenizer.encode(text)
        spans = self.tokenizer.spans(ids, text)
        argmax, canvas, causal = revise.proofread(
            self.backend, np.array([before], np.int32), np.array(ids, np.int32), config, ending=ending
        )
        doubts = [
            Doubt(start, end, text[start:end], self.tokenizer.decode([argmax[index]]), float(canvas[index]), float(causal[index]))
            for index, (start, end) in enumerate(spans)
            if argmax[index] != ids[index]
        ]
        return sorted(doubts, key=lambda doubt: -doubt.doubt)

    def _config(self, options: dict[str, Any]) -> GenerationConfig:
        if options.get("max_new_tokens") is not None:
            raise InputError("the text itself says how many tokens there are; leave out max_new_tokens")
        return self.checkpoint.generation.replace(**options)

    def _around(
        self, instruction: str, prompt: "Prompt | None", *, raw: bool, system: str | None, escape: bool = False
    ) -> tuple[list[int], tuple[int, ...]]:
        """Ids of what comes before a text, and of what follows it."""
        ending = () if raw else (self.tokenizer.end_of_turn_id, self.checkpoint.generation.pad_token_id)
        if prompt is None and raw:
            if system is not None:
                raise InputError("a system message needs the chat template; leave out raw")
            return [self.tokenizer.bos_token_id], ending
        text = instruction if prompt is None else prompt
        ids: list[int] = self.prompt_ids(text, raw=raw, system=system, escape=escape)[0].tolist()
        return ids, ending


def _before_hole(parts: Sequence[list[int] | Hole]) -> int:
    """Tokens before the first hole."""
    count = 0
    for part in parts:
        if isinstance(part, Hole):
            break
        count += len(part)
    return count


def _seed(seed: int | None) -> int:
    return secrets.randbits(64) if seed is None else seed


def _checked(text: str) -> str:
    if not text.strip():
        raise InputError("the text is empty")
    return text


def _pieces(text: str, keep: Sequence[tuple[int, int]]) -> list[tuple[str, bool]]:
    """The text in pieces that are kept and pieces that are not; the last one is not, and may be empty."""
    pieces, end = [], 0
    for start, stop in keep:
        pieces += [(text[end:start], False), (text[start:stop], True)]
        end = stop
    return [*pieces, (text[end:], False)]
