"""One backend for many requests: what each of them sees of it, and how their calls are performed together."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.backends import Backend, Cache, Denoised, Piece, Row, check_rows, check_tokens


@dataclass
class Counters:
    """What an engine has done since it was made.

    Attributes:
        admitted: requests that were begun.
        finished, failed, cancelled, timed_out: requests by how they ended, those that never began included; a request that the
            engine was stopped under counts as cancelled.
        refused: requests that were not taken because the queue was full.
        denoising_passes: passes over the model in which canvases were denoised.
        denoising_rows: canvases in all those passes. As many as passes, if nothing was batched.
        encode_calls, encoded_tokens: passes in which pieces were encoded, scored ones too, and the tokens in them.
        device_seconds: wall time of all calls.
    """

    admitted: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    timed_out: int = 0
    refused: int = 0
    denoising_passes: int = 0
    denoising_rows: int = 0
    encode_calls: int = 0
    encoded_tokens: int = 0
    device_seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Call:
    """A call of one of the backend's methods, with what it takes. Calls of one method may be performed as one."""

    method: str
    parts: Sequence[Any]

    @property
    def tokens(self) -> int:
        """Tokens that the causal pass reads for it."""
        return sum(len(part.tokens) for part in self.parts if isinstance(part, Piece))


class SharedBackend:
    """A :class:`~mlx_diffgemma.backends.Backend` whose calls ``ask`` performs when their turn comes.

    What is wrong with a request's own tokens is said before that, so that it ends no pass of several.
    """

    def __init__(self, backend: Backend, ask: Callable[[Call], Sequence[Any]]) -> None:
        self.name, self.device, self.dtype, self.config = backend.name, backend.device, backend.dtype, backend.config
        self.exact_rows = backend.exact_rows
        self.new_cache, self.logits, self.peak_memory = backend.new_cache, backend.logits, backend.peak_memory
        self._ask = ask

    def encode(self, pieces: Sequence[Piece]) -> None:
        self._by_piece("encode", pieces)

    def next_logits(self, caches: Sequence[Cache]) -> NDArray[np.float32]:
        return np.stack(list(self._ask(Call("next_logits", caches))))

    def score(self, pieces: Sequence[Piece]) -> list[NDArray[np.float32]]:
        return self._by_piece("score", pieces)

    def denoise(self, rows: Sequence[Row]) -> list[Denoised]:
        return self._by_row("denoise", rows)

    def score_canvas(self, rows: Sequence[Row]) -> list[NDArray[np.float32]]:
        return self._by_row("score_canvas", rows)

    def _by_piece(self, method: str, pieces: Sequence[Piece]) -> list[Any]:
        # A turn is one piece: a long prompt keeps the others waiting no longer, and can be cancelled within it.
        for piece in pieces:
            check_tokens(piece.tokens, self.config)
        return [self._ask(Call(method, [piece]))[0] for piece in pieces]

    def _by_row(self, method: str, rows: Sequence[Row]) -> list[Any]:
        check_rows(rows, self.config)
        for row in rows:
            check_tokens(row.canvas, self.config)
        return list(self._ask(Call(method, rows)))


class Device:
    """Performs calls on the backend, and counts them."""

    def __init__(self, backend: Backend, counters: Counters) -> None:
        self.backend, self.counters = backend, counters

    def perform(self, calls: Sequence[Call]) -> list[Sequence[Any]]:
        """The answers to calls of one method, a list each, in one pass."""
        parts = [part for call in calls for part in call.parts]
        self._count(calls[0].method, parts)
        started = time.perf_counter()
        try:
            answers = getattr(self.backend, calls[0].method)(parts)
        finally:
            self.counters.device_seconds += time.perf_counter() - started
        if answers is None:  # of encode, which says nothing
            answers = [None] * len(parts)
        ends = accumulate((len(call.parts) for call in calls), initial=0)
        return [answers[start:end] for start, end in pairwise(ends)]

    def _count(self, method: str, parts: Sequence[Any]) -> None:
        if method == "denoise":
            self.counters.denoising_passes += 1
            self.counters.denoising_rows += len(parts)
        elif method in ("encode", "score"):
            self.counters.encode_calls += 1
            self.counters.encoded_tokens += sum(len(piece.tokens) for piece in parts)
