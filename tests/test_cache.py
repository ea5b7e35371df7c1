"""Buffers of keys and values against plain lists, under every operation that texts perform."""

import copy
import importlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from mlx_diffgemma.backends.room import ALIGNMENT, MOST_GROWTH, Room
from support.fake import MODEL
from support.long_context import array_of, entries_of

STEP = 5


@dataclass
class Plain:
    """A plain model of a layer's cache: a text's keys, in order."""

    layer: Any
    keys: list[float] = field(default_factory=list)

    def visible(self, window: int | None) -> list[float]:
        return self.keys[-(window - 1) :] if window and window > 1 else self.keys if window is None else []


def keys_of(seen: Any) -> list[float]:
    """The first number of the only key-value head, at each position."""
    found: list[float] = np.array(seen[0].tolist())[0, 0, :, 0].tolist()
    values = np.array(seen[1].tolist())[0, 0, :, 0].tolist()
    assert values == [-key for key in found], "values of other positions than their keys"
    return found


@pytest.mark.parametrize("window", [None, 2, 7, 16])
def test_forks_that_append_and_hold_canvases_see_their_own(backend_name: str, window: int | None) -> None:
    """Texts that fork, grow by pieces of any length and hold canvases see their own keys, in order."""
    cache = importlib.import_module(f"mlx_diffgemma.backends.{backend_name}.cache")
    copied = shared = 0
    for seed in range(30):
        random, count = np.random.default_rng(seed), 0
        texts = [Plain(cache.LayerCache(Room(window, STEP)))]

        def drawn(length: int) -> tuple[list[float], Any, Any]:
            nonlocal count
            numbers = [float(count + index) for index in range(length)]
            count += length
            wide = np.repeat(np.array(numbers, np.float32)[None, None, :, None], 3, axis=3)
            return numbers, array_of(backend_name, wide), array_of(backend_name, -wide)

        for _ in range(40):
            text = texts[random.integers(len(texts))]
            kind, length = random.random(), int(random.integers(1, 12))
            if kind < 0.25 and len(texts) < 6:
                texts.append(Plain(copy.copy(text.layer), list(text.keys)))
                shared += text.layer.buffer is not None
                continue
            numbers, keys, values = drawn(length)
            expected, before = [*text.visible(window), *numbers], text.layer.buffer
            if kind < 0.6:
                assert keys_of(text.layer.extended(*entries_of(backend_name, keys, values))) == expected
            else:
                assert keys_of(text.layer.append(*entries_of(backend_name, keys, values))) == expected
                text.keys += numbers
            copied += before is not None and text.layer.buffer is not before
        assert all(text.layer.length == len(text.keys) for text in texts)
    assert copied > 30
    assert shared > 30


def test_a_fork_shares_its_buffers_until_it_must_copy(backend_name: str) -> None:
    cache = importlib.import_module(f"mlx_diffgemma.backends.{backend_name}.cache")
    first = cache.Cache(MODEL)

    def some(length: int) -> tuple[Any, ...]:
        return entries_of(backend_name, *[array_of(backend_name, np.ones((1, 1, length, 8), np.float32))] * 2)

    for layer in first.layers:
        layer.append(*some(9))
    fork = first.fork()
    assert fork.buffers() == first.buffers()
    assert fork.nbytes == first.nbytes == 2 * 8 * 4 * first.layers[0].buffer.capacity
    for layer in fork.layers:
        layer.extended(*some(3))
        layer.append(*some(3))  # takes the room after the shared positions
    assert fork.buffers().keys() == first.buffers().keys()
    for layer in first.layers:
        layer.extended(*some(2))  # the room is taken
    assert not fork.buffers().keys() & first.buffers().keys()


@pytest.mark.parametrize("window", [None, 4, 1024])
def test_room(window: int | None) -> None:
    room = Room(window, 256)
    for length in (0, 1, 3, 255, 256, 1023, 1024, 5000, 262_144):
        for new in (1, 256, 2048):
            first, capacity = room.first(length), room.capacity(length, length + new)
            assert first <= room.visible(length), "what is seen is kept"
            assert capacity % ALIGNMENT == 0
            assert length + new - first <= capacity
            if window:
                assert first + 256 > room.visible(length), "no more than a step is kept besides"
                assert capacity < window + 256 + new + 256 + ALIGNMENT
            else:
                assert capacity < length + new + MOST_GROWTH + ALIGNMENT
    assert [room.first(length) for length in (0, 100, 2000)] == sorted(room.first(length) for length in (0, 100, 2000))
