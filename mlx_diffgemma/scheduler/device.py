"""One backend for many requests: what each of them sees of it, and how their calls are performed together."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.backends import PREFILL_CHUNK, Backend, Cache, Denoised, check_tokens


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
        encode_calls, encoded_tokens: chunks that were encoded, scored ones too, and the tokens in them.
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


@dataclass(eq=False)
class Encode:
    """A call of ``encode`` or, with ``scored``, of ``score``."""

    tokens: NDArray[np.int32]
    cache: Cache
    logits: bool = False
    scored: bool = False


@dataclass(eq=False)
class ScoreCanvas:
    canvas: NDArray[np.int32]
    cache: Cache


@dataclass(eq=False)
class Denoise:
    canvas: NDArray[np.int32]
    cache: Cache
    temperature: float
    noise_keys: NDArray[np.uint32] | None
    self_conditioning: Any
    frozen: NDArray[np.int32] | None
    shape: tuple[Any, ...] = field(init=False)  # calls in which it is equal can be one pass

    def __post_init__(self) -> None:
        missing = (self.noise_keys is None, self.self_conditioning is None, self.frozen is None)
        self.shape = (len(self.cache), self.canvas.shape[1], self.temperature, *missing)


Call = Encode | ScoreCanvas | Denoise


class SharedBackend:
    """A :class:`~mlx_diffgemma.backends.Backend` whose calls ``ask`` performs when their turn comes.

    What is wrong with a request's own tokens is said before that, so that it ends no pass of several.
    """

    def __init__(self, backend: Backend, ask: Callable[[Call], Any]) -> None:
        self.name, self.device, self.dtype, self.config = backend.name, backend.device, backend.dtype, backend.config
        self.exact_rows = backend.exact_rows
        self.new_cache, self.logits, self.peak_memory = backend.new_cache, backend.logits, backend.peak_memory
        self._ask = ask

    def encode(self, tokens: NDArray[np.int32], cache: Cache, *, logits: bool = False) -> NDArray[np.float32] | None:
        check_tokens(tokens, self.config, cached=len(cache))
        # A turn is one chunk: a long prompt keeps the others waiting no longer, and can be cancelled within it.
        *chunks, last = _chunks(tokens)
        for chunk in chunks:
            self._ask(Encode(chunk, cache))
        answer: NDArray[np.float32] | None = self._ask(Encode(last, cache, logits=logits))
        return answer

    def score(self, tokens: NDArray[np.int32], cache: Cache) -> NDArray[np.float32]:
        check_tokens(tokens, self.config)
        return np.concatenate([self._ask(Encode(chunk, cache, scored=True)) for chunk in _chunks(tokens)], axis=1)

    def denoise(
        self,
        canvas: NDArray[np.int32],
        cache: Cache,
        *,
        temperature: float,
        noise_keys: NDArray[np.uint32] | None = None,
        self_conditioning: Any = None,
        frozen: NDArray[np.int32] | None = None,
    ) -> Denoised:
        check_tokens(canvas, self.config)
        answer: Denoised = self._ask(Denoise(canvas, cache, temperature, noise_keys, self_conditioning, frozen))
        return answer

    def score_canvas(self, canvas: NDArray[np.int32], cache: Cache) -> NDArray[np.float32]:
        check_tokens(canvas, self.config)
        answer: NDArray[np.float32] = self._ask(ScoreCanvas(canvas, cache))
        return answer


class Device:
    """Performs calls on the backend, and counts them."""

    def __init__(self, backend: Backend, counters: Counters) -> None:
        self.backend, self.counters = backend, counters
        self._joined: list[tuple[Sequence[Cache], Cache]] = []  # no cache is in two of them

    def perform(self, calls: Sequence[Call]) -> list[Any]:
        """The answers to one call, or to several of :class:`Denoise` of one shape."""
        started = time.perf_counter()
        try:
            match calls:
                case [Encode() as call]:
                    return [self._encode(call)]
                case [ScoreCanvas() as call]:
                    return [self.backend.score_canvas(call.canvas, call.cache)]
            return self._denoise([call for call in calls if isinstance(call, Denoise)])
        finally:
            self.counters.device_seconds += time.perf_counter() - started

    def forget(self) -> None:
        """Let go of the caches that were joined for passes of several rows."""
        self._joined.clear()

    def _encode(self, call: Encode) -> NDArray[np.float32] | None:
        self.counters.encode_calls += 1
        self.counters.encoded_tokens += call.tokens.size
        if call.scored:
            return self.backend.score(call.tokens, call.cache)
        return self.backend.encode(call.tokens, call.cache, logits=call.logits)

    def _denoise(self, calls: Sequence[Denoise]) -> list[Denoised]:
        first = calls[0]
        self.counters.denoising_passes += 1
        self.counters.denoising_rows += sum(len(call.canvas) for call in calls)
        frozen = [None if call.frozen is None else np.broadcast_to(call.frozen, call.canvas.shape) for call in calls]
        result = self.backend.denoise(
            np.concatenate([call.canvas for call in calls]),
            self._join([call.cache for call in calls]),
            temperature=first.temperature,
            noise_keys=_rows([call.noise_keys for call in calls]),
            self_conditioning=first.self_conditioning if len(calls) == 1 else _list([call.self_conditioning for call in calls]),
            frozen=_rows(frozen),
        )
        if len(calls) == 1:
            return [result]
        ends = np.cumsum([len(call.canvas) for call in calls]).tolist()
        spans = [slice(end - len(call.canvas), end) for call, end in zip(calls, ends, strict=True)]
        return [
            Denoised(result.argmax[span], result.sampled[span], result.entropy[span], result.self_conditioning[span])
            for span in spans
        ]

    def _join(self, caches: Sequence[Cache]) -> Cache:
        """All rows in one cache. Joining copies them: it is kept while the same caches, unchanged, are asked for again."""
        for parts, joined in self._joined:
            same = len(parts) == len(caches) and all(part is cache for part, cache in zip(parts, caches, strict=True))
            if same and len(joined) == len(caches[0]):  # a cache changes by growing
                return joined
        ids = set(map(id, caches))
        self._joined = [kept for kept in self._joined if ids.isdisjoint(map(id, kept[0]))]
        if len(caches) == 1:
            return caches[0]
        joined = caches[0].joined(caches[1:])
        self._joined.append((caches, joined))
        return joined


def _chunks(tokens: NDArray[np.int32]) -> list[NDArray[np.int32]]:
    """At least one, which is empty if they are."""
    return [tokens[:, start : start + PREFILL_CHUNK] for start in range(0, tokens.shape[1] or 1, PREFILL_CHUNK)]


def _list(parts: Sequence[Any]) -> list[Any] | None:
    return None if parts[0] is None else list(parts)


def _rows(parts: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if present else None
