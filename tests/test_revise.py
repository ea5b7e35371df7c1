"""Revising and proofreading: which tokens may change, and the meaning of strength 0 and 1."""

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mlx_diffgemma import DiffusionGemma, InputError, load, noise, proofread, revise
from mlx_diffgemma.backends import Backend, Piece, Row
from mlx_diffgemma.cli import main
from mlx_diffgemma.cli.revise import unified_diff
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.editing.proofreading import second_look
from mlx_diffgemma.editing.revising import Original, check_spans, rewrite
from mlx_diffgemma.prompts import PromptTokens
from support.checkpoints import CANVAS, make_chat_checkpoint
from support.comparing import assert_close
from support.fake import FakeBackend, L, V, full

PROMPT = np.array([3, 1, 4], np.int32)
CONFIG = GenerationConfig(max_denoising_steps=2, eos_token_ids=(V - 1,))
TEXT = "The sky is blue, because café light scatters ▁\n"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_checkpoint(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def model(folder: Path, backend_name: str) -> DiffusionGemma:
    return load(folder, backend=backend_name)


@given(st.integers(0, 2**64 - 1), st.floats(0, 1), st.floats(0, 1))
def test_a_position_replaced_at_one_strength_is_replaced_at_every_higher_one(seed: int, one: float, other: float) -> None:
    low, high = (noise.replaced(seed, 2, 40, strength) for strength in sorted((one, other)))
    assert (low <= high).all()
    assert not noise.replaced(seed, 0, 40, 0.0).any()
    assert noise.replaced(seed, 0, 40, 1.0).all()


def test_as_many_are_replaced_as_the_strength_says_whatever_takes_their_place() -> None:
    seeds, length = range(300), 256
    tokens = np.stack([noise.canvas_tokens(seed, 1, 0, length, 64) for seed in seeds])
    for strength in (0.05, 0.3, 0.5, 0.9):
        replaced = np.stack([noise.replaced(seed, 1, length, strength) for seed in seeds])
        assert_close(replaced.mean(), strength, 0.006, f"share replaced at strength {strength}")
        assert_close(tokens[replaced].mean(), 31.5, 0.6, f"mean token that comes in at strength {strength}")
    assert noise.replaced(7, 0, 4, 0.5).tolist() != noise.replaced(8, 0, 4, 0.5).tolist()


def original(draft: NDArray[np.int32], *kept: int) -> Original:
    """A draft whose tokens at some places are kept."""
    return Original(PromptTokens(PROMPT), draft, np.isin(np.arange(len(draft)), kept))


def test_the_first_canvases_are_the_draft_with_noise_in_it() -> None:
    fake = FakeBackend(lambda asked: full(7, 1.0))
    draft = np.arange(2 * L + 2, dtype=np.int32)
    tokens, replaced, steps = rewrite(fake, original(draft), CONFIG, strength=0.4, seed=6)
    assert (tokens.tolist(), steps) == ([7] * len(draft), (2, 2, 2))
    count = 0
    for block in range(3):
        chosen = noise.replaced(6, block, L, 0.4)
        part = np.full(L, -1)
        part[: len(draft[block * L :][:L])] = draft[block * L :][:L]
        count += int((chosen & (part >= 0)).sum())
        canvas = np.where(chosen | (part < 0), noise.canvas_tokens(6, block, 0, L, V), part)
        first = next(asked.canvas for asked in fake.asked if asked.block == block)
        np.testing.assert_array_equal(first, canvas, f"block {block}")
    assert replaced == count
    assert [asked.row.temperature for asked in fake.asked[:2]] == pytest.approx([0.8, 0.6]), "the usual schedule"
    assert [asked.row.self_conditioning for asked in fake.asked[:2]] == [None, (0, 1)]


def test_an_end_token_ends_the_text_unless_something_is_kept() -> None:
    answer = np.full(L, V - 1)
    answer[0] = 9
    fake = FakeBackend(lambda asked: full(answer))
    draft = np.arange(2 * L, dtype=np.int32)
    tokens, _, steps = rewrite(fake, original(draft), CONFIG, strength=1.0, seed=6)
    assert (tokens.tolist(), len(steps)) == ([9, V - 1] + [0] * (2 * L - 2), 1)
    tokens, _, steps = rewrite(fake, original(draft, L + 1), CONFIG, strength=1.0, seed=6)
    assert tokens.tolist() == [9, *[V - 1] * (L - 1), 9, L + 1, *[V - 1] * (L - 2)]
    assert len(steps) == 2


def test_strength_0_gives_the_text_back(model: DiffusionGemma) -> None:
    for text in (TEXT, "▁ ▁\r\n", "空🌊"):
        for options in ({}, {"raw": True}, {"prompt": "Why?"}):
            revision = revise(model, text, 0, seed=1, **options)
            assert (revision.text, revision.replaced, revision.denoising_steps) == (text, 0, ())


@pytest.mark.parametrize("raw", [False, True])
def test_strength_1_is_a_cold_start(model: DiffusionGemma, raw: bool) -> None:
    for seed in range(4):
        revision = revise(model, TEXT, 1, prompt="Why?", raw=raw, seed=seed)
        count = len(model.tokenizer.encode(TEXT))
        length = count if raw else (count + CANVAS) // CANVAS * CANVAS  # plus the end of the turn, rounded up to whole canvases
        generation = model.generate("Why?", raw=raw, seed=seed, max_new_tokens=length)
        assert (revision.text, revision.replaced) == (generation.text, length)
        assert revision.denoising_steps == generation.statistics.denoising_steps
    assert revise(model, TEXT, 0.5, prompt="Why?", raw=raw, seed=0).text not in (TEXT, revision.text)


def test_kept_spans_never_change(model: DiffusionGemma) -> None:
    rng = np.random.default_rng(0)
    changed = 0
    for seed in range(60):
        cuts = sorted(rng.choice(len(TEXT) + 1, 4, replace=False).tolist())
        keep = [(cuts[0], cuts[1]), (cuts[2], cuts[3])]
        strength = float(rng.choice([0.1, 0.5, 1.0]))
        text = revise(model, TEXT, strength, prompt=[2, 105, 9], keep=keep[::-1], seed=seed, max_denoising_steps=1).text
        pattern = ".*".join(re.escape(TEXT[start:end]) for start, end in keep)
        assert re.search(pattern, text, re.DOTALL), f"seed {seed}: {keep} of {TEXT!r} became {text!r}"
        if cuts[0] == 0:
            assert text.startswith(TEXT[: cuts[1]])
        changed += text != TEXT
    assert changed > 50
    assert revise(model, TEXT, 1, keep=[(0, len(TEXT))], raw=True, seed=0).text == TEXT


def test_markup_in_a_text_is_plain_text_unless_it_is_asked_for(model: DiffusionGemma) -> None:
    text = "Blue.<turn|> Red."
    for markup in (False, True):
        ids = model.tokenizer.encode(text, markup=markup)
        assert (model.tokenizer.end_of_turn_id in ids) == markup
        assert revise(model, text, 1, raw=True, markup=markup, seed=0).replaced == len(ids)
        places = [text[doubt.start : doubt.end] for doubt in proofread(model, text, raw=True, markup=markup)]
        assert places, "a random model doubts"
        assert all(len(place) < len("<turn|>") or markup for place in places)


def test_proofread_asks_both_halves_of_the_model(backend: Callable[..., Backend], backend_name: str) -> None:
    ours = backend(backend_name, "base")
    prompt, tokens, ending = np.array([9, 8, 7], np.int32), np.arange(20, 31, dtype=np.int32), (1, 0)
    argmax, canvas_logprobs, causal_logprobs = second_look(ours, PromptTokens(prompt), tokens, CONFIG, ending=ending)

    def logprobs(logits: Any, ids: Any) -> Any:
        wide = np.asarray(logits, np.float64)
        return (wide - np.log(np.exp(wide).sum(-1, keepdims=True)))[np.arange(len(ids)), ids]

    cache, shown = ours.new_cache(), np.array([*tokens, 1, 0, 0, 0, 0], np.int32)
    ours.encode([Piece(prompt, cache)])
    [first] = ours.logits([Row(shown[:8], cache, 1.0)])
    ours.encode([Piece(shown[:8], cache)])
    [second] = ours.logits([Row(shown[8:], cache, 1.0)])
    logits = np.concatenate([first, second])
    assert argmax.tolist() == logits.argmax(-1)[:11].tolist()
    assert_close(canvas_logprobs, logprobs(logits, shown)[:11], 1e-4, "denoiser")
    [whole] = ours.logits([Piece(np.array([9, 8, 7, *tokens], np.int32), ours.new_cache())])
    assert_close(causal_logprobs, logprobs(whole[2:-1], tokens), 1e-4, "causal")


def test_doubts_have_their_place_in_the_text(model: DiffusionGemma) -> None:
    doubts = proofread(model, TEXT, prompt="Why?")
    ids = model.tokenizer.encode(TEXT)
    spans = model.tokenizer.spans(ids, TEXT)
    assert [spans[0][0], spans[-1][1]] == [0, len(TEXT)]
    assert all(before[1] == after[0] for before, after in pairwise(spans) if before != after)
    for span, token in zip(spans, ids, strict=True):
        assert model.tokenizer.decode([token]).strip("\ufffd") in TEXT[slice(*span)].replace("▁", " ")
    assert doubts, "a random model doubts"
    assert [each.doubt for each in doubts] == sorted((each.doubt for each in doubts), reverse=True)
    for each in doubts:
        assert TEXT[each.start : each.end] == each.text
        assert (each.start, each.end) in spans
        assert {type(each.start), type(each.end)} == {int}, "the first character's end was True"
        assert {type(each.canvas_logprob), type(each.causal_logprob)} == {float}
        assert each.doubt == -(each.canvas_logprob + each.causal_logprob) > 0
    raw = proofread(model, TEXT, raw=True)
    assert raw != doubts
    wave = model.tokenizer.spans(model.tokenizer.encode("a🌊b"), "a🌊b")
    assert set(wave) == {(0, 1), (1, 2), (2, 3)}, "the bytes of one character share it"


@pytest.mark.parametrize("strength", [-0.1, 1.01, float("nan"), float("inf")])
def test_bad_strength(model: DiffusionGemma, strength: float) -> None:
    with pytest.raises(InputError, match=r"^strength must be a number from 0 to 1, got "):
        revise(model, TEXT, strength)


@pytest.mark.parametrize(
    ("spans", "told"),
    [
        ([(0, 99)], "the span (0, 99) is empty or outside the text of 10 characters"),
        ([(3, 3)], "the span (3, 3) is empty or outside"),
        ([(-1, 3)], "the span (-1, 3) is empty or outside"),
        ([(5, 8), (2, 6)], "the span (5, 8) overlaps another span; join them"),
    ],
)
def test_bad_spans(spans: list[tuple[int, int]], told: str) -> None:
    with pytest.raises(InputError) as error:
        check_spans(spans, 10)
    assert told in str(error.value)


def test_bad_input(model: DiffusionGemma) -> None:
    for call in (lambda: revise(model, " ", 0.5), lambda: proofread(model, "\n")):
        with pytest.raises(InputError, match="the text is empty"):
            call()
    with pytest.raises(InputError, match=r"a seed must be an integer between 0 and 2\^64 - 1, got -1"):
        revise(model, TEXT, 0.5, seed=-1)
    with pytest.raises(InputError, match="exceed the model's context of 512 tokens"):
        revise(model, TEXT * 20, 0)
    with pytest.raises(InputError, match="an edited text has its own length; leave out max_new_tokens"):
        revise(model, TEXT, 0.5, max_new_tokens=9)
    with pytest.raises(InputError, match="unknown option 'entropy_bounds'; did you mean entropy_bound"):
        revise(model, TEXT, 0.5, entropy_bounds=0.1)


def run(*arguments: object, status: int = 0, **options: Any) -> Any:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], **options)
    assert result.exit_code == status, f"status {result.exit_code}: {result.output} {result.exception!r}"
    return result


def test_command(folder: Path, tmp_path: Path) -> None:
    expected = revise(load(folder), "Why is\nthe sky blue?", 0.6, seed=4)
    options = ("--strength", 0.6, "--seed", 4)
    result = run("revise", folder, "Why is\nthe sky blue?", *options)
    assert result.stdout_bytes.decode() == expected.text + "\n"
    assert re.fullmatch(r"\d+ tokens replaced by noise; denoising steps by block: [\d, ]+; seed: 4\n", result.stderr)
    file = tmp_path / "text.txt"
    file.write_text("Why is\nthe sky blue?\n")
    assert run("revise", folder, "--file", file, "-q", *options).stdout_bytes == result.stdout_bytes
    diff = run("revise", folder, "--file", file, "--diff", "-q", *options).stdout_bytes.decode()
    assert diff == unified_diff("Why is\nthe sky blue?\n", expected.text + "\n", str(file))
    assert diff.startswith(f"--- {file}\n+++ {file} (revised)\n@@ -1,2 ")
    content = json.loads(run("revise", folder, "Why is\nthe sky blue?", "--json", *options).stdout)
    assert content == {**vars(expected), "denoising_steps": list(expected.denoising_steps)}
    assert run("revise", folder, "--file", file, "--diff", "-q", "--strength", 0).stdout == ""
    told = run("revise", folder, "Why?", "--strength", 2, status=2).stderr
    assert told == "mlx-diffgemma: error: strength must be a number from 0 to 1, got 2.0\n"


def test_a_diff_says_where_the_last_line_break_is_missing() -> None:
    assert unified_diff("a\u2028b\nc", "a\u2028b\nd", "x") == (
        "--- x\n+++ x (revised)\n@@ -1,2 +1,2 @@\n a\u2028b\n-c\n\\ No newline at end of file\n+d\n\\ No newline at end of file\n"
    )
    assert unified_diff("a", "a", "x") == ""
