"""Kept caches: cut back and written on from, they hold what a new one would; what is kept is bounded, and found again."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from mlx_diffgemma.backends import Backend
from mlx_diffgemma.prefix_cache import PrefixCache, read
from support.comparing import assert_close
from support.fake import FakeCache

LoadBackend = Callable[..., Backend]


def random_tokens(backend: Backend, count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, backend.config.vocab_size, (1, count)).astype(np.int32)


@pytest.mark.parametrize("place", [1, 3, 20], ids=["shorter than the window", "at its edge", "longer"])
def test_a_cut_cache_goes_on_as_a_new_one(backend: LoadBackend, backend_name: str, place: int) -> None:
    loaded = backend(backend_name, "window_below_canvas")
    tokens, canvas = random_tokens(loaded, 40), random_tokens(loaded, 6, seed=1)
    cache = loaded.new_cache()
    loaded.encode(tokens[:, :place], cache)
    windows = cache.windows()
    loaded.encode(tokens[:, place:], cache)
    whole = loaded.logits(canvas, cache)

    cut = cache.cut(windows)
    assert len(cut) == len(windows) == place
    assert len(cache) == 40
    assert 0 < windows.nbytes < cache.nbytes
    assert cut.nbytes <= cache.nbytes
    fresh = loaded.new_cache()
    loaded.encode(tokens[:, :place], fresh)
    assert_close(loaded.logits(canvas, cut), loaded.logits(canvas, fresh), 1e-4, "a canvas behind a cut cache")
    empty = np.empty((1, 0), np.int32)
    last = loaded.encode(empty, cut, logits=True)
    assert last is not None
    assert_close(last, loaded.logits(tokens[:, :place], loaded.new_cache(), causal=True)[:, -1], 1e-4, "what comes next")

    other = random_tokens(loaded, 30, seed=2)
    loaded.encode(other, cut)
    loaded.encode(other, fresh)
    assert_close(loaded.logits(canvas, cut), loaded.logits(canvas, fresh), 1e-4, "a canvas after other tokens")
    assert_close(loaded.logits(canvas, cache), whole, 0, "the cache that was cut")


@dataclass
class FakeEncoder:
    """Keeps what it was asked to encode."""

    encoded: list[list[int]] = field(default_factory=list)

    def new_cache(self) -> FakeCache:
        return FakeCache()

    def encode(self, tokens: Any, cache: FakeCache) -> None:
        self.encoded.append(tokens[0].tolist())
        cache.extend(tokens[0].tolist())


END = 9


def read_ids(kept: PrefixCache, ids: list[int]) -> tuple[Any, list[list[int]]]:
    """The context of a prompt, and what was encoded for it."""
    backend: Any = FakeEncoder()
    context = read(backend, np.array([ids], np.int32), kept, end_of_turn_id=END)
    assert list(context.cache) == ids, "the cache holds the prompt"
    assert sum(map(len, backend.encoded)) == len(ids) - context.cached_tokens
    return context, backend.encoded


def test_what_was_read_is_not_encoded_again() -> None:
    kept = PrefixCache()
    assert read_ids(kept, [1, 2, 3])[1] == [[1, 2, 3]]
    assert read_ids(kept, [1, 2, 3])[1] == [], "the same prompt"
    assert read_ids(kept, [1, 2, 3, 4])[1] == [[4]], "a prompt that goes on"
    assert read_ids(kept, [1, 2, 5])[1] == [[1, 2, 5]], "no mark where they part"
    assert read_ids(kept, [1, 2, 3, 6])[1] == [[6]], "behind a mark of the longer one, which stays"
    assert len(kept) == 3


def test_the_first_turn_is_a_place_to_begin_from() -> None:
    kept = PrefixCache()
    assert read_ids(kept, [1, 2, END, 3, END])[1] == [[1, 2, END], [3, END]]
    context, encoded = read_ids(kept, [1, 2, END, 4, END])
    assert context.cached_tokens == 3
    assert encoded == [[4, END]]
    assert read_ids(PrefixCache(), [1, 2, END])[1] == [[1, 2, END]], "one turn alone is not split"


def test_a_conversation_keeps_its_places() -> None:
    """A turn whose reply is written another way the next time begins behind the prompt before it."""
    kept, ids = PrefixCache(), [1, 2]
    for turn in range(5):
        context, _ = read_ids(kept, ids)
        context.cache.extend([50 + turn, END])  # a thought, left out of the next prompt
        kept.keep(np.array([*ids, 50 + turn, END]), context.cache, context.marks)
        again, _ = read_ids(kept, [*ids, 60 + turn])
        assert again.cached_tokens == len(ids), f"turn {turn}"
        ids = [*ids, 60 + turn, END, 3]
    assert all(len(entry.marks) <= 3 for entry in kept._kept), "windows are bounded"


def test_what_is_kept_is_bounded() -> None:
    kept = PrefixCache(max_bytes=100)
    for first in range(8):
        read_ids(kept, [first, 1, 2])
        assert kept.nbytes <= 100
    assert len(kept) == 3
    assert read_ids(kept, [7, 1, 2])[1] == []
    assert read_ids(kept, [5, 1, 2])[1] == []
    read_ids(kept, [8, 1, 2])
    assert read_ids(kept, [5, 1, 2])[1] == [], "used lately, and so kept"
    assert read_ids(kept, [6, 1, 2])[1] == [[6, 1, 2]], "dropped for the new one"
    read_ids(kept, list(range(20)))
    assert kept.nbytes <= 100, "a text that is too long is not kept"
    kept.clear()
    assert kept.nbytes == len(kept) == 0
