"""Rows and pieces of different texts in one pass: each has the same result as alone."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mlx_diffgemma import noise
from mlx_diffgemma.backends import Backend, Cache, Denoised, Piece, Row
from mlx_diffgemma.errors import InputError
from support.comparing import assert_close
from support.signals import numbers_of

Load = Callable[..., Backend]

SHAPES = ("base", "odd_sizes", "window_below_canvas", "six_layers", "other_constants")
MIXES = 100


@dataclass
class Mix:
    """Texts that differ in everything, and a row for each. Some rows are in a later step of their canvas."""

    backend: Backend
    random: np.random.Generator

    def tokens(self, count: int) -> NDArray[np.int32]:
        return self.random.integers(0, self.backend.config.vocab_size, count).astype(np.int32)

    def cache(self) -> Cache:
        """A cache with a length from 0 to several windows, encoded in up to three pieces."""
        cache, window = self.backend.new_cache(), self.backend.config.sliding_window
        for _ in range(self.random.integers(0, 4)):
            self.backend.encode([Piece(self.tokens(int(self.random.integers(1, 2 * window + 2))), cache)])
        return cache

    def row(self, cache: Cache) -> Row:
        length = int(self.random.integers(1, self.backend.config.canvas_length + 1))
        canvas = self.tokens(length)
        return Row(
            canvas=canvas,
            cache=cache,
            temperature=float(self.random.uniform(0.6, 1.5)),
            noise_key=noise.sampling_key(int(self.random.integers(1 << 30)), 0, 1) if self.random.random() < 0.8 else None,
            frozen=np.where(self.random.random(length) < 0.3, canvas, -1).astype(np.int32)
            if self.random.random() < 0.4
            else None,
        )

    def rows(self) -> list[Row]:
        rows = []
        for _ in range(self.random.integers(1, 9)):
            cache = rows[-1].cache.fork() if rows and self.random.random() < 0.25 else self.cache()
            row = self.row(cache)
            for _ in range(self.random.integers(0, 3)):  # a later step of the canvas
                answer = self.backend.denoise([row])[0]
                row = replace(row, canvas=self.tokens(len(row.canvas)), self_conditioning=answer.self_conditioning)
            rows.append(row)
        return rows


@dataclass
class Differences:
    """The largest differences: absolute for entropies and logits, RMS over RMS for the self-conditioning."""

    tokens: int = 0
    entropy: float = 0.0
    logits: float = 0.0
    signal: float = 0.0

    def add(self, one: Denoised, other: Denoised) -> None:
        self.tokens += bool((one.argmax != other.argmax).any() or (one.sampled != other.sampled).any())
        self.entropy = max(self.entropy, float(np.abs(one.entropy - other.entropy).max()))
        signals = [numbers_of(each.self_conditioning) for each in (one, other)]
        self.signal = max(self.signal, float(np.sqrt(np.square(np.subtract(*signals)).mean() / np.square(signals[0]).mean())))


def test_unequal_rows_are_each_as_alone(backend: Load, backend_name: str) -> None:
    """Equal bit for bit if the backend's rows are exact, otherwise within rounding."""
    found, count = Differences(), 0
    for number in range(MIXES):
        ours = backend(backend_name, SHAPES[number % len(SHAPES)])
        rows = Mix(ours, np.random.default_rng(number)).rows()
        alone = [ours.denoise([row])[0] for row in rows]
        for one, other in zip(alone, ours.denoise(rows), strict=True):
            found.add(one, other)
        logits = [ours.logits([row])[0] for row in rows]
        for one, other in zip(logits, ours.logits(rows), strict=True):
            found.logits = max(found.logits, float(np.abs(one - other).max() / one.std()))
        count += len(rows)
    print(f"{backend_name}: {count} rows in {MIXES} mixes: {found}")
    if ours.exact_rows:
        assert found == Differences()
    assert max(found.entropy, found.logits, found.signal) < 1e-5
    assert found.tokens <= count / 200  # two tokens may tie within rounding


def test_unequal_pieces_are_each_as_alone(backend: Load, backend_name: str) -> None:
    """Compares keys, values, log-probabilities and next logits of texts encoded in one pass."""
    largest = 0.0
    for number in range(40):
        ours = backend(backend_name, SHAPES[number % len(SHAPES)])
        mix = Mix(ours, np.random.default_rng(1000 + number))
        caches = [mix.cache() for _ in range(mix.random.integers(2, 6))]
        others = [cache.fork() for cache in caches]
        pieces = [mix.tokens(int(mix.random.integers(1, 3 * ours.config.sliding_window))) for _ in caches]
        alone = [ours.score([Piece(tokens, cache)])[0] for tokens, cache in zip(pieces, caches, strict=True)]
        together = ours.score([Piece(tokens, cache) for tokens, cache in zip(pieces, others, strict=True)])
        canvas = mix.tokens(ours.config.canvas_length)
        for one, other, cache, twin in zip(alone, together, caches, others, strict=True):
            assert (np.isnan(one) == np.isnan(other)).all()
            largest = max(largest, float(np.nanmax(np.abs(one - other), initial=0.0)))
            logits = (ours.logits([Row(canvas, each, 1.0)])[0] for each in (cache, twin))
            largest = max(largest, float(np.abs(np.subtract(*logits)).max()))
        following = np.abs(ours.next_logits(caches) - ours.next_logits(others)).max()
        largest = max(largest, float(following))
    print(f"{backend_name}: pieces side by side differ by {largest:.1e} at most")
    assert largest <= (0.0 if ours.exact_rows else 3e-5)


def test_a_row_leaves_its_cache_as_it_is(backend: Load, backend_name: str) -> None:
    ours = backend(backend_name, "odd_sizes")
    mix = Mix(ours, np.random.default_rng(5))
    cache, canvas = mix.cache(), mix.tokens(ours.config.canvas_length)
    ours.encode([Piece(mix.tokens(9), cache)])
    before, count = ours.logits([Row(canvas, cache, 1.0)])[0], len(cache)
    for length in (1, 3, ours.config.canvas_length):
        ours.denoise([Row(mix.tokens(length), cache, 0.5)])
        ours.score_canvas([Row(mix.tokens(length), cache, 1.0)])
    assert len(cache) == count
    assert (ours.logits([Row(canvas, cache, 1.0)])[0] == before).all()


def test_what_a_row_must_be(backend: Load, backend_name: str) -> None:
    ours = backend(backend_name, "base")
    cache, canvas = ours.new_cache(), np.zeros(3, np.int32)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"canvas": np.zeros(ours.config.canvas_length + 1, np.int32)}, "tokens exceeds the model's"),
        ({"canvas": np.zeros((1, 3), np.int32)}, "a list of at least one"),
        ({"canvas": np.array([0, 128], np.int32)}, "token id 128 is outside the vocabulary"),
        ({"frozen": np.zeros(2, np.int32)}, "frozen has shape"),
        ({"temperature": 0.0}, "temperature must be above 0"),
    ]
    for change, told in wrong:
        with pytest.raises(InputError, match=told):
            ours.denoise([Row(canvas, cache, 1.0), replace(Row(canvas, cache, 1.0), **change)])


def test_scores_of_a_canvas_are_of_its_own_softmax(backend: Load, backend_name: str) -> None:
    ours = backend(backend_name, "base")
    mix = Mix(ours, np.random.default_rng(7))
    rows = [replace(mix.row(mix.cache()), temperature=temperature) for temperature in (1.0, 0.4)]
    for row, scores in zip(rows, ours.score_canvas(rows), strict=True):
        logits = ours.logits([row])[0].astype(np.float64) / row.temperature
        expected = logits[np.arange(len(row.canvas)), row.canvas] - np.log(np.exp(logits).sum(axis=-1))
        assert_close(scores, expected, 1e-4, f"{backend_name}, temperature {row.temperature}")
