"""Keys and values of the committed positions.

Tensors are concatenated, never written in place: a canvas sees what is committed without changing it, gradients flow through
the cache in training, and the copy is small beside the weights that a step reads anyway.
"""

import copy

import torch
from torch import Tensor

from mlx_diffgemma.config import ModelConfig


class LayerCache:
    """Keys and values [B, H, S, D] of one layer. A sliding layer keeps what later positions can see: the last window - 1."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What is kept, followed by ``keys`` and ``values``; the cache stays as it is."""
        if self.keys is None or self.values is None:
            return keys, values
        return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)

    def repeated(self, rows: int) -> "LayerCache":
        """A copy for ``rows`` rows of one row; nothing is written in place, so that the arrays are shared."""
        other = LayerCache(self.window)
        if self.keys is not None and self.values is not None:
            other.keys, other.values = self.keys.expand(rows, -1, -1, -1), self.values.expand(rows, -1, -1, -1)
        return other

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`extended`, and keep the new positions too."""
        keys, values = self.extended(keys, values)
        drop = max(0, keys.shape[2] - (self.window - 1)) if self.window else 0
        # A slice would keep the whole of a long prompt alive.
        self.keys, self.values = (keys[:, :, drop:].clone(), values[:, :, drop:].clone()) if drop else (keys, values)
        return keys, values


class Cache:
    """One :class:`LayerCache` a layer; ``len`` is the number of committed positions.

    ``last`` is the final hidden state [B, H] of the last of them, which says what token comes next; None where there is none.
    """

    def __init__(self, config: ModelConfig, batch_size: int = 1) -> None:
        self.layers = [LayerCache(config.sliding_window if layer.is_sliding else None) for layer in config.layers]
        self.batch_size = batch_size
        self.length = 0
        self.last: Tensor | None = None

    def __len__(self) -> int:
        return self.length

    def repeated(self, rows: int) -> "Cache":
        """A cache of ``rows`` rows that begins as this one of one row and goes on for itself."""
        other = copy.copy(self)
        other.layers, other.batch_size = [layer.repeated(rows) for layer in self.layers], rows
        other.last = None if self.last is None else self.last.expand(rows, -1)
        return other
