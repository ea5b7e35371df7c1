"""Infilling: fills the holes of a text. The length of a hole may be given, or be found by trying.

The text before the first hole is encoded once, and all candidates begin with its cache. From the first hole on (or, with
``in_canvas``, from a few tokens before it) the text lies in canvases, and its known tokens are frozen. If there are several
canvases, each is committed before the next one begins, so a hole sees the known text only up to the end of its own canvas.

If lengths are not given, every combination of lengths is a candidate. The candidates are denoised side by side with the same
noise, and the result of one does not depend on the others. Two means per token rank them; means, because the lengths differ:

    score = mean log p(token | its canvas) over the tokens in the holes
          + mean log p(token | all tokens before it) over the filled text, from the first hole to the last token after the holes
            that every candidate has in its canvases

The first mean comes from the denoiser, in one pass over each finished canvas
(:meth:`~mlx_diffgemma.backends.Backend.score_canvas`). It says how well the denoiser likes what it wrote. The second mean comes
from the causal model (:meth:`~mlx_diffgemma.backends.Backend.score`) and notices a wrong length: the known text then continues
badly.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise, product, takewhile
from math import ceil, prod
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.arguments import checked
from mlx_diffgemma.backends import Backend, Cache, Piece, Row, check_tokens, rows_in_pass, scored, scored_canvas
from mlx_diffgemma.config import GenerationConfig, ModelConfig
from mlx_diffgemma.editing.around import around, editing_config
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.options import DenoisingOptions, spelled_out
from mlx_diffgemma.pipeline import DiffusionGemma
from mlx_diffgemma.prefix_cache import read
from mlx_diffgemma.prompts import PieceRule, Prompt, PromptTokens, chunks
from mlx_diffgemma.sampler import FREE, Block, Text, check_lengths, check_seed, diffuse
from mlx_diffgemma.steps import Steps, run
from mlx_diffgemma.vision.patches import PlacedImage
from mlx_diffgemma.writing import fresh_seed

#: The lengths that are tried for a hole without a length.
LEAST, MOST = 1, 8
#: The most combinations of lengths that are tried.
MAX_CANDIDATES = 64
#: How many candidates are written side by side. This limits the memory of their caches.
ROWS = 8

#: The default marker of a hole in a text; see :func:`parse_template`.
MARKER = "<hole>"
#: The most characters of a marker.
MAX_MARKER = 64
#: The user's turn of the chat that asks to fill the holes. ``GAP`` stands for each hole.
INSTRUCTION = "Write the following text again, with every gap {gap} filled in and nothing else changed.\n\n{text}"
GAP = "____"


@checked
@dataclass(frozen=True)
class Hole:
    """A hole of ``least`` to ``most`` tokens that the model fills. Checked on construction (InputError)."""

    least: int = LEAST
    most: int = MOST

    def __post_init__(self) -> None:
        for value in (self.least, self.most):
            if value < 1:
                raise InputError(f"a hole's length must be an integer of at least 1, got {value!r}")
        if self.least > self.most:
            raise InputError(f"a hole's range is in the wrong order: {self.least}-{self.most}; write {self.most}-{self.least}")


@dataclass(frozen=True)
class Candidate:
    """One combination of lengths, and the tokens that the model wrote for it.

    Attributes:
        lengths: how many positions each hole has.
        holes: the token ids of each hole, up to its first end token, which is left out.
        canvas_logprob, causal_logprob: the two means of the score, in nats.
        steps: denoising steps of all canvases together.
    """

    lengths: tuple[int, ...]
    holes: tuple[tuple[int, ...], ...]
    canvas_logprob: float
    causal_logprob: float
    steps: int

    @property
    def score(self) -> float:
        """Higher is better. Scores are comparable between candidates of one template."""
        return self.canvas_logprob + self.causal_logprob


@dataclass(frozen=True)
class Filling:
    """A candidate as text: the given text, filled with ``holes``. Each hole is decoded from its own tokens alone."""

    text: str
    holes: tuple[str, ...]
    candidate: Candidate


@dataclass(frozen=True)
class Infill:
    """A text whose holes are filled. ``text`` and ``holes`` are those of the best filling.

    Attributes:
        fillings: all fillings that were tried, the best first.
        seed: with the same template and options, it gives the same result again.
    """

    fillings: tuple[Filling, ...]
    seed: int

    @property
    def text(self) -> str:
        return self.fillings[0].text

    @property
    def holes(self) -> tuple[str, ...]:
        return self.fillings[0].holes


@checked
def parse_template(text: str, marker: str = MARKER) -> list[str | Hole]:
    """Split a text at its markers.

    ``<hole>`` is a hole of unknown length (:data:`LEAST` to :data:`MOST` tokens are tried), ``<hole:5>`` is a hole of 5 tokens,
    and ``<hole:2-8>`` is a hole of 2 to 8. Other markers take a length in the same way, before their last character.

    Raises:
        InputError: the marker is unusable, overlaps itself in the text, has no length after its colon, or is not in the text.
    """
    if not 2 <= len(marker) <= MAX_MARKER or marker != marker.strip() or ":" in marker:
        raise InputError(
            f"the marker {marker[:MAX_MARKER]!r} must have 2 to {MAX_MARKER} characters, no colon, and no white space around it"
        )
    head, first, last = re.escape(marker[:-1]), re.escape(marker[0]), re.escape(marker[-1])
    starts = [match.start() for match in re.finditer(f"(?={head}{last})", text)]
    for before, after in pairwise(starts):
        if after - before < len(marker):
            raise InputError(f"the marker {marker!r} overlaps itself at character {after}; choose another marker")
    parts: list[str | Hole] = []
    end = 0
    # A length ends before the next marker begins. So no character is read twice, however many markers are never closed.
    for match in re.finditer(f"{head}(?::(?P<length>[^{first}{last}\\n]*))?{last}", text):
        parts += [text[end : match.start()], _hole(match["length"], match[0])]
        end = match.end()
    if not parts:
        raise InputError(f"the text has no hole; write {marker} where the model should write")
    return [part for part in (*parts, text[end:]) if part]


def _hole(length: str | None, written: str) -> Hole:
    if length is None:
        return Hole()
    numbers = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", length, re.ASCII)
    if not numbers:
        raise InputError(
            f"{written} has no valid length; end a hole of 5 tokens in :5{written[-1]}, and one of 2 to 8 in :2-8{written[-1]}"
        )
    return Hole(int(numbers[1]), int(numbers[2] or numbers[1]))


def instruction(parts: Sequence[str | Hole]) -> str:
    """The user's turn that asks the model to fill a template."""
    return INSTRUCTION.format(gap=GAP, text="".join(GAP if isinstance(part, Hole) else part for part in parts))


@dataclass(frozen=True)
class Frame:
    """The surroundings of a template.

    Attributes:
        ending: the tokens after the template. Its last token is repeated up to the end of the last canvas. If it is empty, the
            model writes there too, and those tokens are dropped.
        tail_in_prompt: whether the prompt also contains the known tokens after the last hole. If it does, tokens that do not fit
            into the last hole's canvas are left out. Otherwise that is an error, because no hole could see them.
        in_canvas: how many of the tokens before the first hole are frozen in the first canvas instead of being in the cache. A
            small model whose canvases in training always began where an answer begins does badly with other canvases.
        rule: cuts the tokens before the canvases into pieces. By default a rule without end tokens and reply starts.
        images: the images in the tokens before the canvases.
    """

    ending: tuple[int, ...] = ()
    tail_in_prompt: bool = False
    in_canvas: int = 0
    rule: PieceRule | None = None
    images: tuple[PlacedImage, ...] = ()


@spelled_out
@checked
def infill(
    model: DiffusionGemma,
    template: str | Sequence[str | Hole],
    *,
    marker: str = MARKER,
    prompt: Prompt | None = None,
    images: Sequence[Any] = (),
    system: str | None = None,
    raw: bool = False,
    markup: bool = False,
    seed: int | None = None,
    batch: str = "exact",
    **options: Unpack[DenoisingOptions],
) -> Infill:
    """Fill the holes of a text. The module's docstring says how, and how holes of unknown length are ranked.

    In a chat, a text that fits into one canvas with its longest holes lies in that canvas from its first token on, like an
    answer. Otherwise the text before the first hole is in the cache, and the canvases begin with that hole.

    The text around the holes is returned unchanged, to the character. The text of a hole is decoded from its own tokens alone: an
    end token ends it, turn markers are dropped, and an incomplete character at its edge becomes U+FFFD.

    Args:
        template: a text with markers (see :func:`parse_template`), or a list of known texts and holes in order.
        prompt: the prompt that the text answers, instead of the instruction: a text, a conversation or token ids.
        images: images and videos that belong to the prompt, or to the instruction; as in
            :meth:`~mlx_diffgemma.pipeline.DiffusionGemma.stream`.
        system: a system message to put before the conversation.
        raw: do not use the chat template. Text after the last hole that does not fit into its canvas is then an error, as it is
            with a ``prompt``. Without ``raw`` and ``prompt``, the instruction contains that text.
        markup: read markup such as ``<|turn>`` in all these texts as control tokens, not as plain text.
        seed: 0 to 2^64 - 1. By default a fresh seed; the result has it.
        batch: see :func:`~mlx_diffgemma.backends.rows_in_pass`. ``fast`` writes up to 8 candidates in one pass.
        options: fields of :class:`~mlx_diffgemma.config.GenerationConfig` except ``max_new_tokens``.

    Raises:
        InputError: before anything is computed.
    """
    steps = prepare_infill(
        model,
        template,
        marker=marker,
        prompt=prompt,
        images=images,
        system=system,
        raw=raw,
        markup=markup,
        seed=seed,
        **options,
    )
    return run(steps).fill(model, batch)


@dataclass(frozen=True)
class PreparedInfill:
    """A template whose texts are tokenized; the arguments of :func:`fill`.

    Attributes:
        parts: the template's known texts and holes.
        before: the prompt before the template.
        known: the ids of each known text, and the holes.
    """

    parts: tuple[str | Hole, ...]
    before: PromptTokens
    known: list[list[int] | Hole]
    config: GenerationConfig
    frame: Frame
    seed: int

    @property
    def known_tokens(self) -> int:
        """The tokens of the known texts."""
        return sum(map(len, _known(self.known)))

    def fill(self, model: DiffusionGemma, batch: str) -> Infill:
        """Fill the holes."""
        template = [self.before.ids.tolist(), *self.known]
        candidates = fill(model.backend, template, self.config, seed=self.seed, frame=self.frame, batch=batch)
        fillings = []
        for candidate in candidates:
            holes = tuple(map(model.tokenizer.decode, candidate.holes))
            texts = iter(holes)
            text = "".join(next(texts) if isinstance(part, Hole) else part for part in self.parts)
            fillings.append(Filling(text, holes, candidate))
        return Infill(tuple(fillings), self.seed)


def prepare_infill(
    model: DiffusionGemma,
    template: str | Sequence[str | Hole],
    *,
    marker: str = MARKER,
    prompt: Prompt | None = None,
    images: Sequence[Any] = (),
    system: str | None = None,
    raw: bool = False,
    markup: bool = False,
    seed: int | None = None,
    **options: Unpack[DenoisingOptions],
) -> Steps[PreparedInfill]:
    """Tokenize a template and its prompt, in steps. Arguments and errors as in :func:`infill`."""
    parts = tuple(parse_template(template, marker) if isinstance(template, str) else template)
    config, seed = editing_config(model, options), fresh_seed() if seed is None else seed
    before, ending = yield from around(model, instruction(parts), prompt, images=images, system=system, raw=raw, markup=markup)
    known: list[list[int] | Hole] = []
    for part in parts:
        ids = part if isinstance(part, Hole) else (yield from model.tokenizer.encode_steps(part, markup=markup))
        known.append(ids)
    longest = sum(part.most if isinstance(part, Hole) else len(part) for part in known)
    fits = longest <= (config.canvas_length or model.config.canvas_length)
    first = next((index for index, part in enumerate(known) if isinstance(part, Hole)), 0)
    frame = Frame(
        ending=ending,
        tail_in_prompt=prompt is None and not raw,
        in_canvas=sum(map(len, _known(known[:first]))) if fits and not raw else 0,
        rule=model.piece_rule,
        images=before.images,
    )
    check_template([before.ids.tolist(), *known], config, frame, model.config)  # before the weights are needed
    return PreparedInfill(parts, before, known, config, frame, seed)


def _known(parts: Sequence[Sequence[int] | Hole]) -> Iterator[Sequence[int]]:
    return (part for part in parts if not isinstance(part, Hole))


def check_template(
    template: Sequence[Sequence[int] | Hole], config: GenerationConfig, frame: Frame, model: ModelConfig
) -> tuple[int, int]:
    """The tokens of the canvases that :func:`fill` writes, and how many of them lie behind the longest text up to the last hole.

    Raises InputError if the template does not fit into them, or they do not fit into the model's context.
    """
    holes, known = _split(template)
    if not 0 <= frame.in_canvas < len(known[0]):
        raise InputError(
            f"in_canvas must be less than {len(known[0])}, the number of tokens before the first hole, got {frame.in_canvas}"
        )
    length = config.canvas_length or model.canvas_length
    longest = frame.in_canvas + sum(hole.most for hole in holes) + sum(map(len, known[1:-1]))
    total = ceil(longest / length) * length
    room = total - longest
    if len(known[-1]) > room and not frame.tail_in_prompt:
        raise InputError(
            f"there are {len(known[-1])} tokens after the last hole, but its canvas of {length} has room for {room}; "
            f"shorten the text after the hole, or leave out prompt and raw"
        )
    check_lengths(model, config.replace(max_new_tokens=total), len(known[0]) - frame.in_canvas)
    return total, room


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
        template: known tokens and holes in order, with at least one token before the first hole.
        config: its ``max_new_tokens`` is ignored. An end token ends its hole, and the text continues with the known tokens.
        seed: 0 to 2^64 - 1. All candidates use the same seed.
        batch: as in :func:`infill`.

    Returns:
        The candidates, the best first.

    Raises:
        InputError: before anything is computed.
    """
    frame = frame or Frame()
    holes, known = _split(template)
    total, room = check_template(template, config, frame, backend.config)
    first = len(known[0]) - frame.in_canvas
    prefix, lead, tail = known[0][:first], known[0][first:], known[-1]
    config, ends = config.replace(max_new_tokens=total, eos_token_ids=()), config.eos_token_ids
    check_tokens(np.array(list(chain(*known))), backend.config)
    check_seed(seed)
    rows_in_pass(backend, batch, ROWS)
    before = PromptTokens(np.array(prefix, np.int32), frame.images)
    shared = read(backend, before, frame.rule or PieceRule(backend.config.canvas_length)).cache
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
            if not compared:  # only an end token can then say that the text ends
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
    """The holes, and the known tokens before, between and after them: one list more than there are holes."""
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
            f"the holes have {count} combinations of lengths, more than the {MAX_CANDIDATES} that are tried; narrow their lengths"
        )
    return holes, known


def _laid_out(holes: Sequence[Sequence[int]], known: Sequence[Sequence[int]]) -> list[int]:
    """The holes, each followed by the known tokens after it."""
    return [token for pair in zip(holes, known, strict=True) for part in pair for token in part]


def _spans(lengths: Sequence[int], known: Sequence[Sequence[int]], start: int) -> list[slice]:
    """The places of the holes in the new text. The first hole is at ``start``, and known tokens follow each hole."""
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
    """Let the model write into templates [P] after the shared cache.

    Returns:
        For each template its tokens [P], the denoiser's log-probabilities of the tokens [P], and the number of denoising steps.
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
            logprobs[index].append(scored_canvas(backend, Row(event.tokens, cache, 1.0)))  # this block is not in the cache yet
    return [
        (np.concatenate([block.tokens for block in written]), np.concatenate(scored), sum(block.steps for block in written))
        for written, scored in zip(blocks, logprobs, strict=True)
    ]


def _causal_logprob(backend: Backend, shared: Cache, text: Sequence[int], start: int) -> float:
    """The mean log-probability of a text's tokens from position ``start`` on, after the shared cache."""
    cache = shared.fork()
    parts = [scored(backend, Piece(piece, cache)) for piece in chunks(np.array(text, np.int32))]
    return float(np.concatenate(parts)[start:].mean(dtype=np.float64))
