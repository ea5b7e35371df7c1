"""Keys and values of the committed positions.

Arrays are concatenated, never written in place: a canvas sees what is committed without changing it, and the copy is small
beside the weights that a step reads anyway. (mlx-lm's rotating cache does not keep the order of positions that a canvas needs.)
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_diffgemma.config import ModelConfig


class LayerCache:
    """Keys and values [B, H, S, D] of one layer. A sliding layer keeps what later positions can see: the last window - 1."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def extended(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """What is kept, followed by ``keys`` and ``values``; the cache stays as it is."""
        if self.keys is None or self.values is None:
            return keys, values
        return mx.concatenate([self.keys, keys], axis=2), mx.concatenate([self.values, values], axis=2)

    def repeated(self, rows: int) -> "LayerCache":
        """A copy for ``rows`` rows of one row; nothing is written in place, so that the arrays are shared."""
        other = LayerCache(self.window)
        if self.keys is not None and self.values is not None:
            shape = (rows, *self.keys.shape[1:])
            other.keys, other.values = mx.broadcast_to(self.keys, shape), mx.broadcast_to(self.values, shape)
        return other

    def joined(self, others: "Sequence[LayerCache]") -> "LayerCache":
        """A copy with the rows of ``others`` behind its own."""
        other = LayerCache(self.window)
        other.keys = joined_rows([layer.keys for layer in (self, *others)])
        other.values = joined_rows([layer.values for layer in (self, *others)])
        return other

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """As :meth:`extended`, and keep the new positions too."""
        keys, values = self.extended(keys, values)
        drop = max(0, keys.shape[2] - (self.window - 1)) if self.window else 0
        # A slice would keep the whole of a long prompt alive.
        self.keys, self.values = (
            (mx.contiguous(keys[:, :, drop:]), mx.contiguous(values[:, :, drop:])) if drop else (keys, values)
        )
        return keys, values

    def cut(self, length: int) -> "LayerCache":
        """A copy of the first ``length`` positions of a full layer."""
        other = LayerCache(self.window)
        if self.keys is not None and self.values is not None:
            other.keys, other.values = self.keys[:, :, :length], self.values[:, :, :length]
        return other

    @property
    def nbytes(self) -> int:
        return sum(kept.nbytes for kept in (self.keys, self.values) if kept is not None)


@dataclass(frozen=True)
class Windows:
    """What :meth:`Cache.windows` keeps: the sliding layers (None for a full one) and ``last`` at ``length`` positions."""

    length: int
    layers: list[LayerCache | None]
    last: mx.array | None

    def __len__(self) -> int:
        return self.length

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers if layer is not None)


class Cache:
    """One :class:`LayerCache` a layer; ``len`` is the number of committed positions.

    ``last`` is the final hidden state [B, H] of the last of them, which says what token comes next; None where there is none.
    """

    def __init__(self, config: ModelConfig, batch_size: int = 1) -> None:
        self.layers = [LayerCache(config.sliding_window if layer.is_sliding else None) for layer in config.layers]
        self.batch_size = batch_size
        self.length = 0
        self.last: mx.array | None = None

    def __len__(self) -> int:
        return self.length

    def repeated(self, rows: int) -> "Cache":
        """A cache of ``rows`` rows that begins as this one of one row and goes on for itself."""
        other = copy.copy(self)
        other.layers, other.batch_size = [layer.repeated(rows) for layer in self.layers], rows
        other.last = None if self.last is None else mx.broadcast_to(self.last, (rows, self.last.shape[-1]))
        return other

    def joined(self, others: "Sequence[Cache]") -> "Cache":
        """A cache of the rows of this one and then those of ``others``, of the same length, that goes on for itself."""
        other, parts = copy.copy(self), (self, *others)
        other.batch_size = sum(part.batch_size for part in parts)
        other.layers = [layer.joined(layers) for layer, *layers in zip(*(part.layers for part in parts), strict=True)]
        other.last = joined_rows([part.last for part in parts])
        return other

    def arrays(self) -> list[mx.array]:
        """All that is kept, for ``mx.eval``."""
        layers = [array for layer in self.layers for array in (layer.keys, layer.values)]
        return [array for array in (*layers, self.last) if array is not None]

    def windows(self) -> Windows:
        """What is lost once more is appended, for :meth:`cut`."""
        layers = [layer.repeated(self.batch_size) if layer.window else None for layer in self.layers]
        return Windows(self.length, layers, self.last)

    def cut(self, windows: Windows) -> "Cache":
        """A cache of the first ``len(windows)`` positions, which goes on for itself; ``windows`` are this one's own."""
        other = copy.copy(self)
        other.length, other.last = windows.length, windows.last
        other.layers = [
            layer.cut(windows.length) if window is None else window.repeated(self.batch_size)
            for layer, window in zip(self.layers, windows.layers, strict=True)
        ]
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(layer.nbytes for layer in self.layers)


def joined_rows(parts: Sequence[mx.array | None]) -> mx.array | None:
    """Arrays of some rows each, one after the other; None where nothing is kept."""
    kept = [part for part in parts if part is not None]
    return mx.concatenate(kept) if kept else None
