"""Infilling: against `transformers` with pinned rows, the plain formula of the score, and tokens that must never change."""

import json
import re
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from mlx_diffgemma import DiffusionGemma, InputError, infill, load
from mlx_diffgemma.backends import Backend, Cache, Pending, Piece, Row
from mlx_diffgemma.backends.torch.reference import load as load_reference
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.cli import main
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.editing.infilling import GAP, MAX_CANDIDATES, Candidate, Frame, Hole, fill, parse_template
from mlx_diffgemma.sampler import FREE
from support.checkpoints import CANVAS, make_chat_checkpoint
from support.comparing import BACKENDS, assert_close
from support.fake import FakeBackend, L, full
from support.reference import SHAPES, Reference

TUNING = {"layer_scalars": (0.9, 1.2)}
LENGTH, VOCABULARY = SHAPES["base"]["canvas_length"], SHAPES["base"]["text_config"]["vocab_size"]
# `transformers` includes frozen positions in the mean entropy. A threshold out of reach keeps both comparable.
CONFIG = GenerationConfig(
    max_denoising_steps=6, entropy_bound=2.0, confidence_threshold=1e-30, eos_token_ids=(VOCABULARY,), pad_token_id=0
)
PREFIX = [7, 99, 3, 41, 17, 5, 63, 120, 2, 77, 31]
FAKE = GenerationConfig(max_denoising_steps=1, eos_token_ids=(49,))

#: Templates on canvases of 8, and what each of them tests.
TEMPLATES: dict[str, list[Any]] = {
    "between": [PREFIX, Hole(2, 2), [50, 51, 52], Hole(1, 1), [53, 54]],
    "at the end, and the model writes on": [PREFIX, Hole(3, 3)],
    "adjacent, after one token": [[7], Hole(2, 2), Hole(3, 3), [50]],
    "longer than a canvas": [PREFIX, Hole(10, 10), [50, 51], Hole(1, 1), [52, 53, 54]],
    "unknown": [PREFIX, Hole(1, 3), [50, 51], Hole(1, 2), [52]],
    "unknown, over the edge of a canvas": [PREFIX, [50], Hole(6, 9), [51, 52]],
}


def laid_out(template: Sequence[Any], lengths: Sequence[int], total: int, behind: Sequence[int] = ()) -> list[int]:
    """The template from its first hole on, -1 where the model may write."""
    sizes = iter(lengths)
    row = [token for part in template for token in ([FREE] * next(sizes) if isinstance(part, Hole) else part)]
    first = len([token for part in template[: [isinstance(part, Hole) for part in template].index(True)] for token in part])
    return [*row[first:], *behind, *(list(behind[-1:]) or [FREE]) * total][:total]


def filled(row: Sequence[int], candidate: Candidate) -> list[int]:
    written = iter(token for hole in candidate.holes for token in hole)
    count = sum(map(len, candidate.holes))
    free = [position for position, token in enumerate(row) if token == FREE][:count]
    return [next(written) if position in free else token for position, token in enumerate(row)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_same_tokens_as_the_reference_with_pinned_rows(
    backend: Callable[..., Backend], reference: Callable[..., Reference], backend_name: str, name: str
) -> None:
    template = TEMPLATES[name]
    holes = [part for part in template if isinstance(part, Hole)]
    prefix = np.array([[token for part in template[: template.index(holes[0])] for token in part]])
    longest = sum(hole.most for hole in holes)
    known = sum(len(part) for part in template[template.index(holes[0]) :] if not isinstance(part, Hole))
    total = -(-(longest + known) // LENGTH) * LENGTH
    oracle = reference("base", **TUNING)
    for seed in (5, 2**63 + 1):
        found = fill(backend(backend_name, "base", **TUNING), template, CONFIG, seed=seed)
        expected = [lengths for lengths in product(*(range(hole.least, hole.most + 1) for hole in holes))]
        assert sorted(candidate.lengths for candidate in found) == expected
        for candidate in found:
            row = laid_out(template, candidate.lengths, total)
            pinned = np.array(row, np.int32)
            theirs = oracle.generate(prefix, [seed], CONFIG.replace(max_new_tokens=total), frozen=pinned)
            ours = filled(row, candidate)
            same = [mine in (FREE, other) for mine, other in zip(ours, theirs.tokens[0].tolist(), strict=True)]
            assert all(same), f"{name}, seed {seed}, lengths {candidate.lengths}: {ours} for {theirs.tokens[0]}"
            assert candidate.steps == theirs.steps.sum()


def test_the_score_is_its_formula(backend: Callable[..., Backend], backend_name: str) -> None:
    ours, ending = backend(backend_name, "base", **TUNING), (1, 0)
    template = [PREFIX, Hole(4, 7), [50, 51], Hole(1, 2), [52]]
    found = fill(ours, template, CONFIG, seed=3, frame=Frame(ending))
    assert len(found) == 8
    assert [candidate.score for candidate in found] == sorted((candidate.score for candidate in found), reverse=True)

    def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
        wide = logits.astype(np.float64)
        return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))

    def given(logits: NDArray[np.float32], tokens: Sequence[int]) -> NDArray[np.float64]:
        return np.take_along_axis(log_softmax(logits), np.array(tokens)[:, None], axis=1)[:, 0]

    for candidate in found:
        row = laid_out(template, candidate.lengths, 2 * LENGTH, ending)
        tokens = filled(row, candidate)
        cache, denoised = ours.new_cache(), []
        for context, start in ((PREFIX, 0), (tokens[:LENGTH], LENGTH)):
            ours.encode([Piece(np.array(context, np.int32), cache)])
            canvas = tokens[start : start + LENGTH]
            denoised.append(given(ours.logits([Row(np.array(canvas, np.int32), cache, 1.0)])[0], canvas))
        holes = np.array(row) == FREE
        # 7 + 2 + 2 + 1 tokens in 16 positions leave room for the tail and the end in every candidate
        text = tokens[: row.index(52) + 2]
        [logits] = ours.logits([Piece(np.array([*PREFIX, *text], np.int32), ours.new_cache())])
        causal = given(logits[len(PREFIX) - 1 : -1], text)
        what = f"{backend_name}, lengths {candidate.lengths}"
        assert_close(candidate.canvas_logprob, np.concatenate(denoised)[holes].mean(), 1e-4, f"denoiser, {what}")
        assert_close(candidate.causal_logprob, causal.mean(), 1e-4, f"causal, {what}")
        assert candidate.score == candidate.canvas_logprob + candidate.causal_logprob


def test_what_is_before_the_first_hole_may_lie_in_its_canvas(
    backend: Callable[..., Backend], reference: Callable[..., Reference], backend_name: str
) -> None:
    ours = backend(backend_name, "base", **TUNING)
    found = fill(ours, [PREFIX, Hole(2, 3), [50]], CONFIG, seed=3, frame=Frame((1, 0), in_canvas=4))
    for candidate in found:
        row = [*PREFIX[-4:], *[FREE] * candidate.lengths[0], 50, *([1, 0])][:LENGTH]
        row += [0] * (LENGTH - len(row))
        config = CONFIG.replace(max_new_tokens=LENGTH)
        theirs = reference("base", **TUNING).generate(np.array([PREFIX[:-4]]), [3], config, frozen=np.array(row, np.int32))
        assert filled(row, candidate) == theirs.tokens[0].tolist()
        text = np.array([*PREFIX, *candidate.holes[0], 50], np.int32)
        plain = ours.score([Piece(text, ours.new_cache())])[0][len(PREFIX) :].mean()
        assert_close(candidate.causal_logprob, plain, 1e-4, f"causal, {backend_name}, from the first hole on")


@pytest.mark.parametrize("name", ["between", "unknown, over the edge of a canvas"])
def test_the_reference_behind_the_same_protocol(
    backend: Callable[..., Backend], checkpoint: Callable[..., Path], backend_name: str, name: str
) -> None:
    theirs = load_reference(Checkpoint.open(checkpoint("base", **TUNING)))
    found, expected = (fill(each, TEMPLATES[name], CONFIG, seed=9) for each in (backend(backend_name, "base", **TUNING), theirs))
    assert [(each.lengths, each.holes, each.steps) for each in found] == [(e.lengths, e.holes, e.steps) for e in expected]
    for attribute in ("canvas_logprob", "causal_logprob"):
        values = ([getattr(candidate, attribute) for candidate in candidates] for candidates in (found, expected))
        assert_close(*values, 1e-4, f"{attribute}, {backend_name}")


def test_candidates_share_the_prefix() -> None:
    fake = FakeBackend(lambda asked: full(7))
    found = fill(fake, [[1, 2, 3, 4], Hole(1, 3), [5], Hole(1, 4)], FAKE, seed=0)
    assert len(found) == 12
    prefix, *canvases = fake.tokens_of("encode")
    assert prefix == [[1, 2, 3, 4]], "encoded once, and never again"
    assert [len(pieces) for pieces in canvases] == [8, 4], "each has two canvases, and commits the first"
    written = [piece for pieces in canvases for piece in pieces]
    assert {len(piece) for piece in written} == {L}
    cached = {block: [asked.cached for asked in fake.asked if asked.block == block] for block in (0, 1)}
    assert cached[0] == [[1, 2, 3, 4]] * 12
    assert cached[1] == [[1, 2, 3, 4, *piece] for piece in written], "each goes on from its own"


@pytest.mark.parametrize(
    ("batch", "exact_rows", "rows"),
    [("exact", True, [8, 8, 4, 4]), ("exact", False, [1] * 24), ("fast", False, [8, 8, 4, 4]), ("fast", True, [8, 8, 4, 4])],
)
def test_how_many_candidates_go_into_one_pass(batch: str, exact_rows: bool, rows: list[int]) -> None:
    """12 candidates of two canvases each, and one step per canvas."""
    fake = FakeBackend(lambda asked: full(7), exact_rows=exact_rows)
    fill(fake, [[1], Hole(1, 3), [5], Hole(1, 4)], FAKE, seed=0, batch=batch)
    assert [len(canvases) for canvases in fake.tokens_of("denoise")] == rows


@pytest.mark.parametrize("batch", ["exact", "fast"])
def test_candidates_do_not_know_of_each_other(backend: Callable[..., Backend], backend_name: str, batch: str) -> None:
    one = backend(backend_name, "base", **TUNING)
    together = fill(one, TEMPLATES["unknown"], CONFIG, seed=8, batch=batch)
    assert len(together) == 6
    for candidate in together:
        first, second = (Hole(length, length) for length in candidate.lengths)
        [alone] = fill(one, [PREFIX, first, [50, 51], second, [52]], CONFIG, seed=8)
        assert (alone.holes, alone.steps) == (candidate.holes, candidate.steps)
        assert alone.score == pytest.approx(candidate.score, abs=1e-4)


def test_the_better_score_comes_first() -> None:
    # The denoiser writes the position's number. The causal model scores large tokens low, the denoiser even ones.
    fake = FakeBackend(
        lambda asked: full(np.arange(L) + 10),
        causal=lambda tokens: -tokens / 10.0,
        canvas=lambda tokens: -1.0 * (tokens % 2 == 0),
    )
    found = fill(fake, [[1, 2], Hole(1, 3), [20]], FAKE, seed=0)
    scores = {1: -1.0 - 3.0 / 2, 2: -0.5 - 4.1 / 3, 3: -2 / 3 - 5.3 / 4}
    assert [candidate.lengths[0] for candidate in found] == sorted(scores, key=lambda length: -scores[length])
    for candidate in found:
        assert candidate.score == pytest.approx(scores[candidate.lengths[0]], abs=1e-6)


def test_an_end_token_ends_its_hole_and_not_the_text() -> None:
    fake = FakeBackend(lambda asked: full([30, 49, 31, 49, 32, 33]), canvas=lambda tokens: -1.0 * tokens)
    first, second = fill(fake, [[1], Hole(3, 3), Hole(1, 1), [9, 8]], FAKE, seed=0)[0].holes
    assert (first, second) == ((30,), ())
    candidate = fill(fake, [[1], Hole(3, 3)], FAKE, seed=0)[0]
    assert candidate.canvas_logprob == pytest.approx(-(30 + 49) / 2), "the end token was written too, and nothing behind it"
    assert fake.tokens_of("score") == [[[30, 9, 8]], [[30, 49]]], "where nothing follows, it is what ends the text"


def test_what_follows_the_holes_is_shown_as_far_as_it_fits() -> None:
    fake = FakeBackend(lambda asked: full(7))
    tail = list(range(20, 30))
    fill(fake, [[1], Hole(2, 4), tail], FAKE, seed=0, frame=Frame((40, 0), tail_in_prompt=True))
    assert templates(fake) == [[-1, -1, 20, 21, 22, 23], [-1, -1, -1, 20, 21, 22], [-1, -1, -1, -1, 20, 21]]
    scored = [[*[7] * n, 20, 21] for n in (2, 3, 4)]
    assert fake.tokens_of("score") == [[text] for text in scored], "only what all candidates show is compared"
    fake = FakeBackend(lambda asked: full(7))
    fill(fake, [[1], Hole(1, 2), [20]], FAKE, seed=0, frame=Frame((40, 0)))
    assert templates(fake) == [[-1, 20, 40, 0, 0, 0], [-1, -1, 20, 40, 0, 0]]
    assert fake.tokens_of("score") == [[[7, 20, 40]], [[7, 7, 20, 40]]]


def templates(fake: FakeBackend) -> list[list[int]]:
    """The frozen templates of the rows that the fake denoised."""
    return [asked.row.frozen.tolist() for asked in fake.asked if asked.row.frozen is not None]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_checkpoint(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def model(folder: Path, backend_name: str) -> DiffusionGemma:
    return load(folder, backend=backend_name)


PIECES = [
    "The sky",
    " is blue",
    "<hole",
    "  ",
    "\r\n",
    "café ",
    "🌊",
    "naïve▁",
    "\u200b",
    ", because",
    "x[i]",
    " a",
    "\t",
    "空",
    ">",
]


def random_template(rng: np.random.Generator) -> list[str | Hole]:
    """Holes of 1 to 3 tokens, or one longer than a canvas, with few enough tokens after the last one."""
    parts: list[str | Hole] = []
    for _ in range(rng.integers(1, 4)):
        if rng.random() < 0.7:
            parts.append("".join(rng.choice(PIECES, rng.integers(1, 4))))
        length = CANVAS + 1 if rng.random() < 0.05 else int(rng.integers(1, 4))
        parts.append(Hole(length, length))
    if rng.random() < 0.7:
        parts.append("".join(rng.choice(PIECES, rng.integers(1, 4))))
    return parts


class Watched:
    """A backend that records the committed canvases and the prompt.

    Attributes:
        canvases: the committed canvases of each text, in the order in which the texts began.
        prompt: the tokens encoded before the first canvas.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend, self.config = backend, backend.config
        self.begun: list[tuple[Cache, list[NDArray[np.int32]]]] = []
        self.prompt: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def encode(self, pieces: Sequence[Piece]) -> None:
        if not self.begun:
            self.prompt += [token for piece in pieces for token in piece.tokens.tolist()]
        self.backend.encode(pieces)

    def launch(self, rows: Sequence[Row]) -> Pending:
        self.begun += [(row.cache, []) for row in rows if all(row.cache is not cache for cache, _ in self.begun)]
        return self.backend.launch(rows)

    def score_canvas(self, rows: Sequence[Row]) -> list[NDArray[np.float32]]:
        for row in rows:
            next(canvases for cache, canvases in self.begun if cache is row.cache).append(row.canvas)
        return self.backend.score_canvas(rows)

    @property
    def canvases(self) -> list[NDArray[np.int32]]:
        return [np.concatenate(canvases) for _, canvases in self.begun]


def test_nothing_outside_the_holes_ever_changes(model: DiffusionGemma, backend_name: str) -> None:
    rng = np.random.default_rng(BACKENDS.index(backend_name))
    count, refused, whole, committed = 1000 // len(BACKENDS), 0, 0, 0
    for number in range(count):
        watched = Watched(model.backend)
        editor = DiffusionGemma(model.checkpoint, watched)
        editor.tokenizer = model.tokenizer
        parts = random_template(rng)
        raw = bool(rng.random() < 0.5)
        # the short instruction makes a chat as cheap as a raw text
        prompt = None if raw else [2, 105, 9, 106]
        holes = [part for part in parts if isinstance(part, Hole)]
        ids = [model.tokenizer.encode(part) if isinstance(part, str) else [FREE] * part.most for part in parts]
        span = sum(map(len, ids[isinstance(parts[0], str) : None if isinstance(parts[-1], Hole) else -1]))
        options: dict[str, Any] = {"prompt": prompt, "raw": raw, "seed": number, "max_denoising_steps": 1}
        fits = not raw and sum(map(len, ids)) <= CANVAS
        if not fits and isinstance(parts[-1], str) and len(ids[-1]) > -span % CANVAS:
            tail, room = len(ids[-1]), -span % CANVAS
            told = f"there are {tail} tokens after the last hole, but its canvas of {CANVAS} has room for {room};"
            with pytest.raises(InputError, match=told):
                infill(editor, parts, **options)
            refused += 1
            continue
        result = infill(editor, parts, **options)
        assert len(result.fillings) == 1
        texts = iter(result.holes)
        assert result.text == "".join(next(texts) if isinstance(part, Hole) else part for part in parts)
        [written] = watched.canvases
        row = laid_out(
            [[], *(part if isinstance(part, Hole) else encoded for part, encoded in zip(parts, ids, strict=True))],
            [hole.most for hole in holes],
            len(written),
        )
        if fits and isinstance(parts[0], str):
            row = [*ids[0], *row][: len(written)]  # in a chat, a text of one canvas starts at its first token
            whole += 1
        known = np.array(row) != FREE
        np.testing.assert_array_equal(written[known], np.array(row)[known], f"template {number}: {parts}")
        committed += len(written) // CANVAS
    print(f"{count} templates, {refused} with too much behind the last hole, {committed} committed canvases")
    assert 0 < refused < 0.4 * count
    assert whole > 0


def test_a_chat_is_asked_to_fill_the_gaps(model: DiffusionGemma) -> None:
    head, tail = map(model.tokenizer.encode, ("The ", " is blue."))
    for template, given in (
        ("The <hole:2> is blue.", []),
        ("The <hole:3-7> is blue.", head),
    ):  # the second one exceeds a canvas of 8
        watched = Watched(model.backend)
        infill(DiffusionGemma(model.checkpoint, watched), template, seed=1)
        prompt = model.tokenizer.decode(watched.prompt)
        assert prompt.endswith("\n\nThe ____ is blue.\nmodel\n" + model.tokenizer.decode(given))
        assert GAP == "____"
        canvas = watched.canvases[0]
        answer = [*([] if given else head), *[FREE] * (3 if given else 2), *tail, 106, *[0] * CANVAS]
        known = np.array(answer[: len(canvas)]) != FREE
        np.testing.assert_array_equal(canvas[known], np.array(answer)[: len(canvas)][known])
    result = infill(model, "The <hole:2> is blue.", seed=1)
    assert re.fullmatch(r"The .* is blue\.", result.text, re.DOTALL)
    assert (result.text, result.seed) == (infill(model, "The <hole:2> is blue.", seed=1).text, 1)


def test_markup_in_a_template_is_plain_text_unless_it_is_asked_for(model: DiffusionGemma) -> None:
    for markup in (False, True):
        watched = Watched(model.backend)
        result = infill(DiffusionGemma(model.checkpoint, watched), "<hole:1><turn|>", prompt="Why?", markup=markup, seed=1)
        assert result.text.endswith("<turn|>")
        [written] = watched.canvases
        shown = model.tokenizer.encode("<turn|>", markup=markup)
        assert (model.tokenizer.end_of_turn_id in shown) == markup
        assert written[1 : 1 + len(shown)].tolist() == shown


@pytest.mark.parametrize(
    ("text", "marker", "expected"),
    [
        ("a<hole>b", "<hole>", ["a", Hole(), "b"]),
        ("<hole:5>", "<hole>", [Hole(5, 5)]),
        ("<hole:2-8><hole>", "<hole>", [Hole(2, 8), Hole()]),
        ("<hole is none> [GAP:3].", "[GAP]", ["<hole is none> ", Hole(3, 3), "."]),
        ("x ___ y __:2_\n", "___", ["x ", Hole(), " y ", Hole(2, 2), "\n"]),
        ("<holes> <hole>", "<hole>", ["<holes> ", Hole()]),
    ],
)
def test_markers(text: str, marker: str, expected: list[str | Hole]) -> None:
    assert parse_template(text, marker) == expected


@pytest.mark.parametrize(
    ("text", "marker", "told"),
    [
        ("no hole", "<hole>", "the text has no hole; write <hole> where"),
        ("a <hole:5> b", "[x]", "the text has no hole; write [x] where"),
        ("a <hole:8-2>", "<hole>", "a hole's range is in the wrong order: 8-2; write 2-8"),
        ("a <hole:0>", "<hole>", "a hole's length must be an integer of at least 1, got 0"),
        ("a <hole:some>", "<hole>", "<hole:some> has no valid length; end a hole of 5 tokens in :5>"),
        ("a <hole:>", "<hole>", "<hole:> has no valid length"),
        ("a ____ b", "___", "the marker '___' overlaps itself at character 3"),
        ("a <hole>", "<", "the marker '<' must have 2 to 64 characters"),
        ("a <hole>", " <hole>", "no white space around it"),
        ("a <hole:2>", "<hole:2>", "no colon"),
    ],
)
def test_bad_markers(text: str, marker: str, told: str) -> None:
    with pytest.raises(InputError) as error:
        parse_template(text, marker)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "options", "told"),
    [
        ([[1, 2, 3]], {}, "the template has no hole"),
        ([Hole(), [1]], {}, "the template begins with a hole"),
        ([[1], Hole(2, 2), [4] * 5], {}, "there are 5 tokens after the last hole, but its canvas of 6 has room for 4"),
        ([[1], Hole(1, 8), [4] * 5], {}, "there are 5 tokens after the last hole, but its canvas of 6 has room for 4"),
        (
            [[1], Hole(1, 9), Hole(1, 8)],
            {},
            f"the holes have 72 combinations of lengths, more than the {MAX_CANDIDATES} that are tried; narrow their lengths",
        ),
        ([[1], Hole(), [50]], {}, "token id 50 is outside the vocabulary"),
        (
            [[1, 2], Hole(1, 1)],
            {"frame": Frame(in_canvas=2)},
            "in_canvas must be less than 2, the number of tokens before the first hole, got 2",
        ),
        ([[1] * 60, Hole(1, 1)], {}, "exceed the model's context of 64 tokens"),
        ([[1], Hole(1, 1)], {"seed": -1}, "a seed must be an integer between 0 and 2^64 - 1, got -1"),
        ([[1], Hole(1, 1)], {"batch": "big"}, "unknown batch 'big'; known are exact and fast"),
    ],
)
def test_bad_templates_are_told_before_anything_is_computed(template: list[Any], options: dict[str, Any], told: str) -> None:
    fake = FakeBackend(lambda asked: full(7))
    with pytest.raises(InputError) as error:
        fill(fake, template, FAKE, **{"seed": 0, **options})
    assert told in str(error.value)
    assert not fake.calls


def test_bad_input_to_a_model(model: DiffusionGemma) -> None:
    with pytest.raises(InputError, match="an edited text has its own length; leave out max_new_tokens"):
        infill(model, "a <hole>", max_new_tokens=9)
    with pytest.raises(InputError, match="unknown option 'max_denoising_step'; did you mean max_denoising_steps"):
        infill(model, "a <hole>", max_denoising_step=9)
    with pytest.raises(InputError, match=r"there are \d+ tokens after the last hole, but its canvas of \d+ has room for \d+;"):
        infill(model, "<hole:1> " + "because air scatters blue light " * 3, raw=True)
    assert infill(model, "<hole:1> " + "because air scatters blue light " * 3, seed=1).text.endswith("blue light ")
    with pytest.raises(InputError, match="a system message needs the chat template; leave out raw"):
        infill(model, "a <hole>", raw=True, system="Be brief.")


def run(*arguments: object, status: int = 0, **options: Any) -> Any:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], **options)
    assert result.exit_code == status, f"status {result.exit_code}: {result.output} {result.exception!r}"
    return result


def test_command(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    expected = infill(model, "Why <hole:1-2> the sky?\r\n  blue", seed=4)
    options = ("--seed", 4)
    result = run("infill", folder, "Why <hole:1-2> the sky?\r\n  blue", *options)
    assert result.stdout_bytes.decode() == expected.text + "\n"
    assert re.search(r"best of 2 candidates; score -\d+\.\d+, \d+ denoising steps; seed: 4\n", result.stderr)
    file = tmp_path / "template.txt"
    for ending in ("", "\n"):
        file.write_bytes(f"Why [gap:1-2] the sky?\r\n  blue{ending}".encode())
        text = run("infill", folder, "--file", file, "--marker", "[gap]", "--quiet", *options)
        assert (text.stdout_bytes, text.stderr) == ((expected.text + ending).encode(), "")
        piped = run("infill", folder, "--marker", "[gap]", "-q", *options, input=file.read_bytes())
        assert piped.stdout_bytes == text.stdout_bytes
    content = json.loads(run("infill", folder, "Why <hole:1-2> the sky?\r\n  blue", "--json", *options).stdout)
    assert (content["text"], content["holes"], content["seed"]) == (expected.text, list(expected.holes), 4)
    assert [candidate["score"] for candidate in content["candidates"]] == [
        pytest.approx(filling.candidate.score) for filling in expected.fillings
    ]
    assert content["candidates"][0]["holes"] == content["holes"]
    raw = run("infill", folder, "The <hole:2>", "--raw", "--prompt", "Why?", "--max-denoising-steps", 2, *options).stdout_bytes
    assert raw.decode() == infill(model, "The <hole:2>", raw=True, prompt="Why?", max_denoising_steps=2, seed=4).text + "\n"
    told = run("infill", folder, "no hole", status=2).stderr
    assert told == "mlx-diffgemma: error: the text has no hole; write <hole> where the model should write\n"
    assert "a template was given both" in run("infill", folder, "a", "--file", file, status=2).stderr
