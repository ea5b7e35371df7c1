"""Keys and values of one text's committed positions, in buffers with room after them.

New positions are written into the room, and so is the canvas of each step. A canvas does not change the committed positions. A
step therefore copies no key, and its shapes stay the same within a block.

Forks of a cache share its buffers. Any fork may write into the room after a buffer's last committed position, since each pass
writes before it reads. The first fork to commit keeps the room. A fork that ends earlier copies its positions before it writes.

backends/room.py decides how much room there is, and where a sliding layer's buffer begins.
"""

import copy
from collections.abc import Sequence
from typing import Self

import mlx.core as mx

from mlx_diffgemma.backends.room import Room
from mlx_diffgemma.config import ModelConfig


class Buffer:
    """Keys and values of a text from position ``first`` on. Positions before ``committed`` never change.

    ``entries`` [B, 2 K, capacity, D] holds the K heads of keys and then those of values, so that one operation writes both.
    """

    def __init__(self, first: int, capacity: int, like: mx.array) -> None:
        self.first, self.committed, self.capacity = first, first, capacity
        self.entries = _room(like, capacity)

    def write(self, start: int, entries: mx.array) -> None:
        """Put keys and values [B, 2 K, N, D] at position ``start`` and after it."""
        self.entries[:, :, start - self.first : start - self.first + entries.shape[2]] = entries

    def read(self, start: int, end: int) -> mx.array:
        """Keys and values at positions start .. end - 1, as a view."""
        return self.entries[:, :, start - self.first : end - self.first]

    def grow(self, capacity: int) -> None:
        """Make room for more positions, for all caches that share the buffer."""
        held, self.capacity = self.committed - self.first, capacity
        old, self.entries = self.entries, _room(self.entries, capacity)
        self.entries[:, :, :held] = old[:, :, :held]

    @property
    def nbytes(self) -> int:
        return self.entries.nbytes


class LayerCache:
    """One layer of a :class:`Cache`: a buffer, and how much of it belongs to this text."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.length = 0
        self.buffer: Buffer | None = None

    def extended(self, entries: mx.array) -> tuple[mx.array, mx.array]:
        """Write keys and values [B, 2 K, N, D] after the committed positions, without committing them.

        Returns:
            Keys and values, each [B, K, S, D], of the committed positions that the new ones see, followed by the new ones.
        """
        end = self.length + entries.shape[2]
        buffer = self._writable(end, entries)
        buffer.write(self.length, entries)
        keys, values = mx.split(buffer.read(self.room.visible(self.length), end), 2, axis=1)
        return keys, values

    def append(self, entries: mx.array) -> tuple[mx.array, mx.array]:
        """Like :meth:`extended`, but commit the new positions."""
        seen = self.extended(entries)
        self.length += entries.shape[2]
        assert self.buffer is not None
        self.buffer.committed = self.length
        if self.room.first(self.length) > self.buffer.first:
            self._move(self.length)
        return seen

    def _writable(self, end: int, like: mx.array) -> Buffer:
        """The buffer, with uncommitted room up to position ``end``."""
        if self.buffer is None:
            self.buffer = Buffer(0, self.room.capacity(self.length, end), like)
        elif self.buffer.committed > self.length:
            self._move(end)
        elif self.buffer.first + self.buffer.capacity < end:
            self.buffer.grow(self.room.capacity(self.length, end))
        return self.buffer

    def _move(self, end: int) -> None:
        """Copy this text's positions that can still be seen into a new buffer with room up to ``end``."""
        old, start = self.buffer, self.room.visible(self.length)
        assert old is not None
        kept = old.read(start, self.length)
        self.buffer = Buffer(self.room.first(self.length), self.room.capacity(self.length, end), kept)
        self.buffer.write(start, kept)
        self.buffer.committed = self.length


class Cache:
    """One :class:`LayerCache` per layer.

    Attributes:
        length: committed positions.
        last: the final hidden states [B, H] of the last one, which predict the next token; None in an empty cache.
        rows: texts of one length that go through the graph together; always 1.
    """

    rows = 1

    def __init__(self, config: ModelConfig) -> None:
        windows = [config.sliding_window if layer.is_sliding else None for layer in config.layers]
        self.layers: Sequence[LayerCache] = [LayerCache(Room(window, config.canvas_length)) for window in windows]
        self.length = 0
        self.last: mx.array | None = None

    def __len__(self) -> int:
        return self.length

    def fork(self) -> Self:
        """A cache that starts with this one's positions and grows on its own."""
        other = copy.copy(self)
        other.layers = [copy.copy(layer) for layer in self.layers]
        return other

    def arrays(self) -> list[mx.array]:
        """All arrays in the cache, for ``mx.eval``."""
        buffers = [layer.buffer for layer in self.layers if layer.buffer is not None]
        kept = [buffer.entries for buffer in buffers]
        return kept if self.last is None else [*kept, self.last]

    def buffers(self) -> dict[int, int]:
        """Bytes of each buffer, keyed by its identity."""
        return {id(layer.buffer): layer.buffer.nbytes for layer in self.layers if layer.buffer is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(self.buffers().values())


def _room(like: mx.array, capacity: int) -> mx.array:
    """Room for ``capacity`` positions of keys and values [B, 2 K, N, D]."""
    return mx.zeros((*like.shape[:2], capacity, like.shape[3]), dtype=like.dtype)
