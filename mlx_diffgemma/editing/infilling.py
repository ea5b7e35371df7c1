"""Infilling: a text with holes, of lengths that are known or have to be found.

What comes before the first hole is encoded once, and all candidates begin with its cache. From the first hole on (or, with
``in_canvas``, from somewhat before) the text lies in canvases, in which known tokens are frozen. Of several canvases the earlier
ones are committed before the later ones are begun: a hole sees what is known up to the end of its own canvas.

Lengths that are not known are tried: every combination is a candidate, denoised beside the others with the same noise; what is
written for one does not depend on which others are tried. Two per-token means rank them, and a mean corrects for length:

    score = mean log p(token | its canvas) over the tokens in the holes
          + mean log p(token | all tokens before it) over the filled text, from the first hole to the last token that is shown
            behind the holes of every candidate

The first is the denoiser's, in one pass over each finished canvas (:meth:`~mlx_diffgemma.backends.Backend.score_canvas`), and
says how well it likes what it wrote. The second is the causal model's (:meth:`~mlx_diffgemma.backends.Backend.score`), and
arbitrates: a wrong length shows where the known text goes on.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise, product, takewhile
from math import ceil, prod
from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.backends import Backend, Cache, Piece, Row, check_tokens, rows_in_pass
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.editing.around import around, editing_config
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.options import DenoisingOptions, spelled_out
from mlx_diffgemma.pipeline import DiffusionGemma
from mlx_diffgemma.prefix_cache import read
from mlx_diffgemma.prompts import PieceRule, Prompt, chunks
from mlx_diffgemma.sampler import FREE, Block, Text, check_lengths, check_seed, diffuse
from mlx_diffgemma.writing import fresh_seed

#: Lengths that are tried for a hole of which nothing is said.
LEAST, MOST = 1, 8
#: Combinations of lengths that are tried at most.
MAX_CANDIDATES = 64
#: Candidates that are written side by side: bounds the memory of their caches.
ROWS = 8

#: How a hole is written in a text, unless another marker is asked for; see :func:`parse_template`.
MARKER = "<hole>"
#: The user's turn of a chat that asks for the holes; ``GAP`` stands for each.
INSTRUCTION = "Write the following text again, with every gap {gap} filled in and nothing else changed.\n\n{text}"
GAP = "____"


@dataclass(frozen=True)
class Hole:
    """From ``least`` to ``most`` tokens that the model is to write; checked on construction (InputError)."""

    least: int = LEAST
    most: int = MOST

    def __post_init__(self) -> None:
        for value in (self.least, self.most):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"a hole's length must be an integer of at least 1, got {value!r}")
        if self.least > self.most:
            raise InputError(f"a hole's range is upside down: {self.least}-{self.most}; write {self.most}-{self.least}")


@dataclass(frozen=True)
class Candidate:
    """One combination of lengths, and what the model wrote for it.

    Attributes:
        lengths: positions of each hole.
        holes: token ids of each hole, up to and without its first end token.
        canvas_logprob, causal_logprob: the two means of the score, in nats.
        steps: denoising steps, of all canvases together.
    """

    lengths: tuple[int, ...]
    holes: tuple[tuple[int, ...], ...]
    canvas_logprob: float
    causal_logprob: float
    steps: int

    @property
    def score(self) -> float:
        """The higher the better; comparable between candidates of one template."""
        return self.canvas_logprob + self.causal_logprob


@dataclass(frozen=True)
class Filling:
    """A candidate as text: the given text with ``holes``, each decoded from its own tokens alone, put in."""

    text: str
    holes: tuple[str, ...]
    candidate: Candidate


@dataclass(frozen=True)
class Infill:
    """A text whose holes are filled.

    Attributes:
        fillings: all that were tried, the best first.
        seed: with the template and the options, it gives the same again.
    """

    fillings: tuple[Filling, ...]
    seed: int

    @property
    def text(self) -> str:
        return self.fillings[0].text

    @property
    def holes(self) -> tuple[str, ...]:
        return self.fillings[0].holes


def parse_template(text: str, marker: str = MARKER) -> list[str | Hole]:
    """Split a text at its markers.

    ``<hole>`` is a hole of any length (:data:`LEAST` to :data:`MOST` tokens are tried), ``<hole:5>`` one of 5 tokens, and
    ``<hole:2-8>`` one of 2 to 8. Another marker takes its length in the same way, before its last character.

    Raises:
        InputError: the marker is unusable, occurs where it overlaps itself, or has no length behind its colon; or there is none.
    """
    if len(marker) < 2 or marker != marker.strip() or ":" in marker:
        raise InputError(f"the marker {marker!r} must have two characters or more, no colon, and no white space around it")
    head, last = re.escape(marker[:-1]), re.escape(marker[-1])
    starts = [match.start() for match in re.finditer(f"(?={head}{last})", text)]
    for before, after in pairwise(starts):
        if after - before < len(marker):
            raise InputError(f"the marker {marker!r} overlaps itself at character {after}; choose another marker")
    parts: list[str | Hole] = []
    end = 0
    for match in re.finditer(f"{head}(?::(?P<length>[^{last}\\n]*))?{last}", text):
        parts += [text[end : match.start()], _hole(match["length"], match[0])]
        end = match.end()
    if not parts:
        raise InputError(f"the text has no hole; write {marker} where the model is to fill in")
    return [part for part in (*parts, text[end:]) if part]


def _hole(length: str | None, written: str) -> Hole:
    if length is None:
        return Hole()
    numbers = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", length, re.ASCII)
    if not numbers:
        raise InputError(
            f"{written} says no length; a hole of 5 tokens ends in :5{written[-1]}, one of 2 to 8 in :2-8{written[-1]}"
        )
    return Hole(int(numbers[1]), int(numbers[2] or numbers[1]))


def instruction(parts: Sequence[str | Hole]) -> str:
    """The user's turn that asks for a template to be filled."""
    return INSTRUCTION.format(gap=GAP, text="".join(GAP if isinstance(part, Hole) else part for part in parts))


@dataclass(frozen=True)
class Frame:
    """Where a template stands.

    Attributes:
        ending: what follows the template, its last token up to the end of the last canvas. Where it is empty the model may
            write on, and what it writes there is dropped.
        tail_in_prompt: whether the known tokens before the first hole tell of those behind the last one. If so, those that do
            not fit behind it into its canvas are left out; else that is an error, as nothing could see them.
        in_canvas: how many of the tokens before the first hole lie in the first canvas too, frozen, and not in the cache. A small
            model that has only ever begun its canvases where its answers begin is at a loss elsewhere.
        rule: where what is before the canvases is cut into pieces; by default nothing is known of it.
    """

    ending: tuple[int, ...] = ()
    tail_in_prompt: bool = False
    in_canvas: int = 0
    rule: PieceRule | None = None


@spelled_out
def infill(
    model: DiffusionGemma,
    template: str | Sequence[str | Hole],
    *,
    marker: str = MARKER,
    prompt: Prompt | None = None,
    system: str | None = None,
    raw: bool = False,
    markup: bool = False,
    seed: int | None = None,
    batch: str = "exact",
    **options: Unpack[DenoisingOptions],
) -> Infill:
    """Fill the holes of a text; the module says how, and how lengths that are not known are ranked.

    In a chat, a text that fits into one canvas with its longest holes lies there from its first token on, as an answer
    would. Otherwise what is before the first hole is in the cache, and the canvases begin with that hole.

    The text around the holes comes back as it was given, to the character. A hole's text is decoded from its own tokens
    alone: an end token ends it, turn markers are dropped, and a character that is broken off at its edge becomes U+FFFD.

    Args:
        template: a text with markers (see :func:`parse_template`), or known texts and holes in order.
        prompt: what the text answers, instead of the instruction; a text, a conversation or token ids.
        system: a system message to put before the conversation.
        raw: leave the chat template away. What does not fit into the canvas behind the last hole is then an error, as it is
            with a ``prompt``; otherwise the instruction shows it.
        markup: read markup such as ``<|turn>`` in all of these as control tokens, not as plain text.
        seed: 0 to 2^64 - 1; by default a fresh one, which the result tells.
        batch: see :func:`~mlx_diffgemma.backends.rows_in_pass`; ``fast`` writes up to 8 lengths in one pass.
        options: fields of :class:`~mlx_diffgemma.config.GenerationConfig`, but for ``max_new_tokens``.

    Raises:
        InputError: before anything is computed.
    """
    parts = parse_template(template, marker) if isinstance(template, str) else list(template)
    config, seed = editing_config(model, options), fresh_seed() if seed is None else seed
    before, ending = around(model, instruction(parts), prompt, system=system, raw=raw, markup=markup)
    known = [part if isinstance(part, Hole) else model.tokenizer.encode(part, markup=markup) for part in parts]
    longest = sum(part.most if isinstance(part, Hole) else len(part) for part in known)
    fits = longest <= (config.canvas_length or model.backend.config.canvas_length)
    first = next((index for index, part in enumerate(known) if isinstance(part, Hole)), 0)
    frame = Frame(
        ending=ending,
        tail_in_prompt=prompt is None and not raw,
        in_canvas=sum(map(len, _known(known[:first]))) if fits and not raw else 0,
        rule=model.piece_rule,
    )
    candidates = fill(model.backend, [before, *known], config, seed=seed, frame=frame, batch=batch)
    fillings = []
    for candidate in candidates:
        holes = tuple(map(model.tokenizer.decode, candidate.holes))
        texts = iter(holes)
        text = "".join(next(texts) if isinstance(part, Hole) else part for part in parts)
        fillings.append(Filling(text, holes, candidate))
    return Infill(tuple(fillings), seed)


def _known(parts: Sequence[Sequence[int] | Hole]) -> Iterator[Sequence[int]]:
    return (part for part in parts if not isinstance(part, Hole))


def fill(
    backend: Backend,
    template: Sequence[Sequence[int] | Hole],
    config: GenerationConfig,
    *,
    seed: int,
    frame: Frame | None = None,
    batch: str = "exact",
) -> list[Candidate]:
    """Fill the holes of a template of token ids.

    Args:
        template: known tokens and holes in order, at least one token before the first hole.
        config: its ``max_new_tokens`` does not count. An end token ends its hole, and the text goes on with what is known.
        seed: 0 to 2^64 - 1; the same for all candidates.
        batch: as in :func:`infill`.

    Returns:
        The candidates, the best first.

    Raises:
        InputError: before anything is computed.
    """
    frame = frame or Frame()
    holes, known = _split(template)
    if not 0 <= frame.in_canvas < len(known[0]):
        raise InputError(f"in_canvas must leave one of the {len(known[0])} tokens before the first hole, got {frame.in_canvas}")
    first = len(known[0]) - frame.in_canvas
    prefix, lead, tail = known[0][:first], known[0][first:], known[-1]
    length = config.canvas_length or backend.config.canvas_length
    longest = len(lead) + sum(hole.most for hole in holes) + sum(map(len, known[1:-1]))
    total = ceil(longest / length) * length
    room = total - longest
    if len(tail) > room and not frame.tail_in_prompt:
        raise InputError(
            f"too many tokens after the last hole: {len(tail)}, of which {room} fit behind it into its canvas of {length}; "
            f"shorten the text after the hole, or have the prompt show it"
        )
    config, ends = config.replace(max_new_tokens=total, eos_token_ids=()), config.eos_token_ids
    check_tokens(np.array(list(chain(*known))), backend.config)
    check_lengths(backend.config, config, len(prefix))
    check_seed(seed)
    rows_in_pass(backend, batch, ROWS)
    shared = read(backend, np.array(prefix, np.int32), frame.rule or PieceRule(backend.config.canvas_length)).cache
    behind = [*tail, *frame.ending, *(list(frame.ending[-1:]) or [FREE]) * total]
    compared = [*tail, *frame.ending[:1]][:room]
    candidates: list[Candidate] = []
    combinations = product(*(range(hole.least, hole.most + 1) for hole in holes))
    while rows := list(islice(combinations, ROWS)):
        templates = [[*lead, *_laid_out([[FREE] * n for n in row], [*known[1:-1], behind])][:total] for row in rows]
        written = _denoise(backend, shared, [np.array(each, np.int32) for each in templates], config, seed, batch)
        for row, (tokens, logprobs, steps) in zip(rows, written, strict=True):
            spans = _spans(row, known[1:], len(lead))
            written_holes = [tokens[span].tolist() for span in spans]
            kept = [up_to_end(hole, ends) for hole in written_holes]
            text = [*lead, *_laid_out(kept, [*known[1:-1], compared])]
            if not compared:  # nothing tells that the text ends but the token that ends it
                text += [token for token in written_holes[-1] if token in ends][:1]
            scored = [logprobs[span][: len(hole) + 1] for span, hole in zip(spans, kept, strict=True)]  # with the end token
            candidates.append(
                Candidate(
                    lengths=row,
                    holes=tuple(map(tuple, kept)),
                    canvas_logprob=float(np.concatenate(scored).mean(dtype=np.float64)),
                    causal_logprob=_causal_logprob(backend, shared, text, len(lead)),
                    steps=steps,
                )
            )
    return sorted(candidates, key=lambda candidate: -candidate.score)


def _split(template: Sequence[Sequence[int] | Hole]) -> tuple[list[Hole], list[list[int]]]:
    """The holes, and the known tokens before, between and behind them: one list more than there are holes."""
    holes: list[Hole] = []
    known: list[list[int]] = [[]]
    for part in template:
        if isinstance(part, Hole):
            holes.append(part)
            known.append([])
        else:
            known[-1] += part
    if not holes:
        raise InputError("the template has no hole")
    if not known[0]:
        raise InputError("the template begins with a hole; put at least one token before it")
    count = prod(hole.most - hole.least + 1 for hole in holes)
    if count > MAX_CANDIDATES:
        raise InputError(
            f"the holes have {count} combinations of lengths, and {MAX_CANDIDATES} are tried at most; say how long they are"
        )
    return holes, known


def _laid_out(holes: Sequence[Sequence[int]], known: Sequence[Sequence[int]]) -> list[int]:
    """Holes, each followed by what is known behind it."""
    return [token for pair in zip(holes, known, strict=True) for part in pair for token in part]


def _spans(lengths: Sequence[int], known: Sequence[Sequence[int]], start: int) -> list[slice]:
    """Where the holes, each followed by what is known behind it, lie in the new text; the first one at ``start``."""
    spans = []
    for length, behind in zip(lengths, known, strict=True):
        spans.append(slice(start, start + length))
        start += length + len(behind)
    return spans


def up_to_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the first end token."""
    return list(takewhile(lambda token: token not in ends, tokens))


def _denoise(
    backend: Backend,
    shared: Cache,
    templates: Sequence[NDArray[np.int32]],
    config: GenerationConfig,
    seed: int,
    batch: str,
) -> list[tuple[NDArray[np.int32], NDArray[np.float32], int]]:
    """What the model writes into templates [P] after the shared cache.

    Returns:
        For each its tokens [P], the denoiser's log-probabilities of them [P], and denoising steps.
    """
    nothing = np.empty(0, np.int32)
    texts = [Text(nothing, seed, shared.fork(), frozen) for frozen in templates]
    blocks: list[list[Block]] = [[] for _ in texts]
    logprobs: list[list[NDArray[np.float32]]] = [[] for _ in texts]
    for index, event in diffuse(backend, texts, config, batch=batch, max_batch=ROWS):
        if isinstance(event, Block):
            cache = texts[index].cache
            assert cache is not None
            blocks[index].append(event)
            logprobs[index] += backend.score_canvas([Row(event.tokens, cache, 1.0)])  # the cache holds what is before this block
    return [
        (np.concatenate([block.tokens for block in written]), np.concatenate(scored), sum(block.steps for block in written))
        for written, scored in zip(blocks, logprobs, strict=True)
    ]


def _causal_logprob(backend: Backend, shared: Cache, text: Sequence[int], start: int) -> float:
    """The mean log-probability of a text's tokens from position ``start`` on, after the shared cache."""
    cache = shared.fork()
    parts = [backend.score([Piece(piece, cache)])[0] for piece in chunks(np.array(text, np.int32))]
    return float(np.concatenate(parts)[start:].mean(dtype=np.float64))
