"""Joins parts of several texts into one stream of tokens, and divides what a pass gives. Both backends use it; no framework."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, Generic, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.backends import Denoised, Row
from mlx_diffgemma.noise import bits

#: A framework's array.
Array = TypeVar("Array")


class Canvases(NamedTuple):
    """The inputs of one denoising step other than tokens, with the rows one after another: T positions in all.

    Attributes:
        temperature: float32 [T].
        noise: uint32 [T], the noise bits of each position; None if no row draws.
        drawn: bool [T], whether the position's row draws.
        frozen: int32 [T], -1 where the model may write; None if it may write everywhere.
    """

    temperature: NDArray[np.float32]
    noise: NDArray[np.uint32] | None
    drawn: NDArray[np.bool_]
    frozen: NDArray[np.int32] | None

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Canvases":
        lengths = [len(row.canvas) for row in rows]
        keys = [row.noise_key for row in rows]
        drawn, frozen = np.repeat([key is not None for key in keys], lengths), None
        noise = [bits(key or 0, np.arange(length, dtype=np.uint32)) for key, length in zip(keys, lengths, strict=True)]
        if any(row.frozen is not None for row in rows):
            frozen = np.concatenate([np.full_like(row.canvas, -1) if row.frozen is None else row.frozen for row in rows])
        return cls(
            temperature=np.repeat(np.array([row.temperature for row in rows], np.float32), lengths),
            noise=np.concatenate(noise) if drawn.any() else None,
            drawn=drawn,
            frozen=frozen,
        )


class SoftEmbeddings(Generic[Array]):
    """A pass's self-conditioning [T, H] for the next step, computed when it is first needed, by the thread that needs it.

    A canvas that is done needs none. Until then this holds the logits in the weights' type, or the probabilities where they are
    at hand.

    Attributes:
        needs: what it is computed from. A lazy framework evaluates it with the step: its arrays can be computed in their own
            thread only.
    """

    def __init__(self, compute: Callable[[], Array], needs: Sequence[Array] = ()) -> None:
        self.needs = needs
        self._compute: Callable[[], Array] | None = compute
        self._array: Array | None = None

    def array(self) -> Array:
        if self._compute is not None:
            self._array, self._compute, self.needs = self._compute(), None, ()
        assert self._array is not None
        return self._array


class Signal(Generic[Array]):
    """The self-conditioning [L, H] of one row of a pass."""

    def __init__(self, whole: SoftEmbeddings[Array], span: slice) -> None:
        self.whole, self.span = whole, span

    def __len__(self) -> int:
        return int(self.span.stop - self.span.start)

    def array(self) -> Array:
        rows: Array = cast(Any, self.whole.array())[self.span]
        return rows


def answers(statistics: Sequence[NDArray[Any]], signals: Sequence[Any]) -> list[Denoised]:
    """Turn a step's argmax, sampled and entropy [T], and the rows' self-conditioning [L, H], into one result per row."""
    argmax, sampled, entropy = statistics
    places = zip(spans([len(signal) for signal in signals]), signals, strict=True)
    return [
        Denoised(argmax[span].astype(np.int32), sampled[span].astype(np.int32), entropy[span], signal) for span, signal in places
    ]


def spans(lengths: Sequence[int]) -> list[slice]:
    """The slices of a stream that hold parts of these lengths."""
    return [slice(start, stop) for start, stop in pairwise(accumulate(lengths, initial=0))]
