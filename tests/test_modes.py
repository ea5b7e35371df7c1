"""The causal mode and scores as a user sees them: in the pipeline, on the command line and on the terminal."""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mlx_diffgemma import CausalConfig, Content, DiffusionGemma, Generation, InputError, Token, load
from mlx_diffgemma.backends import Piece
from mlx_diffgemma.causal import causal
from mlx_diffgemma.cli import main
from mlx_diffgemma.cli.generate import TextView
from mlx_diffgemma.cli.live import LiveView
from mlx_diffgemma.prefix_cache import Context, read
from mlx_diffgemma.prompts import PromptTokens
from mlx_diffgemma.sampler import Text
from mlx_diffgemma.tokenizer import Tokenizer
from mlx_diffgemma.writing import Event, Writing, write
from support.causal_checks import log_softmax, picked, written
from support.checkpoints import CONTEXT, VOCAB_SIZE, make_chat_checkpoint
from support.comparing import assert_close
from support.fake import MODEL, FakeBackend, FakeCache, L
from support.screen import Screen
from support.tiny_tokenizer import write_tokenizer

ATOL = 1e-4


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_checkpoint(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def model(chat: Path, backend_name: str) -> DiffusionGemma:
    return load(chat, backend=backend_name, dtype="float32")


def test_generate_in_the_causal_mode(model: DiffusionGemma) -> None:
    options: dict[str, Any] = {"mode": "causal", "seed": 3, "max_new_tokens": 30, "temperature": 1.5, "top_k": 100, "top_p": 0.9}
    events = list(model.stream("Why is the sky blue?", **options))
    generation, tokens = events[-1], [event for event in events if isinstance(event, Token)]
    assert {type(event) for event in events[:-1]} == {Token, Content}
    assert isinstance(generation, Generation)
    config = CausalConfig(max_new_tokens=30, temperature=1.5, top_k=100, top_p=0.9, eos_token_ids=(1, 5))
    ids = model.prompt_ids("Why is the sky blue?")
    expected = written(causal(model.backend, Text(ids, 3), config)).tolist()
    assert generation.tokens == expected == model.generate("Why is the sky blue?", **options).tokens
    assert [event.token for event in tokens] == expected
    ended = expected[-1] in (1, 5)
    assert generation.finish_reason == ("stop" if ended else "length")
    assert generation.text == model.tokenizer.decode(expected)
    assert "".join(event.text for event in events if isinstance(event, Content)) == generation.text
    assert (generation.logprobs, generation.seed) == (None, 3)
    statistics = generation.statistics
    assert (statistics.prompt_tokens, statistics.new_tokens) == (len(ids), len(expected))
    assert (statistics.denoising_steps, statistics.denoise_seconds, statistics.tokens_per_forward) == ((), 0, 1)
    assert statistics.tokens_per_second == pytest.approx(len(expected) / statistics.encode_seconds)


def test_the_seconds_of_the_causal_mode_are_those_of_the_prompt_and_of_all_tokens(model: DiffusionGemma) -> None:
    context = read(model.backend, PromptTokens(model.prompt_ids("Why is the sky blue?")), model.piece_rule)
    events = list(write(model.backend, model.tokenizer, context, Writing(CausalConfig(max_new_tokens=5), seed=3)))
    generation, tokens = events[-1], [event for event in events if isinstance(event, Token)]
    assert isinstance(generation, Generation)
    assert context.encode_seconds > 0
    seconds = context.encode_seconds + sum(event.seconds for event in tokens)
    assert generation.statistics.encode_seconds == pytest.approx(seconds)


def test_the_checkpoint_says_what_the_modes_share(model: DiffusionGemma) -> None:
    generation = model.generate("Why?", mode="causal", seed=1)
    saved = model.checkpoint.generation
    assert saved.max_new_tokens == 20
    assert len(generation.tokens) == 20 or generation.tokens[-1] in saved.eos_token_ids


@pytest.mark.parametrize("mode", ["diffusion", "causal"])
def test_log_probabilities_of_a_generation_are_its_score(model: DiffusionGemma, mode: str) -> None:
    for seed in range(4):
        generation = model.generate("Why is the sky blue?", mode=mode, seed=seed, logprobs=True)
        score = model.score(generation.tokens, "Why is the sky blue?")
        assert score.tokens == generation.tokens
        assert generation.logprobs is not None
        assert_close(generation.logprobs, score.logprobs, ATOL, f"{mode}, seed {seed}, {len(score.tokens)} tokens")


def test_score_of_a_text(model: DiffusionGemma) -> None:
    tokenizer, backend, text = model.tokenizer, model.backend, "It is the air."
    tokens = tokenizer.encode(text)
    question = [{"role": "user", "content": "Why is the sky blue?"}]
    for before, options in (
        (tokenizer.chat(question), {"prompt": "Why is the sky blue?"}),
        (tokenizer.chat(question), {"prompt": question}),
        (tokenizer.encode("Why?"), {"prompt": "Why?", "raw": True}),
        ([17, 18, 19], {"prompt": [17, 18, 19]}),
        ([tokenizer.bos_token_id], {}),
    ):
        score = model.score(text, **options)  # type: ignore[arg-type]
        ids = np.array(before + tokens, np.int32)
        [logits] = backend.logits([Piece(ids, backend.new_cache())])
        expected = picked(log_softmax(logits)[:-1], ids[1:])[-len(tokens) :]
        assert score.tokens == tokens
        assert_close(score.logprobs, expected, ATOL, f"{options}")
        assert score.perplexity == pytest.approx(math.exp(-expected.mean()), rel=1e-4)
    alone = model.score(text, raw=True)
    assert math.isnan(alone.logprobs[0])
    assert alone.perplexity == pytest.approx(math.exp(-np.mean(alone.logprobs[1:])))
    assert model.score(tokens, raw=True).logprobs[1:] == alone.logprobs[1:]
    assert math.isnan(model.score([5], raw=True).perplexity)


def test_bad_input_of_the_pipeline(model: DiffusionGemma) -> None:
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: model.stream("a", mode="both"), "unknown mode 'both'; known are diffusion and causal"),
        (lambda: model.stream("a", temperature=1.0), "temperature belongs to the causal mode; leave it out, or change the mode"),
        (lambda: model.stream("a", top_k=3), "top_k belongs to the causal mode"),
        (lambda: model.stream("a", mode="causal", t_max=1.0), "t_max belongs to the diffusion mode; leave it out, or change the"),
        (lambda: model.stream("a", mode="causal", canvas_length=4), "canvas_length belongs to the diffusion mode"),
        (lambda: model.stream("a", mode="causal", heat=1), "unknown option 'heat'; known are max_new_tokens, temperature,"),
        (lambda: model.stream("a", mode="causal", temprature=1), "unknown option 'temprature'; did you mean temperature?"),
        (lambda: model.stream("a", max_new_token=1), "unknown option 'max_new_token'; did you mean max_new_tokens?"),
        (lambda: model.stream("a", mode="causal", top_p=2.0), "top_p must be above 0 and at most 1"),
        (
            lambda: model.stream("a", mode="causal", frozen=np.zeros(1, np.int32)),
            "frozen and canvas belong to the diffusion mode",
        ),
        (lambda: model.stream("a", mode="causal", canvas=np.zeros(L, np.int32)), "frozen and canvas belong to the diffusion"),
        (lambda: model.stream("a", mode="causal", max_new_tokens=CONTEXT), f"exceed the model's context of {CONTEXT} tokens"),
        (lambda: model.score(""), "the text is empty"),
        (lambda: model.score([]), "the text is empty"),
        (lambda: model.score("a", ""), "the prompt is empty"),
        (lambda: model.score([10**6]), "token id 1000000 is outside the vocabulary"),
        (lambda: model.score([5] * CONTEXT), f"have {CONTEXT + 1} tokens, but the model's context is {CONTEXT}; shorten them"),
    ]
    for call, told in cases:
        with pytest.raises(InputError) as error:
            call()
        assert told in str(error.value)
        assert "\n" not in str(error.value)
    model.stream("a", mode="causal", t_max=None)  # the command line passes None for an option that was not given


# The command line.

QUESTION = "Why is the sky blue?"


def test_the_command_writes_what_the_api_writes(chat: Path) -> None:
    given = ["--temperature", "1.5", "--top-k", "100", "--top-p", "0.9", "--max-new-tokens", "15", "--seed", "7"]
    options: dict[str, Any] = {"temperature": 1.5, "top_k": 100, "top_p": 0.9, "max_new_tokens": 15}
    for flags, more in (([], {}), (["--greedy"], {"greedy": True})):
        expected = load(chat).generate(QUESTION, mode="causal", seed=7, **options, **more)
        run = CliRunner().invoke(main, ["generate", str(chat), QUESTION, "--mode", "causal", *given, *flags])
        assert (run.exit_code, run.stdout) == (0, expected.text + "\n")
        assert re.fullmatch(
            rf"18 prompt tokens, {len(expected.tokens)} new tokens in [\d.]+ s \([\d.]+ per second\), one at a time; "
            rf"finish reason: {expected.finish_reason}; seed: 7\n",
            run.stderr,
        )
        run = CliRunner().invoke(main, ["generate", str(chat), QUESTION, "--mode", "causal", *given, *flags, "--json"])
        content = json.loads(run.stdout)
        assert content["tokens"] == expected.tokens
        assert content["statistics"]["denoising_steps"] == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--temperature", "1"], "temperature belongs to the causal mode; leave it out, or change the mode"),
        (["--top-k", "5"], "top_k belongs to the causal mode; leave it out"),
        (["--top-p", "0.5"], "top_p belongs to the causal mode; leave it out"),
        (["--mode", "causal", "--t-max", "1"], "t_max belongs to the diffusion mode; leave it out"),
        (["--mode", "causal", "--canvas-length", "4"], "canvas_length belongs to the diffusion mode"),
        (["--mode", "causal", "--temperature", "0"], "temperature must be a finite number above 0"),
        (["--mode", "causal", "--top-k", "0"], "top_k must be an integer from 1 to 4194304, got 0"),
        (["--mode", "causal", "--top-p", "7"], "top_p must be above 0 and at most 1, got 7.0"),
    ],
)
def test_the_command_refuses(chat: Path, arguments: list[str], told: str) -> None:
    run = CliRunner().invoke(main, ["generate", str(chat), QUESTION, *arguments])
    assert (run.exit_code, run.stdout) == (2, "")
    assert run.stderr.startswith(f"mlx-diffgemma: error: {told}")
    assert run.stderr.count("\n") == 1


# On the terminal.


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_tokenizer(tmp_path, VOCAB_SIZE)
    return Tokenizer.from_folder(tmp_path)


def spelled(tokenizer: Tokenizer, text: str) -> list[int]:
    """``text`` as tokens of one byte each."""
    ids = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in text.encode()]
    return [value for value in ids if value is not None]


def spelling(tokenizer: Tokenizer, tokens: list[int]) -> Iterator[Event]:
    """The events of writing these tokens one at a time, half a second each."""
    config = replace(MODEL, vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT)
    backend = FakeBackend(config=config, following=lambda cached: tokens[len(cached) - 1])
    context = Context(np.array([2], np.int32), FakeCache([2]), (1,))
    writing = Writing(CausalConfig(max_new_tokens=len(tokens), greedy=True, eos_token_ids=()), seed=0)
    for event in write(backend, tokenizer, context, writing):
        yield replace(event, seconds=0.5) if isinstance(event, Token) else event


def test_text_is_shown_by_tokens_and_characters_are_whole(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = [*spelled(tokenizer, "a🌊é"), spelled(tokenizer, "🌊")[0]]
    view, shown = TextView(summary=False), []
    for event in spelling(tokenizer, tokens):
        view(event)
        shown.append((type(event), capsys.readouterr().out))
    nothing = (Token, "")
    assert shown == [
        *[nothing, (Content, "a")],
        *[nothing, nothing, nothing, nothing, (Content, "🌊")],
        *[nothing, nothing, (Content, "é")],
        *[nothing, (Content, "\ufffd"), (Generation, "\n")],
    ]


def test_live_view_of_tokens(tokenizer: Tokenizer) -> None:
    screen, text = Screen(60, 24), "The sky\nis 日本語 \x1b[2J🌊."
    tokens = spelled(tokenizer, text)
    groups: list[list[Event]] = []  # a token with the text that it makes certain; finally the end
    for event in spelling(tokenizer, tokens):
        if isinstance(event, Token | Generation):
            groups.append([])
        groups[-1].append(event)
    assert len(groups) == len(tokens) + 1
    with LiveView(screen.console(), tokenizer.utf8, 100) as show:
        for index, events in enumerate(groups[:-1]):
            for event in events:
                show(event)
            begun = bytes(text.encode()[: index + 1]).decode(errors="ignore").replace("\x1b", "␛")
            rate = "  2.0 per second" if index else ""
            assert screen.lines == [*begun.rstrip(" ").split("\n"), f"{index + 1} tokens{rate}"]
        show(groups[-1][0])
    assert screen.lines == ["The sky", "is 日本語 ␛[2J🌊."]
    assert not screen.cursor_hidden
