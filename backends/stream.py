"""Parts of several texts as one stream of tokens, in NumPy: what both wings make of pieces and rows before they compute."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.backends import Denoised, Row
from mlx_diffgemma.noise import bits


class Canvases(NamedTuple):
    """What rows of one denoising step say besides their tokens, one row behind the other: T positions in all.

    Attributes:
        temperature: float32 [T].
        noise: uint32 [T], the bits of each position where it draws; None where no row does.
        drawn: bool [T], whether the position's row draws.
        frozen: int32 [T], -1 where the model may write; None where it may everywhere.
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


def answers(statistics: Sequence[NDArray[Any]], signals: Sequence[Any]) -> list[Denoised]:
    """A step's argmax, sampled and entropy [T], and the rows' self-conditioning [L, H], as an answer a row."""
    argmax, sampled, entropy = statistics
    places = zip(spans([len(signal) for signal in signals]), signals, strict=True)
    return [
        Denoised(argmax[span].astype(np.int32), sampled[span].astype(np.int32), entropy[span], signal) for span, signal in places
    ]


def spans(lengths: Sequence[int]) -> list[slice]:
    """Where parts of these lengths lie in their stream."""
    return [slice(start, stop) for start, stop in pairwise(accumulate(lengths, initial=0))]
