"""Causal mode and scoring, against `transformers`' encoder, its norm and tied head, and against plain definitions."""

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mlx_diffgemma import Block, CausalConfig, GenerationConfig, InputError, noise
from mlx_diffgemma.backends import SCORE_TILE, Backend, Cache, Piece, Row, load_backend
from mlx_diffgemma.causal import causal, choose, floor
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.sampler import Text, block_diffusion
from support.causal_checks import log_softmax, picked, written
from support.comparing import BACKENDS, assert_close
from support.fake import FakeBackend, FakeCache, L, V
from support.reference import REAL_VOCABULARY, Reference, make_checkpoint

ATOL = 1e-4
SHAPES = ("base", "odd_sizes", "window_below_canvas", "six_layers")

#: Low scalars let later layers outweigh earlier ones. With others, a random model repeats its last token.
LIVELY = {"layer_scalars": (0.05, 0.1)}

Load = Callable[..., Backend]
Oracle = Callable[..., Reference]


def random_tokens(backend: Backend, length: int, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, backend.config.vocab_size, length, dtype=np.int32)


def score(backend: Backend, tokens: NDArray[np.int32], cache: Cache | None = None) -> NDArray[np.float32]:
    """The score of one text."""
    [logprobs] = backend.score([Piece(tokens, backend.new_cache() if cache is None else cache)])
    return logprobs


def by_softmax(backend: Backend, tokens: NDArray[np.int32]) -> NDArray[np.float64]:
    """The log-probabilities of all tokens but the first, from the backend's own logits."""
    [logits] = backend.logits([Piece(tokens, backend.new_cache())])
    return picked(log_softmax(logits)[:-1], tokens[1:])


# Scoring.


@pytest.mark.parametrize("shape", SHAPES)
def test_score_is_the_log_softmax_of_the_reference(backend: Load, reference: Oracle, backend_name: str, shape: str) -> None:
    ours, oracle = backend(backend_name, shape), reference(shape)
    window = ours.config.sliding_window
    for seed in range(2):
        tokens = random_tokens(ours, 4 * window + 3, seed)
        expected = picked(log_softmax(oracle.causal_logits([tokens[None]])[0])[:-1], tokens[1:])
        for ends in ([], [1], [window - 1, window + 1], [1, 2, 3 * window]):
            cache = ours.new_cache()
            scored = np.concatenate([score(ours, part, cache) for part in np.split(tokens, ends)])
            assert (scored.dtype, len(cache)) == (np.float32, len(tokens))
            assert np.isnan(scored[0]), "the very first token has no condition"
            assert_close(scored[1:], expected, ATOL, f"{backend_name}, {shape}, scored in parts ending at {ends}")


def test_unequal_pieces_are_scored_side_by_side(backend: Load, reference: Oracle, backend_name: str) -> None:
    """Pieces at the start of a text, and pieces after a cached prefix."""
    ours, oracle = backend(backend_name, "odd_sizes"), reference("odd_sizes")
    texts = [random_tokens(ours, length, length) for length in (1, 7, 40, 23)]
    known = [0, 3, 0, 22]
    caches = [ours.new_cache() for _ in texts]
    encoded = [Piece(text[:count], cache) for text, count, cache in zip(texts, known, caches, strict=True) if count]
    ours.encode(encoded)
    scores = ours.score([Piece(text[count:], cache) for text, count, cache in zip(texts, known, caches, strict=True)])
    for text, count, cache, scored in zip(texts, known, caches, scores, strict=True):
        case = f"{backend_name}, {len(text)} tokens, of which {count} were cached"
        assert (len(scored), len(cache)) == (len(text) - count, len(text)), case
        assert np.isnan(scored[:1]).all() == (count == 0), case
        if len(text) > 1:
            expected = picked(log_softmax(oracle.causal_logits([text[None]])[0])[:-1], text[1:])
            assert_close(scored[not count :], expected[max(0, count - 1) :], ATOL, case)


def test_score_goes_on_after_encode_and_a_canvas(backend: Load, backend_name: str) -> None:
    ours = backend(backend_name, "base")
    tokens = random_tokens(ours, 30)
    whole, cache = score(ours, tokens), ours.new_cache()
    ours.encode([Piece(tokens[:13], cache)])
    ours.denoise([Row(random_tokens(ours, 8, 1), cache, 1.0)])
    assert_close(score(ours, tokens[13:], cache), whole[13:], ATOL, "scored behind an encoded prefix")


def test_score_is_what_one_token_steps_sum_to(backend: Load, backend_name: str) -> None:
    ours = backend(backend_name, "six_layers")
    tokens, cache, steps = random_tokens(ours, 40), ours.new_cache(), []
    for position in range(39):
        ours.encode([Piece(tokens[position : position + 1], cache)])
        [logits] = ours.next_logits([cache])
        steps.append(log_softmax(logits)[tokens[position + 1]])
    scored = score(ours, tokens)[1:]
    assert_close(scored, steps, ATOL, f"{backend_name}, each token")
    assert_close(scored.sum(dtype=np.float64), sum(steps), ATOL, f"{backend_name}, the sum of {len(steps)}")


def test_score_of_more_positions_than_have_logits_at_once(backend: Load, backend_name: str) -> None:
    ours = backend(backend_name, "base")
    tokens = random_tokens(ours, SCORE_TILE + 7)  # two tiles; the second one is not full
    whole = score(ours, tokens)
    assert_close(whole[1:], by_softmax(ours, tokens), ATOL, "in tiles")
    cache = ours.new_cache()
    parts = [score(ours, part, cache) for part in np.split(tokens, range(50, len(tokens), 50))]
    assert_close(np.concatenate(parts)[1:], whole[1:], ATOL, "in pieces")
    others = [random_tokens(ours, length, length) for length in (SCORE_TILE // 2, 9)]
    texts = [others[0], tokens, others[1]]  # the second text begins within a tile, the third after one
    together = ours.score([Piece(text, ours.new_cache()) for text in texts])
    for scored, text in zip(together, texts, strict=True):
        assert_close(scored[1:], score(ours, text)[1:], ATOL, f"{len(text)} tokens beside others")


def test_score_at_the_real_vocabulary(backend_name: str, tmp_path: Path) -> None:
    """A naive float32 sum over 262,144 terms is off by more than 1e-3."""
    ours = load_backend(Checkpoint.open(make_checkpoint(tmp_path, REAL_VOCABULARY)), backend_name, dtype="float32")
    tokens = random_tokens(ours, 9)
    assert_close(score(ours, tokens)[1:], by_softmax(ours, tokens), 2e-5, f"{backend_name} at V = 262,144")


def test_the_reference_as_a_backend_scores_too(checkpoint: Callable[..., Path], backend: Load) -> None:
    loaded = importlib.import_module("mlx_diffgemma.backends.torch.reference").load(Checkpoint.open(checkpoint("base")))
    ours = backend(BACKENDS[0], "base")
    texts = [random_tokens(ours, 25, seed) for seed in range(2)]
    theirs, mine = ([each.new_cache() for _ in texts] for each in (loaded, ours))
    for start, end in ((0, 1), (1, 12), (12, 25)):
        answers = [
            each.score([Piece(text[start:end], cache) for text, cache in zip(texts, caches, strict=True)])
            for each, caches in ((loaded, theirs), (ours, mine))
        ]
        for right, answer in zip(*answers, strict=True):
            np.testing.assert_array_equal(np.isnan(right), np.isnan(answer))
            assert_close(np.nan_to_num(answer), np.nan_to_num(right), ATOL, "score")
    assert_close(ours.next_logits(mine), loaded.next_logits(theirs), ATOL, "what comes next")


# Sampling.


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("committed", [(), (8, 8, 8)])
def test_greedy_tokens_are_those_of_the_reference(
    backend: Load, reference: Oracle, backend_name: str, shape: str, committed: tuple[int, ...]
) -> None:
    ours, oracle = backend(backend_name, shape, **LIVELY), reference(shape, **LIVELY)
    count, rows = 2 * ours.config.sliding_window + 5, 2
    config = CausalConfig(max_new_tokens=count, greedy=True, eos_token_ids=())
    texts, tokens, caches = [], [], []
    for row in range(rows):
        cache, text = ours.new_cache(), np.empty(0, np.int32)
        for index, length in enumerate(committed):
            block = random_tokens(ours, length, seed=10 * row + index)
            ours.encode([Piece(block, cache)])
            text = np.concatenate([text, block])
        prompt = random_tokens(ours, 5, seed=100 + row)
        tokens.append(written(causal(ours, Text(prompt, cache=cache), config)))
        texts.append(np.concatenate([text, prompt]))
        caches.append(cache)
    batch = np.stack(texts)
    for _ in range(count):
        best = oracle.causal_logits([batch])[:, -1].argmax(axis=-1)
        batch = np.concatenate([batch, best[:, None].astype(np.int32)], axis=1)
    np.testing.assert_array_equal(np.stack(tokens), batch[:, -count:])
    assert len(np.unique(tokens)) > 3, "a text of few words proves little"
    assert [len(cache) for cache in caches] == [batch.shape[1] - 1] * rows, "all but the last token are in the cache"


def plainly_kept(scores: NDArray[np.float32], top_k: int | None, top_p: float | None) -> set[int]:
    """top_k, then top_p, from their definitions; no two scores are equal."""
    order = sorted(range(len(scores)), key=lambda token: -scores[token])[:top_k]
    weights = [math.exp(float(scores[token]) - float(scores.max())) for token in order]
    if top_p is None:
        return set(order)
    for count in range(1, len(order) + 1):
        if sum(weights[:count]) >= top_p * sum(weights):
            return set(order[:count])
    return set(order)


@given(
    st.integers(0, 2**32), st.integers(1, 60), st.floats(0.05, 20), st.none() | st.integers(1, 70), st.none() | st.floats(0.01, 1)
)
def test_floor_leaves_what_the_plain_definitions_leave(
    seed: int, size: int, scale: float, top_k: int | None, top_p: float | None
) -> None:
    scores = (np.random.default_rng(seed).permutation(size) * scale / size - 3).astype(np.float32)
    left = np.flatnonzero(scores >= floor(scores, top_k, top_p))
    assert set(left.tolist()) == plainly_kept(scores, top_k, top_p)


def test_equally_likely_tokens_stay_together() -> None:
    scores = np.array([1, 3, 2, 2, 0], np.float32)
    assert floor(scores, None, None) == -np.inf
    assert floor(scores, 2, None) == 2
    assert floor(scores, None, 0.6) == 2  # the best alone has .53, the next two .20 each
    assert floor(scores, 1, 0.99) == 3


@given(st.integers(0, 2**32), st.floats(0.01, 100), st.floats(0.05, 30))
def test_sparing_noise_changes_no_choice(seed: int, temperature: float, spread: float) -> None:
    logits = np.random.default_rng(seed).normal(size=500).astype(np.float32) * np.float32(spread)
    key = noise.causal_key(seed, 3)
    scores = ((logits - logits.max()) / np.float64(temperature)).astype(np.float32)
    all_noise = noise.gumbel(np.uint32(key), np.zeros((), np.uint32), np.arange(500, dtype=np.uint32))
    assert choose(logits, CausalConfig(temperature=temperature), key) == (scores + all_noise).argmax()


def test_the_lowest_temperatures_take_the_best_token() -> None:
    logits = np.array([1.0, 2.0, 1.9999], np.float32)
    for temperature in (5e-324, 1e-300, 1e-40, 1e-7):
        config = CausalConfig(temperature=temperature)
        assert {choose(logits, config, noise.causal_key(seed, 0)) for seed in range(50)} == {1}, f"temperature {temperature}"


def test_choices_have_the_probabilities_of_the_softmax() -> None:
    logits, draws = np.array([0.0, 1.0, 2.0, -1.0], np.float32), 8_000
    counts = np.bincount([choose(logits, CausalConfig(temperature=2.0), noise.causal_key(seed, 5)) for seed in range(draws)])
    expected = np.exp(log_softmax(logits / 2.0))
    deviation = (counts / draws - expected) / np.sqrt(expected * (1 - expected) / draws)
    print(f"standard deviations off: {deviation.round(2)}")
    assert np.abs(deviation).max() < 4


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "top_k": 12}, {"temperature": 1.7, "top_k": 40, "top_p": 0.8}])
def test_samples_are_those_of_the_references_logits(
    backend: Load, reference: Oracle, backend_name: str, options: dict[str, Any]
) -> None:
    """argmax(logits / T + g) over the remaining tokens, g = -log(-log1p(-u)) from stream 3."""
    ours, oracle = backend(backend_name, "odd_sizes"), reference("odd_sizes")
    config, size = CausalConfig(max_new_tokens=15, eos_token_ids=(), **options), ours.config.vocab_size
    for prompt, seed in ((random_tokens(ours, 7), 4), (random_tokens(ours, 12, 1), 2**63 + 5)):
        tokens, text = written(causal(ours, Text(prompt, seed), config)), prompt
        assert len(tokens) == 15
        for index in range(15):
            scores = oracle.causal_logits([text[None]])[0, -1] / np.float32(config.temperature)
            word = noise.bits(np.uint32(noise.key(seed, 3, index, 0)), np.uint32(0))
            uniform = noise.mix(np.arange(size, dtype=np.uint32) ^ word).astype(np.float32) * 2.0**-32 + 2.0**-33
            allowed = sorted(plainly_kept(scores, config.top_k, config.top_p))
            perturbed = np.full(size, -np.inf)
            perturbed[allowed] = (scores - np.log(-np.log1p(-uniform)))[allowed]
            assert tokens[index] == perturbed.argmax(), f"token {index} of seed {seed}"
            text = np.append(text, tokens[index])


@pytest.mark.skipif(len(BACKENDS) < 2, reason="one backend was asked for")
def test_backends_sample_the_same_tokens(backend: Load) -> None:
    config = CausalConfig(max_new_tokens=60, eos_token_ids=())
    texts = [
        [written(causal(ours, Text(random_tokens(ours, 9, seed), seed), config)) for seed in range(4)]
        for ours in (backend(name, "six_layers") for name in BACKENDS)
    ]
    np.testing.assert_array_equal(texts[0], texts[1])


def test_tokens_of_texts_side_by_side_are_those_of_texts_alone(backend: Load, backend_name: str) -> None:
    """One pass computes the next token of several texts, as an engine does. A text that has ended is no longer in it."""
    ours = backend(backend_name, "base", **LIVELY)
    prompts, seeds = [random_tokens(ours, length, length) for length in (11, 3, 26)], [7, 8, 9]
    config = CausalConfig(max_new_tokens=40, temperature=1.5, eos_token_ids=tuple(range(8)))
    alone = [list(causal(ours, Text(*given, logprobs=True), config)) for given in zip(prompts, seeds, strict=True)]
    lengths = [len(events) for events in alone]
    print(f"lengths {lengths}")
    assert len(set(lengths)) > 1

    caches, pending = [ours.new_cache() for _ in prompts], list(prompts)
    for index in range(max(lengths)):
        going = [row for row in range(3) if index < lengths[row]]
        ours.encode([Piece(pending[row], caches[row]) for row in going])
        for row, logits in zip(going, ours.next_logits([caches[row] for row in going]), strict=True):
            event, token = alone[row][index], choose(logits, config, noise.causal_key(seeds[row], index))
            assert event.token == token, f"token {index} of text {row}"
            assert event.ended == (token in config.eos_token_ids) == (index + 1 == lengths[row] < 40)
            assert event.logprob is not None
            assert_close(event.logprob, log_softmax(logits)[token], ATOL, f"log-probability {index} of text {row}")
            pending[row] = np.array([token], np.int32)


def test_log_probabilities_of_tokens_are_their_score(backend: Load, backend_name: str) -> None:
    ours = backend(backend_name, "base")
    config = CausalConfig(max_new_tokens=12, temperature=3.0, top_k=50, eos_token_ids=())
    for seed in range(2):
        prompt = random_tokens(ours, 11, seed)
        events = list(causal(ours, Text(prompt, seed, logprobs=True), config))
        cache = ours.new_cache()
        ours.encode([Piece(prompt, cache)])
        told = [event.logprob for event in events]
        assert_close(told, score(ours, written(events), cache), ATOL, "whatever the temperature is")  # type: ignore[arg-type]
        assert all(event.logprob is None for event in causal(ours, Text(prompt, seed), config))


# Both modes together.

DIFFUSION = GenerationConfig(max_new_tokens=16, max_denoising_steps=4, eos_token_ids=())
CAUSAL = CausalConfig(max_new_tokens=11, eos_token_ids=())


@pytest.mark.parametrize("shape", ["base", "odd_sizes"])
def test_a_text_goes_from_one_mode_to_the_other(backend: Load, backend_name: str, shape: str) -> None:
    ours = backend(backend_name, shape)
    for length in (5, 14):
        prompt, cache = random_tokens(ours, length, length), ours.new_cache()
        first = blocks_of(block_diffusion(ours, Text(prompt, 1, cache), DIFFUSION))
        second = list(causal(ours, Text(first[-1].tokens, 2, cache), CAUSAL))
        last = np.array([second[-1].token], np.int32)
        third = blocks_of(block_diffusion(ours, Text(last, 3, cache), DIFFUSION))

        text, parts = prompt, [written(first), written(second), written(third)]
        assert [len(part) for part in parts] == [len(first) * len(first[0].tokens), 11, len(parts[0])]
        for part, again in zip(
            parts,
            [
                lambda text: block_diffusion(ours, Text(text, 1), DIFFUSION),
                lambda text: causal(ours, Text(text, 2), CAUSAL),
                lambda text: block_diffusion(ours, Text(text, 3), DIFFUSION),
            ],
            strict=True,
        ):
            np.testing.assert_array_equal(written(again(text)), part, "from one cache, and from a fresh one")
            text = np.concatenate([text, part])
        assert len(cache) == len(text) - len(third[-1].tokens)


def blocks_of(events: Any) -> list[Block]:
    return [event for event in events if isinstance(event, Block)]


def test_log_probabilities_of_blocks_are_the_score_of_the_text(backend: Load, backend_name: str) -> None:
    """For a text that runs out of tokens within its last canvas, and for one that ends with an end token."""
    ours = backend(backend_name, "base")
    length = ours.config.canvas_length
    config = GenerationConfig(max_new_tokens=21, max_denoising_steps=3, eos_token_ids=(), confidence_threshold=0.0)
    prompt = random_tokens(ours, 5)
    free = written(block_diffusion(ours, Text(prompt, 5), config))
    later = free[length:21]
    end = next(int(token) for token in later if token not in free[:length])  # the text ends in a later block
    counts = []
    for ends in ((), (end,)):
        cache, fresh, chosen = ours.new_cache(), ours.new_cache(), config.replace(eos_token_ids=ends)
        plain = blocks_of(block_diffusion(ours, Text(prompt, 5), chosen))
        scored = blocks_of(block_diffusion(ours, Text(prompt, 5, cache, logprobs=True), chosen))
        np.testing.assert_array_equal(written(scored), written(plain))
        assert all(block.logprobs is None for block in plain)
        tokens = written(scored)[:21]
        if ends:
            tokens = tokens[: int(np.flatnonzero(tokens == end)[0]) + 1]
        assert len(cache) == 5 + len(tokens), "the last block is in the cache too, as far as it counts"
        ours.encode([Piece(prompt, fresh)])
        told = np.concatenate([block.logprobs for block in scored if block.logprobs is not None])
        counts.append(len(told))
        assert_close(told, score(ours, tokens, fresh), ATOL, f"{backend_name}, {len(scored)} blocks, {len(told)} tokens")
    assert counts[0] == 21
    assert length < counts[1] < 21


# Without a framework: a backend whose next token is the number of positions before it.


@pytest.fixture
def counting() -> FakeBackend:
    return FakeBackend(lambda asked: pytest.fail("no canvas in the causal mode"))


def passes(backend: FakeBackend) -> list[list[list[int]]]:
    return backend.tokens_of("encode")


def ids(*tokens: int) -> NDArray[np.int32]:
    return np.array(tokens, np.int32)


def test_one_pass_a_token_up_to_the_end(counting: FakeBackend) -> None:
    cache = counting.new_cache()
    config = CausalConfig(max_new_tokens=20, eos_token_ids=(7,), greedy=True)
    events = list(causal(counting, Text(ids(1, 2, 3), cache=cache), config))
    assert [(event.index, event.token, event.ended) for event in events] == [
        (0, 3, False), (1, 4, False), (2, 5, False), (3, 6, False), (4, 7, True)
    ]  # fmt: skip
    assert all(event.seconds >= 0 for event in events)
    assert passes(counting) == [[[1, 2, 3]], [[3]], [[4]], [[5]], [[6]]], "the last token is not encoded"
    assert cache == [1, 2, 3, 3, 4, 5, 6]


def test_a_text_ends_when_it_is_long_enough(counting: FakeBackend) -> None:
    events = list(causal(counting, Text(ids(1, 2, 3)), CausalConfig(max_new_tokens=3, eos_token_ids=(7,), greedy=True)))
    assert [(event.token, event.ended) for event in events] == [(3, False), (4, False), (5, False)]


def test_a_text_may_begin_where_a_cache_ends(counting: FakeBackend) -> None:
    config = CausalConfig(max_new_tokens=2, greedy=True)
    events = list(causal(counting, Text(ids(), cache=FakeCache([1, 2, 3])), config))
    assert written(events).tolist() == [3, 4]
    assert passes(counting) == [[[3]]], "what the cache holds is not encoded again"


def test_whoever_stops_reading_stops_the_computation(counting: FakeBackend) -> None:
    events = causal(counting, Text(ids(1)), CausalConfig(max_new_tokens=20, eos_token_ids=()))
    assert not counting.calls
    for count in (1, 2):
        next(events)
        assert len(passes(counting)) == count


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer from 1 to 16777216, got 0"),
        ({"temperature": 0}, "temperature must be a finite number above 0 (for the most likely token, use greedy), got 0"),
        ({"temperature": -1.0}, "above 0"),
        ({"temperature": math.inf}, "a finite number"),
        ({"temperature": math.nan}, "a finite number"),
        ({"temperature": True}, "a finite number"),
        ({"top_k": 0}, "top_k must be an integer from 1 to 4194304, got 0"),
        ({"top_k": 2.5}, "top_k must be an integer"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "at most 1, got 1.1"),
        ({"top_p": math.nan}, "at most 1, got nan"),
        ({"heat": 1}, "unknown option 'heat'; known are max_new_tokens, temperature,"),
        ({"max_new_token": 1}, "unknown option 'max_new_token'; did you mean max_new_tokens?"),
    ],
)
def test_bad_options(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as error:
        CausalConfig().replace(**options)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"prompt": ids()}, "token ids must be a list of at least one id, got shape [0]"),
        ({"prompt": np.array([[1, 2]], np.int32)}, "token ids must be a list of at least one id, got shape [1, 2]"),
        ({"prompt": ids(V)}, f"token id {V} is outside the vocabulary"),
        ({"prompt": np.zeros(60, np.int32)}, "60 prompt tokens and 5 new tokens exceed the model's context of 64 tokens"),
        ({"cache": FakeCache(range(59))}, "60 prompt tokens and 5 new tokens"),
        ({"seed": -1}, "a seed must be an integer between 0 and 2^64 - 1, got -1"),
        ({"seed": [1, 2]}, "a seed must be an integer between 0 and 2^64 - 1, got [1, 2]"),
        ({"frozen": np.zeros(L, np.int32)}, "frozen and canvas belong to the diffusion mode; leave them out, or change the mode"),
        ({"canvas": np.zeros(L, np.int32)}, "frozen and canvas belong to the diffusion mode; leave them out, or change the mode"),
    ],
)
def test_bad_input_is_told_before_anything_is_computed(counting: FakeBackend, options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as error:
        causal(counting, Text(**{"prompt": ids(1), **options}), CausalConfig(max_new_tokens=5))
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert not counting.calls
