"""One backend for many requests: the backend that each request sees, and how several calls become one pass."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.backends import Backend, Cache, Denoised, Features, Pending, Piece, Row, check_rows, check_tokens
from mlx_diffgemma.vision.patches import Patches


@dataclass
class Counters:
    """What an engine has done since it was created.

    Attributes:
        admitted: requests that began.
        finished, failed, cancelled, timed_out: requests by how they ended, including those that never began. A request that
            ended because the engine stopped counts as cancelled.
        refused: requests that were refused because the queue was full.
        denoising_passes: passes of the model that denoised canvases.
        denoising_rows: canvases in all these passes. Equal to the number of passes if nothing was batched.
        encode_calls, encoded_tokens: passes that encoded or scored pieces, and the tokens in them.
        seen_images: images that went through the vision tower; the frames of videos are images.
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
    seen_images: int = 0
    device_seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Call:
    """A call of one of the backend's methods, with its arguments. Several calls of one method can be performed as one."""

    method: str
    parts: Sequence[Any]

    @property
    def tokens(self) -> int:
        """Tokens that the causal pass reads for this call, and patches that the vision tower reads."""
        return sum(
            len(part.tokens) if isinstance(part, Piece) else len(part.pixels)
            for part in self.parts
            if isinstance(part, Piece | Patches)
        )


class SharedBackend:
    """A :class:`~mlx_diffgemma.backends.Backend` that passes each call to ``ask``, which performs it when its turn comes.

    It checks a request's tokens first. A request with wrong tokens then fails alone, not together with others in its pass.
    """

    def __init__(self, backend: Backend, ask: Callable[[Call], Sequence[Any]]) -> None:
        self.name, self.device, self.dtype, self.config = backend.name, backend.device, backend.dtype, backend.config
        self.exact_rows = backend.exact_rows
        self.new_cache, self.peak_memory = backend.new_cache, backend.peak_memory
        self.logits, self.vision_states = backend.logits, backend.vision_states
        self._ask = ask

    def see(self, images: Sequence[Patches]) -> list[Features]:
        # A turn is one image, as it is one piece.
        return [self._ask(Call("see", [image]))[0] for image in images]

    def encode(self, pieces: Sequence[Piece]) -> None:
        self._by_piece("encode", pieces)

    def next_logits(self, caches: Sequence[Cache]) -> NDArray[np.float32]:
        return np.stack(list(self._ask(Call("next_logits", caches))))

    def score(self, pieces: Sequence[Piece]) -> list[NDArray[np.float32]]:
        return self._by_piece("score", pieces)

    def launch(self, rows: Sequence[Row]) -> Pending:
        # The call is made in the wait. A request's events go into an inbox, which holds up no pass.
        return partial(self.denoise, rows)

    def denoise(self, rows: Sequence[Row]) -> list[Denoised]:
        return self._by_row("denoise", rows)

    def score_canvas(self, rows: Sequence[Row]) -> list[NDArray[np.float32]]:
        return self._by_row("score_canvas", rows)

    def _by_piece(self, method: str, pieces: Sequence[Piece]) -> list[Any]:
        # A turn is one piece: a long prompt does not hold up other requests, and can be cancelled between its pieces.
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
        """Perform calls of one method in one pass. Returns their results, one list per call."""
        parts = [part for call in calls for part in call.parts]
        self._count(calls[0].method, parts)
        started = time.perf_counter()
        try:
            answers = getattr(self.backend, calls[0].method)(parts)
        finally:
            self.counters.device_seconds += time.perf_counter() - started
        if answers is None:  # encode returns nothing
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
        elif method == "see":
            self.counters.seen_images += len(parts)
