"""Keys and values kept from one request to the next: a prompt that begins as an earlier text did is not encoded again.

A cache is kept where a piece ends, and is found again by what it holds: a hash over the pieces that were encoded. Where a text is
cut depends on the tokens before the cut alone (:class:`~mlx_diffgemma.prompts.PieceRule`), so a text that begins as another did
has the same pieces, and what is found is, bit for bit, what encoding afresh would give.

Kept are the end of each prompt, where its reply begins (a template may write the reply differently the next time, without its
thoughts), the end of each reply, and the end of a conversation's first turn, which many may share: instructions and tools.

Of the released model in bfloat16, the five full layers take 20,480 bytes a token (2 heads of 512, keys and values), shared by all
that is kept of one text; the 25 sliding layers (8 heads of 256, keys and values, 1,023 positions and room for two canvases)
take up to 314 MB for each kept place.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.backends import Backend, Cache, Piece
from mlx_diffgemma.prompts import PieceRule

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Bytes of keys and values that are kept, unless another number is asked for.
MAX_BYTES = 4 << 30

#: Places that are kept of one text behind the end of its first turn and before the last one.
PLACES = 2


@dataclass(frozen=True, eq=False)
class Context:
    """A text that has been read.

    Attributes:
        tokens: int32 [N].
        cache: holds all of them.
        cuts: where the pieces end in which they were encoded.
        cached_tokens: how many of the tokens a kept cache held.
        encode_seconds: wall time of encoding the others.
    """

    tokens: NDArray[np.int32]
    cache: Cache
    cuts: tuple[int, ...]
    cached_tokens: int = 0
    encode_seconds: float = 0.0

    def fork(self) -> Context:
        """The same again, to be written on from separately."""
        return replace(self, cache=self.cache.fork())


@dataclass(eq=False)
class _Kept:
    cache: Cache
    buffers: dict[int, int] = field(default_factory=dict)  # bytes of each, by its identity


class PrefixCache:
    """Caches of earlier texts, the least recently used of which are dropped.

    Not for several threads at once.

    Args:
        max_bytes: of all keys and values that are kept. What several places share counts once.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()  # the most recently used last
        self._sizes: dict[int, int] = {}  # bytes of each buffer
        self._users: dict[int, int] = {}  # kept places that share it

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Drop everything."""
        while self._kept:
            self._drop(next(iter(self._kept)))

    def take(self, hashes: Sequence[bytes]) -> tuple[int, Cache] | None:
        """A cache of as many pieces as can be had, from the first on, and how many; None where it is none.

        Args:
            hashes: of a text's pieces, as :func:`hashes` gives them.
        """
        held = [index for index, each in enumerate(hashes) if each in self._kept]
        for index in held:
            self._kept.move_to_end(hashes[index])
        return (held[-1] + 1, self._kept[hashes[held[-1]]].cache.fork()) if held else None

    def keep(self, hashes: Sequence[bytes], cache: Cache, *, instead: bytes | None = None) -> None:
        """Keep a fork of ``cache``, which holds the pieces of ``hashes`` and nothing else; drop ``instead``, an earlier place."""
        last = hashes[-1]
        buffers = cache.buffers()
        self._count(buffers)
        if sum(buffers.values()) > self.max_bytes:
            self._fit()
            return
        if last in self._kept:
            self._drop(last)  # the new one may share more of what is kept
        held = [each for each in hashes[:-1] if each in self._kept]
        for each in {*held[1:-PLACES], *(each for each in held if each == instead)}:
            self._drop(each)
        kept = self._kept[last] = _Kept(cache.fork())
        kept.buffers = dict(kept.cache.buffers())
        for buffer, size in kept.buffers.items():
            self._users[buffer] = self._users.get(buffer, 0) + 1
            if buffer not in self._sizes:
                self._sizes[buffer] = size
                self.nbytes += size
        self._fit()

    def recount(self, cache: Cache) -> None:
        """Count again what a cache shares with kept places: its buffers may have grown while it was written on."""
        self._count(cache.buffers())
        self._fit()

    def _count(self, buffers: Mapping[int, int]) -> None:
        for buffer, size in buffers.items():
            if buffer in self._sizes:
                self.nbytes += size - self._sizes[buffer]
                self._sizes[buffer] = size

    def _fit(self) -> None:
        while self.nbytes > self.max_bytes:
            self._drop(next(iter(self._kept)))

    def _drop(self, each: bytes) -> None:
        for buffer in self._kept.pop(each).buffers:
            self._users[buffer] -= 1
            if not self._users[buffer]:
                del self._users[buffer]
                self.nbytes -= self._sizes.pop(buffer)


def hashes(tokens: NDArray[np.int32], cuts: Sequence[int]) -> list[bytes]:
    """For each piece of tokens [N], by where they end, a hash of it and of all before it."""
    chain, found = b"", []
    for start, end in pairwise([0, *cuts]):
        chain = blake2b(chain + tokens[start:end].tobytes(), digest_size=16).digest()
        found.append(chain)
    return found


def read(backend: Backend, tokens: NDArray[np.int32], rule: PieceRule, kept: PrefixCache | None = None) -> Context:
    """Encode what of a prompt [N] no kept cache holds; and keep its places."""
    cuts = rule.boundaries(tokens)
    if kept is None:
        kept = PrefixCache(0)
    places = {len(tokens), *(cut for cut in cuts[-2:-1] if not rule.is_boundary(tokens)), *_first_turn(tokens, rule)}
    return _read_on(backend, tokens, cuts, kept, places)


def settle(backend: Backend, context: Context, written: Sequence[int], rule: PieceRule, kept: PrefixCache, *, step: int) -> None:
    """Keep what has been written behind a context, for texts that go on from there; encodes what is left of its pieces.

    Canvases that were committed as a later text will be cut are not encoded again. What was written otherwise is: one token at a
    time, or in shorter canvases. Where there is no room to keep it, nothing is encoded.

    Args:
        context: its cache has gone on with the reply, or some of it.
        written: the reply's tokens, up to its end.
        step: how many of them were committed at a time.
    """
    tokens = np.append(context.tokens, np.array(written, np.int32))
    cuts = [cut for cut in rule.boundaries(tokens) if cut < len(tokens) or rule.is_boundary(tokens)]
    if not cuts or cuts[-1] <= len(context.tokens) or context.cache.nbytes > kept.max_bytes:
        return
    here, known = len(context.cache), [cut for cut in cuts if cut <= len(context.cache)]
    committed = [*context.cuts, *range(len(context.tokens) + step, here, step), here]
    instead = None
    if here > len(context.tokens) and known == committed:
        chain = hashes(tokens, known)
        kept.keep(chain, context.cache)
        instead = chain[-1]
    if cuts[-1] != here or known != committed:
        _read_on(backend, tokens[: cuts[-1]], cuts, kept, {cuts[-1]}, instead)


def _read_on(
    backend: Backend,
    tokens: NDArray[np.int32],
    cuts: Sequence[int],
    kept: PrefixCache,
    places: set[int],
    instead: bytes | None = None,
) -> Context:
    """Encode the pieces that no kept cache holds, and keep what ends at ``places``."""
    chain = hashes(tokens, cuts)
    found, cache = kept.take(chain) or (0, backend.new_cache())
    cached, started = len(cache), time.perf_counter()
    for index in range(found, len(cuts)):
        backend.encode([Piece(tokens[len(cache) : cuts[index]], cache)])
        if cuts[index] in places:
            kept.keep(chain[: index + 1], cache, instead=instead)
    return Context(tokens, cache, tuple(cuts), cached, time.perf_counter() - started)


def _first_turn(tokens: NDArray[np.int32], rule: PieceRule) -> list[int]:
    """The end of the first turn, where there is another one."""
    ends = np.flatnonzero(np.isin(tokens, rule.ends))[:2] + 1
    return [int(ends[0])] if len(ends) == 2 else []
