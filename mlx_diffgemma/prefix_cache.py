"""Keys and values kept from one request to the next: a prompt that begins as an earlier text did is not encoded again.

A kept cache can be used up to its end, or up to one of its marks: full layers are cut back anywhere, but a sliding window cannot
be rewound, and is put back as it was where it was marked (:meth:`~mlx_diffgemma.backends.Cache.windows`). :func:`read` marks the
end of each prompt, where the reply begins (a template may write the reply differently the next time, without its thoughts), and
the end of a conversation's first turn, which many may share: instructions and tools.

Of the released model in bfloat16, the five full layers take 20,480 bytes a token (2 heads of 512, keys and values), and the
windows of the 25 sliding layers (1,023 positions, 8 heads of 256, keys and values) 210 MB, once for the end and once a mark.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.backends import Backend, Cache

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Marks that are kept of one text, behind that of its first turn.
MARKS = 2


@dataclass(frozen=True)
class Context:
    """A prompt that has been read.

    Attributes:
        tokens: int32 [1, N].
        cache: holds all of them.
        marks: windows at earlier places of the cache, and at its end.
        cached_tokens: how many of the tokens a kept cache held.
        encode_seconds: wall time of encoding the others.
    """

    tokens: NDArray[np.int32]
    cache: Cache
    marks: tuple[Any, ...]
    cached_tokens: int
    encode_seconds: float

    def repeated(self) -> Context:
        """The same again, to be written on from separately."""
        return Context(self.tokens, self.cache.repeated(1), self.marks, self.cached_tokens, self.encode_seconds)


@dataclass(frozen=True)
class _Kept:
    tokens: NDArray[np.int32]  # [N]
    cache: Cache
    marks: tuple[Any, ...]

    @property
    def nbytes(self) -> int:
        total: int = self.cache.nbytes + sum(mark.nbytes for mark in self.marks)
        return total

    def shared(self, tokens: NDArray[np.int32]) -> int:
        """How many tokens [N] from the first on are the same."""
        room = min(len(tokens), len(self.tokens))
        different = np.flatnonzero(self.tokens[:room] != tokens[:room])
        return int(different[0]) if different.size else room


class PrefixCache:
    """Caches of earlier texts, the least recently used of which are dropped.

    Not for several threads at once.

    Args:
        max_bytes: of all keys and values that are kept; what caches share is counted in each.
    """

    def __init__(self, max_bytes: int = 4 << 30) -> None:
        self.max_bytes = max_bytes
        self._kept: list[_Kept] = []  # the most recently used last

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept now."""
        return sum(kept.nbytes for kept in self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        self._kept.clear()

    def take(self, tokens: NDArray[np.int32]) -> tuple[Cache, tuple[Any, ...]] | None:
        """A cache of as many of the ``tokens`` [N] as can be had, from the first on, and its marks; None where it is none."""
        best, place, used = 0, None, None
        for kept in self._kept:
            shared = kept.shared(tokens)
            for mark in kept.marks:
                if best < len(mark) <= shared:
                    best, place, used = len(mark), mark, kept
            if best < len(kept.tokens) <= shared:
                best, place, used = len(kept.tokens), None, kept
        if used is None:
            return None
        self._touch(used)
        cache = used.cache.repeated(1) if place is None else used.cache.cut(place)
        marks = tuple(mark for mark in used.marks if len(mark) < best)
        return cache, (*marks, cache.windows())

    def keep(self, tokens: NDArray[np.int32], cache: Cache, marks: Sequence[Any]) -> None:
        """Keep ``cache``, which holds ``tokens`` [N] and goes on for itself, with windows at earlier places of it."""
        for kept in self._kept:
            whole = kept.shared(tokens) == len(tokens)
            if whole and len(tokens) in (len(kept.tokens), *map(len, kept.marks)):
                self._touch(kept)
                return
        self._kept = [kept for kept in self._kept if kept.shared(tokens) < len(kept.tokens)]
        self._kept.append(_Kept(tokens, cache.repeated(1), _bounded(marks)))
        while self.nbytes > self.max_bytes:
            del self._kept[0]

    def _touch(self, kept: _Kept) -> None:
        self._kept = [*(other for other in self._kept if other is not kept), kept]


def _bounded(marks: Sequence[Any]) -> tuple[Any, ...]:
    """The first mark, and the last of the others."""
    return (*marks[:1], *marks[1:][-MARKS:])


def read(backend: Backend, tokens: NDArray[np.int32], kept: PrefixCache, *, end_of_turn_id: int) -> Context:
    """Encode what of a prompt [1, N] no kept cache holds, and keep the whole."""
    ids = tokens[0]
    taken = kept.take(ids)
    cache, marks = taken if taken is not None else (backend.new_cache(), ())
    cached = len(cache)
    started = time.perf_counter()
    ends = np.flatnonzero(ids == end_of_turn_id) + 1
    places = {int(ends[0])} if len(ends) > 1 else set()
    for place in sorted(places | {len(ids)}):
        if place > len(cache):
            backend.encode(tokens[:, len(cache) : place], cache)
            marks = (*marks, cache.windows())
    seconds = time.perf_counter() - started
    kept.keep(ids, cache, marks[:-1])
    return Context(tokens, cache, marks, cached, seconds)
