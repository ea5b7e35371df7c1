"""Infilling: a text with holes, of lengths that are known or have to be found.

What comes before the first hole is encoded once, and all candidates share its cache. From the first hole on (or, with
``in_canvas``, from somewhat before) the text lies in canvases, in which known tokens are frozen. Of several canvases the earlier
ones are committed before the later ones are begun: a hole sees what is known up to the end of its own canvas.

Lengths that are not known are tried: every combination is a candidate, denoised beside the others as a row of a batch, with
the same noise; what is written for one combination does not depend on which others are tried. Two per-token means rank them,
either of which is corrected for length by being a mean:

    score = mean log p(token | its canvas) over the tokens in the holes
          + mean log p(token | all tokens before it) over the filled text, from the first hole to the last token that is shown
            behind the holes of every candidate

The first is the denoiser's, in one pass over each finished canvas (:meth:`~mlx_diffgemma.backends.Backend.score_canvas`), and
says how well it likes what it wrote. The second is the causal model's (:meth:`~mlx_diffgemma.backends.Backend.score`), and
arbitrates: a wrong length shows where the known text goes on.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise, product, takewhile
from math import ceil, prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.backends import Backend, Cache, check_tokens
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.sampler import FREE, Block, block_diffusion, check_lengths

#: Lengths that are tried for a hole of which nothing is said.
LEAST, MOST = 1, 8
#: Combinations of lengths that are tried at most.
MAX_CANDIDATES = 64
#: Candidates that are denoised at a time: bounds the memory of their logits.
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


def infill(
    backend: Backend,
    template: Sequence[Sequence[int] | Hole],
    config: GenerationConfig,
    *,
    seed: int,
    ending: Sequence[int] = (),
    tail_in_prompt: bool = False,
    in_canvas: int = 0,
) -> list[Candidate]:
    """Fill the holes of a template of token ids.

    Args:
        template: known tokens and holes in order, at least one token before the first hole.
        config: its ``max_new_tokens`` does not count. An end token ends its hole, and the text goes on with what is known.
        seed: 0 to 2^64 - 1; the same for all candidates.
        ending: what follows the template, its last token up to the end of the last canvas. Where it is empty the model may
            write on, and what it writes there is dropped.
        tail_in_prompt: whether the known tokens before the first hole tell of those behind the last one. If so, those that do
            not fit behind it into its canvas are left out; else that is an error, as nothing could see them.
        in_canvas: how many of the tokens before the first hole lie in the first canvas too, frozen, and not in the cache. A small
            model that has only ever begun its canvases where its answers begin is at a loss elsewhere.

    Returns:
        The candidates, the best first.

    Raises:
        InputError: before anything is computed.
    """
    holes, known = _split(template)
    if not 0 <= in_canvas < len(known[0]):
        raise InputError(f"in_canvas must leave one of the {len(known[0])} tokens before the first hole, got {in_canvas}")
    first = len(known[0]) - in_canvas
    prefix, lead, tail = known[0][:first], known[0][first:], known[-1]
    length = config.canvas_length or backend.config.canvas_length
    longest = len(lead) + sum(hole.most for hole in holes) + sum(map(len, known[1:-1]))
    total = ceil(longest / length) * length
    room = total - longest
    if len(tail) > room and not tail_in_prompt:
        raise InputError(
            f"too many tokens after the last hole: {len(tail)}, of which {room} fit behind it into its canvas of {length}; "
            f"shorten the text after the hole, or have the prompt show it"
        )
    config, ends = config.replace(max_new_tokens=total, eos_token_ids=()), config.eos_token_ids
    check_tokens(np.array([list(chain(*known))]), backend.config)
    prompt = np.array([prefix], np.int32)
    check_lengths(backend.config, config, prompt, 0, length)
    shared = backend.new_cache(1)
    if len(prefix) > 1:
        backend.encode(prompt[:, :-1], shared)  # the last token is what each candidate begins with
    behind = [*tail, *ending, *(list(ending[-1:]) or [FREE]) * total]
    compared = [*tail, *ending[:1]][:room]
    candidates: list[Candidate] = []
    combinations = product(*(range(hole.least, hole.most + 1) for hole in holes))
    while rows := list(islice(combinations, ROWS)):
        templates = [[*lead, *_laid_out([[FREE] * n for n in row], [*known[1:-1], behind])][:total] for row in rows]
        written = _denoise(backend, shared, prompt[:, -1:], np.array(templates, np.int32), config, seed)
        spans = [_spans(row, known[1:], len(lead)) for row in rows]
        holes_of = [[tokens[span].tolist() for span in row] for tokens, row in zip(written.tokens, spans, strict=True)]
        kept_of = [[up_to_end(hole, ends) for hole in filling] for filling in holes_of]
        texts = [[prefix[-1], *lead, *_laid_out(kept, [*known[1:-1], compared])] for kept in kept_of]
        if not compared:  # nothing tells that the text ends but the token that ends it
            texts = [[*text, *_first_end(filling[-1], ends)] for text, filling in zip(texts, holes_of, strict=True)]
        causal_logprobs = _causal_logprobs(backend, shared, texts, 1 + len(lead))
        for index, kept in enumerate(kept_of):
            scored = [
                written.logprobs[index, span][: len(tokens) + 1]  # with the end token
                for span, tokens in zip(spans[index], kept, strict=True)
            ]
            candidates.append(
                Candidate(
                    lengths=rows[index],
                    holes=tuple(map(tuple, kept)),
                    canvas_logprob=float(np.concatenate(scored).mean(dtype=np.float64)),
                    causal_logprob=causal_logprobs[index],
                    steps=int(written.steps[index]),
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


def _first_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """The first end token, if there is one."""
    return [token for token in tokens if token in ends][:1]


class _Denoised(NamedTuple):
    """For templates [B, P]: tokens [B, P], the denoiser's log-probabilities of them [B, P], and denoising steps [B]."""

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    steps: NDArray[np.int64]


def _denoise(
    backend: Backend, shared: Cache, last: NDArray[np.int32], frozen: NDArray[np.int32], config: GenerationConfig, seed: int
) -> _Denoised:
    """What the model writes into templates after the shared cache and the token ``last`` [1, 1]."""
    rows = len(frozen)
    cache = shared.repeated(rows)
    tokens, logprobs, steps = [], [], np.zeros(rows, np.int64)
    for event in block_diffusion(backend, last.repeat(rows, axis=0), config, seed=seed, frozen=frozen, cache=cache):
        if isinstance(event, Block):
            tokens.append(event.tokens)
            logprobs.append(backend.score_canvas(event.tokens, cache))  # the cache holds what is before this block
            steps += event.steps
    return _Denoised(np.concatenate(tokens, axis=1), np.concatenate(logprobs, axis=1), steps)


def _causal_logprobs(backend: Backend, shared: Cache, texts: Sequence[Sequence[int]], start: int) -> list[float]:
    """The mean log-probability of each text's tokens from position ``start`` on, after the shared cache."""
    tokens = np.zeros((len(texts), max(map(len, texts))), np.int32)  # what is behind a text's end changes nothing before it
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    logprobs = backend.score(tokens, shared.repeated(len(texts)))
    return [float(row[start : len(text)].mean(dtype=np.float64)) for row, text in zip(logprobs, texts, strict=True)]
