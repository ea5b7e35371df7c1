"""One token at a time, and scoring: against `transformers`' encoder, its norm and tied head, and against plain definitions."""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mlx_diffgemma import Block, CausalConfig, GenerationConfig, InputError, noise
from mlx_diffgemma.backends import SCORE_TILE, Backend, load_backend
from mlx_diffgemma.causal import causal, choose, floor
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.sampler import block_diffusion
from support.causal_checks import log_softmax, picked, written
from support.comparing import BACKENDS, assert_close
from support.fake import FakeBackend, V
from support.reference import REAL_VOCABULARY, Reference, make_checkpoint

ATOL = 1e-4
SHAPES = ("base", "odd_sizes", "window_below_canvas", "six_layers")

#: Where what is new outweighs what was there: a random model of another kind repeats its last token.
LIVELY = {"layer_scalars": (0.05, 0.1)}

Load = Callable[..., Backend]
Oracle = Callable[..., Reference]


def random_tokens(backend: Backend, rows: int, length: int, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, backend.config.vocab_size, (rows, length), dtype=np.int32)


# Scoring.


@pytest.mark.parametrize("shape", SHAPES)
def test_score_is_the_log_softmax_of_the_reference(backend: Load, reference: Oracle, backend_name: str, shape: str) -> None:
    ours, oracle = backend(backend_name, shape), reference(shape)
    window = ours.config.sliding_window
    tokens = random_tokens(ours, 2, 4 * window + 3)
    expected = picked(log_softmax(oracle.causal_logits([tokens]))[:, :-1], tokens[:, 1:])
    for ends in ([], [1], [window - 1, window + 1], [1, 2, 3 * window]):
        cache = ours.new_cache(2)
        scored = np.concatenate([ours.score(part, cache) for part in np.split(tokens, ends, axis=1)], axis=1)
        assert (scored.dtype, len(cache)) == (np.float32, tokens.shape[1])
        assert np.isnan(scored[:, 0]).all(), "the very first token has no condition"
        assert_close(scored[:, 1:], expected, ATOL, f"{backend_name}, {shape}, scored in parts ending at {ends}")


def test_score_goes_on_after_encode_and_a_canvas(backend: Load, backend_name: str) -> None:
    ours = backend(backend_name, "base")
    tokens = random_tokens(ours, 2, 30)
    whole = ours.score(tokens, ours.new_cache(2))
    cache = ours.new_cache(2)
    ours.encode(tokens[:, :13], cache)
    ours.denoise(random_tokens(ours, 2, 8, 1), cache, temperature=1.0)
    assert_close(ours.score(tokens[:, 13:], cache), whole[:, 13:], ATOL, "scored behind an encoded prefix")


def test_score_is_what_one_token_steps_sum_to(backend: Load, backend_name: str) -> None:
    ours = backend(backend_name, "six_layers")
    tokens, cache, steps = random_tokens(ours, 1, 40), ours.new_cache(), []
    for position in range(39):
        logits = ours.encode(tokens[:, position : position + 1], cache, logits=True)
        assert logits is not None
        steps.append(log_softmax(logits)[0, tokens[0, position + 1]])
    scored = ours.score(tokens, ours.new_cache())[0, 1:]
    assert_close(scored, steps, ATOL, f"{backend_name}, each token")
    assert_close(scored.sum(dtype=np.float64), sum(steps), ATOL, f"{backend_name}, the sum of {len(steps)}")


def test_score_in_tiles_and_chunks(backend: Load, backend_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = backend(backend_name, "base")
    tokens = random_tokens(ours, 3, SCORE_TILE // 2 + 3)  # two tiles, the second one short
    whole = ours.score(tokens, ours.new_cache(3))
    logits = ours.logits(tokens, ours.new_cache(3), causal=True)
    assert_close(whole[:, 1:], picked(log_softmax(logits)[:, :-1], tokens[:, 1:]), ATOL, "in tiles")
    monkeypatch.setattr(importlib.import_module(f"mlx_diffgemma.backends.{backend_name}.backend"), "PREFILL_CHUNK", 50)
    assert_close(ours.score(tokens, ours.new_cache(3))[:, 1:], whole[:, 1:], ATOL, "in chunks")


def test_score_at_the_real_vocabulary(backend_name: str, tmp_path: Path) -> None:
    """A naive float32 sum over 262,144 terms is off by more than 1e-3."""
    ours = load_backend(Checkpoint.open(make_checkpoint(tmp_path, REAL_VOCABULARY)), backend_name, dtype="float32")
    tokens = random_tokens(ours, 1, 9)
    logits = ours.logits(tokens, ours.new_cache(), causal=True)
    scored = ours.score(tokens, ours.new_cache())
    assert_close(scored[:, 1:], picked(log_softmax(logits)[:, :-1], tokens[:, 1:]), 2e-5, f"{backend_name} at V = 262,144")


def test_the_reference_as_a_backend_scores_too(checkpoint: Callable[..., Path], backend: Load) -> None:
    loaded = importlib.import_module("mlx_diffgemma.backends.torch.reference").load(Checkpoint.open(checkpoint("base")))
    ours = backend(BACKENDS[0], "base")
    tokens = random_tokens(ours, 2, 25)
    theirs, mine = loaded.new_cache(2), ours.new_cache(2)
    for part in np.split(tokens, [1, 12], axis=1):
        right, answer = loaded.score(part, theirs), ours.score(part, mine)
        np.testing.assert_array_equal(np.isnan(right), np.isnan(answer))
        assert_close(np.nan_to_num(answer), np.nan_to_num(right), ATOL, "score")


# Sampling.


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("committed", [(), (8, 8, 8)])
def test_greedy_tokens_are_those_of_the_reference(
    backend: Load, reference: Oracle, backend_name: str, shape: str, committed: tuple[int, ...]
) -> None:
    ours, oracle = backend(backend_name, shape, **LIVELY), reference(shape, **LIVELY)
    cache, text = ours.new_cache(2), np.empty((2, 0), np.int32)
    for index, length in enumerate(committed):
        block = random_tokens(ours, 2, length, seed=index)
        ours.encode(block, cache)
        text = np.concatenate([text, block], axis=1)
    prompt = random_tokens(ours, 2, 5, seed=9)
    count = 2 * ours.config.sliding_window + 5
    config = CausalConfig(max_new_tokens=count, greedy=True, eos_token_ids=())
    tokens = written(causal(ours, prompt, config, seed=0, cache=cache))
    text = np.concatenate([text, prompt], axis=1)
    for _ in range(count):
        best = oracle.causal_logits([text])[:, -1].argmax(axis=-1)
        text = np.concatenate([text, best[:, None].astype(np.int32)], axis=1)
    np.testing.assert_array_equal(tokens, text[:, -count:])
    assert len(np.unique(tokens)) > 3, "a text of few words proves little"
    assert len(cache) == text.shape[1] - 1, "all but the last token are in the cache"


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
    key = noise.causal_keys([seed], 3)[0]
    scores = ((logits - logits.max()) / np.float64(temperature)).astype(np.float32)
    all_noise = noise.gumbel(key, np.zeros((), np.uint32), np.arange(500, dtype=np.uint32))
    assert choose(logits, CausalConfig(temperature=temperature), key) == (scores + all_noise).argmax()


def test_the_lowest_temperatures_take_the_best_token() -> None:
    logits = np.array([1.0, 2.0, 1.9999], np.float32)
    for temperature in (5e-324, 1e-300, 1e-40, 1e-7):
        config = CausalConfig(temperature=temperature)
        assert {choose(logits, config, key) for key in noise.causal_keys(range(50), 0)} == {1}, f"temperature {temperature}"


def test_choices_have_the_probabilities_of_the_softmax() -> None:
    logits, draws = np.array([0.0, 1.0, 2.0, -1.0], np.float32), 8_000
    counts = np.bincount([choose(logits, CausalConfig(temperature=2.0), key) for key in noise.causal_keys(range(draws), 5)])
    expected = np.exp(log_softmax(logits / 2.0))
    deviation = (counts / draws - expected) / np.sqrt(expected * (1 - expected) / draws)
    print(f"standard deviations off: {deviation.round(2)}")
    assert np.abs(deviation).max() < 4


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "top_k": 12}, {"temperature": 1.7, "top_k": 40, "top_p": 0.8}])
def test_samples_are_those_of_the_references_logits(
    backend: Load, reference: Oracle, backend_name: str, options: dict[str, Any]
) -> None:
    """argmax(logits / T + g) over what is left, g = -log(-log1p(-u)) from stream 3."""
    ours, oracle = backend(backend_name, "odd_sizes"), reference("odd_sizes")
    prompt, seeds = random_tokens(ours, 2, 7), [4, 2**63 + 5]
    config = CausalConfig(max_new_tokens=15, eos_token_ids=(), **options)
    tokens, text, size = written(causal(ours, prompt, config, seed=seeds)), prompt, ours.config.vocab_size
    for index in range(15):
        scores = oracle.causal_logits([text])[:, -1] / np.float32(config.temperature)
        for row, seed in enumerate(seeds):
            word = noise.bits(np.uint32(noise.key(seed, 3, index, 0)), np.uint32(0))
            uniform = noise.mix(np.arange(size, dtype=np.uint32) ^ word).astype(np.float32) * 2.0**-32 + 2.0**-33
            allowed = sorted(plainly_kept(scores[row], config.top_k, config.top_p))
            perturbed = np.full(size, -np.inf)
            perturbed[allowed] = (scores[row] - np.log(-np.log1p(-uniform)))[allowed]
            assert tokens[row, index] == perturbed.argmax(), f"token {index} of row {row}"
        text = np.concatenate([text, tokens[:, index : index + 1]], axis=1)


@pytest.mark.skipif(len(BACKENDS) < 2, reason="one backend was asked for")
def test_backends_sample_the_same_tokens(backend: Load) -> None:
    config = CausalConfig(max_new_tokens=60, eos_token_ids=())
    texts = [
        written(causal(ours, random_tokens(ours, 4, 9), config, seed=[0, 1, 2, 3]))
        for ours in (backend(name, "six_layers") for name in BACKENDS)
    ]
    np.testing.assert_array_equal(texts[0], texts[1])


def test_batched_equals_alone(backend: Load, backend_name: str) -> None:
    ours = backend(backend_name, "base")
    prompt, seeds = random_tokens(ours, 3, 11), [7, 8, 9]
    config = CausalConfig(max_new_tokens=40, eos_token_ids=tuple(range(20)), pad_token_id=99)
    together = list(causal(ours, prompt, config, seed=seeds, logprobs=True))
    lengths = []
    for row in range(3):
        alone = list(causal(ours, prompt[row : row + 1], config, seed=seeds[row], logprobs=True))
        lengths.append(len(alone))
        tokens = written(together)[row]
        assert tokens[: len(alone)].tolist() == written(alone)[0].tolist()
        assert (tokens[len(alone) :] == 99).all(), "padding behind the end"
        assert [bool(event.ended[row]) for event in together] == [event.ended[0] for event in alone] + [True] * (
            len(together) - len(alone)
        )
        own = [event.logprobs[row, 0] for event in together[: len(alone)]]  # type: ignore[index]
        assert_close(own, [event.logprobs[0, 0] for event in alone], ATOL, f"log-probabilities of row {row}")  # type: ignore[index]
    print(f"lengths {lengths}")
    assert len(set(lengths)) > 1
    assert len(together) == max(lengths), "it goes on after the last row has ended"


def test_log_probabilities_of_tokens_are_their_score(backend: Load, backend_name: str) -> None:
    ours = backend(backend_name, "base")
    prompt = random_tokens(ours, 2, 11)
    config = CausalConfig(max_new_tokens=12, temperature=3.0, top_k=50, eos_token_ids=())
    events = list(causal(ours, prompt, config, seed=0, logprobs=True))
    cache = ours.new_cache(2)
    ours.encode(prompt, cache)
    told = np.concatenate([event.logprobs for event in events], axis=1)  # type: ignore[misc]
    assert_close(told, ours.score(written(events), cache), ATOL, "whatever the temperature is")
    assert all(event.logprobs is None for event in causal(ours, prompt, config, seed=0))


# The two modes together.

DIFFUSION = GenerationConfig(max_new_tokens=16, max_denoising_steps=4, eos_token_ids=())
CAUSAL = CausalConfig(max_new_tokens=11, eos_token_ids=())


@pytest.mark.parametrize("shape", ["base", "odd_sizes"])
def test_a_text_goes_from_one_mode_to_the_other(backend: Load, backend_name: str, shape: str) -> None:
    ours = backend(backend_name, shape)
    prompt, cache = random_tokens(ours, 2, 5), ours.new_cache(2)
    first = [event for event in block_diffusion(ours, prompt, DIFFUSION, seed=1, cache=cache) if isinstance(event, Block)]
    second = list(causal(ours, first[-1].tokens, CAUSAL, seed=2, cache=cache))
    third = [e for e in block_diffusion(ours, second[-1].tokens, DIFFUSION, seed=3, cache=cache) if isinstance(e, Block)]

    text, parts = prompt, [written(first), written(second), written(third)]
    for part, again in zip(
        parts,
        [
            lambda text: block_diffusion(ours, text, DIFFUSION, seed=1),
            lambda text: causal(ours, text, CAUSAL, seed=2),
            lambda text: block_diffusion(ours, text, DIFFUSION, seed=3),
        ],
        strict=True,
    ):
        np.testing.assert_array_equal(written(again(text)), part, "from one cache, and from a fresh one")
        text = np.concatenate([text, part], axis=1)
    assert len(cache) == text.shape[1] - third[-1].tokens.shape[1]


def test_log_probabilities_of_blocks_are_the_score_of_the_text(backend: Load, backend_name: str) -> None:
    ours = backend(backend_name, "base")
    prompt, cache = random_tokens(ours, 2, 5), ours.new_cache(2)
    config = GenerationConfig(max_new_tokens=24, max_denoising_steps=3, eos_token_ids=(3, 4), confidence_threshold=0.0)
    plain = [e for e in block_diffusion(ours, prompt, config, seed=5) if isinstance(e, Block)]
    scored = [e for e in block_diffusion(ours, prompt, config, seed=5, cache=cache, logprobs=True) if isinstance(e, Block)]
    np.testing.assert_array_equal(written(scored), written(plain))
    assert all(block.logprobs is None for block in plain)
    assert len(cache) == 5 + written(scored).shape[1], "the last block is in the cache too"
    fresh = ours.new_cache(2)
    ours.encode(prompt, fresh)
    told = np.concatenate([block.logprobs for block in scored], axis=1)  # type: ignore[misc]
    assert_close(told, ours.score(written(scored), fresh), ATOL, f"{backend_name}, {len(scored)} blocks")


# Without a framework: a backend whose next token is always one more than the last.


@dataclass
class Counting(FakeBackend):
    asked: list[NDArray[np.int32]] = field(default_factory=list)

    def encode(self, tokens: NDArray[np.int32], cache: list[int], *, logits: bool = False) -> Any:
        self.asked.append(tokens)
        cache.extend(range(tokens.shape[1]))
        return np.float32(50) * (np.arange(V) == tokens[:, -1:] + 1).astype(np.float32) if logits else None


@pytest.fixture
def counting() -> Counting:
    return Counting(lambda *_: pytest.fail("no canvas in the causal mode"))  # type: ignore[arg-type]


def test_one_pass_a_token_up_to_the_end(counting: Counting) -> None:
    prompt = np.array([[1, 2, 3], [1, 2, 6]], np.int32)
    events = list(causal(counting, prompt, CausalConfig(max_new_tokens=20, eos_token_ids=(9,), pad_token_id=0), seed=0))
    assert written(events).tolist() == [[4, 5, 6, 7, 8, 9], [7, 8, 9, 0, 0, 0]]
    assert [event.ended.tolist() for event in events] == [[False] * 2] * 2 + [[False, True]] * 3 + [[True, True]]
    assert [event.index for event in events] == list(range(6))
    assert [asked.shape for asked in counting.asked] == [(2, 3)] + [(2, 1)] * 5, "the last token is not encoded"


def test_whoever_stops_reading_stops_the_computation(counting: Counting) -> None:
    events = causal(counting, np.array([[1]], np.int32), CausalConfig(max_new_tokens=20), seed=0)
    assert not counting.asked
    for count in (1, 2):
        next(events)
        assert len(counting.asked) == count


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, got 0"),
        ({"temperature": 0}, "temperature must be a finite number above 0 (for the most likely token, use greedy), got 0"),
        ({"temperature": -1.0}, "above 0"),
        ({"temperature": math.inf}, "a finite number"),
        ({"temperature": math.nan}, "a finite number"),
        ({"temperature": True}, "a finite number"),
        ({"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        ({"top_k": 2.5}, "top_k must be an integer"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "at most 1, got 1.1"),
        ({"top_p": math.nan}, "at most 1, got nan"),
        ({"heat": 1}, "unknown generation option 'heat'; known are max_new_tokens, temperature,"),
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
        ({"prompt": np.empty((1, 0), np.int32)}, "at least one position"),
        ({"prompt": np.array([[V]], np.int32)}, f"token id {V} is outside the vocabulary"),
        ({"prompt": np.zeros((1, 60), np.int32)}, "60 prompt tokens and 5 new ones exceed the model's context of 64 tokens"),
        ({"cache": list(range(59))}, "60 prompt tokens and 5 new ones"),
        ({"seed": -1}, "between 0 and 2^64 - 1, got -1"),
        ({"seed": [1, 2]}, "2 seeds for 1 rows"),
    ],
)
def test_bad_input_is_told_before_anything_is_computed(counting: Counting, options: dict[str, Any], told: str) -> None:
    given = {"prompt": np.array([[1]], np.int32), "seed": 0, **options}
    with pytest.raises(InputError) as error:
        causal(counting, config=CausalConfig(max_new_tokens=5), **given)
    assert told in str(error.value)
    assert not counting.asked
