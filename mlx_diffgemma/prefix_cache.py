"""The prefix cache: keeps keys and values from one request to the next, so that a common prefix is encoded only once.

The prefix cache keeps the KV cache of a text at places where a piece ends. It finds a KV cache by its content: a hash of the
pieces that were encoded, and of the images in them. Each cut depends only on the tokens before it
(:class:`~mlx_diffgemma.prompts.PieceRule`), so two texts with the same prefix have the same pieces. What is found is, bit for
bit, what encoding the text again would give.

These places are kept: the end of each prompt, where the reply begins (the template may render that reply differently in the next
turn, without its thoughts), the end of each reply, and the end of a conversation's first turn (instructions and tools, which many
conversations may share).

The features of images are kept too, by the hash of each image. When a text changes before an image, the image is encoded again
without another pass through the vision tower.

In bfloat16, the five full layers of the released model take 20,480 bytes per token (2 heads of 512, keys and values), shared by
all kept places of one text. The 25 sliding layers (8 heads of 256, keys and values, 1,023 positions and room for two canvases)
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

from mlx_diffgemma.backends import Backend, Cache, Features, ImageSpan, Piece
from mlx_diffgemma.prompts import PieceRule, PromptTokens

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mlx_diffgemma.vision.patches import Patches, PlacedImage

#: Default limit of the kept keys and values, in bytes.
MAX_BYTES = 4 << 30

#: Bytes that a kept place takes for each buffer besides its keys and values, for the framework's objects. In PyTorch, 7,500
#: of a six-layer model took 9.7 kB each.
BUFFER_BYTES = 1600

#: The part of the limit that features of images may take. Those of an image of 280 soft tokens take 1.6 MB in bfloat16.
FEATURES_SHARE = 1 / 16

#: How many places of one text are kept between the end of its first turn and its newest place.
PLACES = 2


@dataclass(frozen=True, eq=False)
class Context:
    """A text that has been encoded.

    Attributes:
        tokens: int32 [N].
        images: the images in the text.
        cache: holds all the tokens.
        cuts: where the pieces end in which the tokens were encoded.
        salt: only texts with the same salt share places in a prefix cache.
        cached_tokens: how many of the tokens were found in the prefix cache.
        encode_seconds: wall time of encoding the other tokens.
    """

    tokens: NDArray[np.int32]
    cache: Cache
    cuts: tuple[int, ...]
    salt: str = ""
    cached_tokens: int = 0
    encode_seconds: float = 0.0
    images: tuple[PlacedImage, ...] = ()

    def fork(self) -> Context:
        """A copy from which another text can continue independently."""
        return replace(self, cache=self.cache.fork())


@dataclass(eq=False)
class _Kept:
    cache: Cache
    buffers: dict[int, int] = field(default_factory=dict)  # bytes of each buffer, by its identity


class PrefixCache:
    """The KV caches of earlier texts. The least recently used are dropped first.

    Not safe for several threads at once.

    Args:
        max_bytes: limit of all that is kept, in bytes. What several places share counts once.
        buffer_bytes: what each place takes for each buffer besides its keys and values, in bytes.
    """

    def __init__(self, max_bytes: int = MAX_BYTES, *, buffer_bytes: int = BUFFER_BYTES) -> None:
        self.max_bytes, self.buffer_bytes = max_bytes, buffer_bytes
        self.nbytes = 0
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()  # the most recently used last
        self._sizes: dict[int, int] = {}  # bytes of each buffer
        self._users: dict[int, int] = {}  # how many kept places share each buffer
        self._features: OrderedDict[bytes, Features] = OrderedDict()  # the most recently used last
        self._features_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Drop everything."""
        while self._kept:
            self._drop(next(iter(self._kept)))
        while self._features:
            self._drop_features(next(iter(self._features)))

    def features(self, backend: Backend, image: Patches, salt: str) -> Features:
        """The features of an image. It goes through the vision tower only if they are not kept."""
        key = _features_key(image, salt)
        if key in self._features:
            self._features.move_to_end(key)
            return self._features[key]
        [features] = backend.see([image])
        most = self.max_bytes * FEATURES_SHARE
        if features.nbytes <= most:
            self._features[key] = features
            self._features_bytes += features.nbytes
            self.nbytes += features.nbytes
            while self._features_bytes > most:
                self._drop_features(next(iter(self._features)))
            self._fit()
        return features

    def _drop_features(self, key: bytes) -> None:
        features = self._features.pop(key)
        self._features_bytes -= features.nbytes
        self.nbytes -= features.nbytes

    def take(self, hashes: Sequence[bytes]) -> tuple[int, Cache] | None:
        """Find the longest kept prefix of a text: how many pieces it has, and a cache of them. None if there is no kept prefix.

        Args:
            hashes: the hashes of the text's pieces, from :func:`hashes`.
        """
        held = [index for index, each in enumerate(hashes) if each in self._kept]
        for index in held:
            self._kept.move_to_end(hashes[index])
        return (held[-1] + 1, self._kept[hashes[held[-1]]].cache.fork()) if held else None

    def keep(self, hashes: Sequence[bytes], cache: Cache, *, instead: bytes | None = None) -> None:
        """Keep a fork of ``cache``, which holds exactly the pieces of ``hashes``. Drops ``instead``, an earlier place."""
        last = hashes[-1]
        buffers = cache.buffers()
        self._count(buffers)
        if sum(buffers.values()) + self.buffer_bytes * len(buffers) > self.max_bytes:
            self._fit()
            return
        if last in self._kept:
            self._drop(last)  # the new cache may share more buffers with other places
        held = [each for each in hashes[:-1] if each in self._kept]
        for each in {*held[1:-PLACES], *(each for each in held if each == instead)}:
            self._drop(each)
        kept = self._kept[last] = _Kept(cache.fork())
        kept.buffers = dict(kept.cache.buffers())
        self.nbytes += self.buffer_bytes * len(kept.buffers)
        for buffer, size in kept.buffers.items():
            self._users[buffer] = self._users.get(buffer, 0) + 1
            if buffer not in self._sizes:
                self._sizes[buffer] = size
                self.nbytes += size
        self._fit()

    def forget(self, context: Context) -> None:
        """Drop all places of a text, whose keys and values may be wrong, and the features of its images."""
        for each in hashes(PromptTokens(context.tokens, context.images), context.cuts, context.salt):
            if each in self._kept:
                self._drop(each)
        for key in {_features_key(image.patches, context.salt) for image in context.images}:
            if key in self._features:
                self._drop_features(key)

    def recount(self, cache: Cache) -> None:
        """Update the sizes of the buffers that ``cache`` shares with kept places. They may have grown as the text went on."""
        self._count(cache.buffers())
        self._fit()

    def _count(self, buffers: Mapping[int, int]) -> None:
        for buffer, size in buffers.items():
            if buffer in self._sizes:
                self.nbytes += size - self._sizes[buffer]
                self._sizes[buffer] = size

    def _fit(self) -> None:
        while self._kept and self.nbytes > self.max_bytes:
            self._drop(next(iter(self._kept)))

    def _drop(self, each: bytes) -> None:
        for buffer in self._kept.pop(each).buffers:
            self.nbytes -= self.buffer_bytes
            self._users[buffer] -= 1
            if not self._users[buffer]:
                del self._users[buffer]
                self.nbytes -= self._sizes.pop(buffer)


def hashes(prompt: PromptTokens, cuts: Sequence[int], salt: str = "") -> list[bytes]:
    """For each piece, a hash of it, of all pieces before it and of the salt. ``cuts`` says where the pieces end."""
    chain, found = blake2b(salt.encode(errors="surrogatepass"), digest_size=16).digest(), []
    for start, end in pairwise([0, *cuts]):
        seen = b"".join(each.patches.digest for each in _images(prompt.images, start, end))
        size = (end - start).to_bytes(8, "little")  # separates the tokens from the images
        chain = blake2b(chain + size + prompt.ids[start:end].tobytes() + seen, digest_size=16).digest()
        found.append(chain)
    return found


def _features_key(image: Patches, salt: str) -> bytes:
    return blake2b(image.digest + salt.encode(errors="surrogatepass"), digest_size=16).digest()


def _images(images: Sequence[PlacedImage], start: int, end: int) -> list[PlacedImage]:
    """The images between two cuts."""
    return [image for image in images if start <= image.start < end]


def read(backend: Backend, prompt: PromptTokens, rule: PieceRule, kept: PrefixCache | None = None, *, salt: str = "") -> Context:
    """Encode the part of a prompt that is not in the prefix cache, and keep the prompt's places.

    Args:
        salt: only texts with the same salt share places. Who can see how much of a prompt was cached learns nothing about prompts
            with another salt.
    """
    tokens = prompt.ids
    cuts = rule.boundaries(tokens)
    if kept is None:
        kept = PrefixCache(0)
    places = {len(tokens), *(cut for cut in cuts[-2:-1] if not rule.is_boundary(tokens)), *_first_turn(tokens, rule)}
    return _read_on(backend, prompt, cuts, kept, places, salt)


def settle(backend: Backend, context: Context, written: Sequence[int], rule: PieceRule, kept: PrefixCache, *, step: int) -> None:
    """Keep the text that was written after a context, for later texts that continue it. Encodes the pieces that are missing.

    Canvases that were committed at the same cuts that a later text will have are not encoded again. A reply that was written one
    token at a time, or in shorter canvases, is encoded again. If there is no room to keep the text, nothing is encoded.

    Args:
        context: the prompt. Its cache also holds the reply, or a part of it.
        written: the reply's tokens, up to its end.
        step: how many tokens were committed at a time.
    """
    tokens = np.append(context.tokens, np.array(written, np.int32))
    cuts = [cut for cut in rule.boundaries(tokens) if cut < len(tokens) or rule.is_boundary(tokens)]
    if not cuts or cuts[-1] <= len(context.tokens) or context.cache.nbytes > kept.max_bytes:
        return
    here, known = len(context.cache), [cut for cut in cuts if cut <= len(context.cache)]
    committed = [*context.cuts, *range(len(context.tokens) + step, here, step), here]
    instead = None
    if here > len(context.tokens) and known == committed:
        chain = hashes(PromptTokens(tokens, context.images), known, context.salt)
        kept.keep(chain, context.cache)
        instead = chain[-1]
    if cuts[-1] != here or known != committed:
        whole = PromptTokens(tokens[: cuts[-1]], context.images)
        _read_on(backend, whole, cuts, kept, {cuts[-1]}, context.salt, instead)


def _read_on(
    backend: Backend,
    prompt: PromptTokens,
    cuts: Sequence[int],
    kept: PrefixCache,
    places: set[int],
    salt: str,
    instead: bytes | None = None,
) -> Context:
    """Encode the pieces that are not in the prefix cache, and keep the cache at ``places``."""
    chain = hashes(prompt, cuts, salt)
    found, cache = kept.take(chain) or (0, backend.new_cache())
    cached, started = len(cache), time.perf_counter()
    for index in range(found, len(cuts)):
        start, end = len(cache), cuts[index]
        images = [
            ImageSpan(image.start - start, kept.features(backend, image.patches, salt))
            for image in _images(prompt.images, start, end)
        ]
        backend.encode([Piece(prompt.ids[start:end], cache, tuple(images))])
        if end in places:
            kept.keep(chain[: index + 1], cache, instead=instead)
    return Context(prompt.ids, cache, tuple(cuts), salt, cached, time.perf_counter() - started, prompt.images)


def _first_turn(tokens: NDArray[np.int32], rule: PieceRule) -> list[int]:
    """The end of the first turn, if a second turn ends too."""
    ends = np.flatnonzero(np.isin(tokens, rule.ends))[:2] + 1
    return [int(ends[0])] if len(ends) == 2 else []
