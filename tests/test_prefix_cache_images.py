"""Images in the prefix cache: which prefixes are equal, and how often an image goes through the vision tower."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_diffgemma.prefix_cache import Context, PrefixCache, hashes, read, settle
from mlx_diffgemma.prompts import PieceRule, PromptTokens, place_images
from mlx_diffgemma.vision.patches import Patches
from support.fake import FakeBackend

END, SOFT, CANVAS = 9, 8, 4
RULE = PieceRule(CANVAS, (END,), (), (SOFT,))


def image(value: int, soft_tokens: int = 2) -> Patches:
    return Patches(np.full((soft_tokens, 3), value, np.uint8), soft_tokens, 1, soft_tokens)


def prompt(*parts: int | Patches) -> PromptTokens:
    """A prompt of token ids, with the soft tokens of images between them."""
    ids = [token for part in parts for token in ([part] if isinstance(part, int) else [SOFT] * part.soft_tokens)]
    return place_images(np.array(ids, np.int32), [part for part in parts if isinstance(part, Patches)], (SOFT,))


class Spans(FakeBackend):
    """Records the images of each piece: where they start, and the value of their features."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.spans: list[list[tuple[int, float]]] = []

    def encode(self, pieces: Sequence[Any]) -> None:
        super().encode(pieces)
        self.spans += [[(span.start, float(span.features[0, 0])) for span in piece.images] for piece in pieces]

    @property
    def seen(self) -> list[int]:
        return [tokens[0] for calls in self.tokens_of("see") for tokens in calls]


def test_the_same_tokens_with_another_image_are_another_prefix() -> None:
    one, other = prompt(1, image(5), END), prompt(1, image(6), END)
    assert one.ids.tolist() == other.ids.tolist()
    assert hashes(one, [4]) != hashes(other, [4])
    assert hashes(one, [4]) == hashes(prompt(1, image(5), END), [4])
    wide = Patches(np.full((4, 3), 5, np.uint8), 1, 4, 4)
    assert hashes(prompt(1, image(5, 4), END), [6]) != hashes(prompt(1, wide, END), [6]), "the same pixels in another shape"


def test_pieces_get_the_features_of_their_images() -> None:
    backend = Spans()
    read(backend, prompt(1, image(5), END, 2, image(6, 3), 3, image(7), END, image(5), 4), RULE)
    assert [spans for spans in backend.spans if spans] == [[(1, 5.0)], [(1, 6.0), (5, 7.0)], [(0, 5.0)]]


def test_an_image_is_seen_once_while_its_features_are_kept() -> None:
    backend, kept = Spans(), PrefixCache()
    first = read(backend, prompt(1, END, image(5), END, 2), RULE, kept)
    assert (first.cached_tokens, backend.seen) == (0, [5])
    again = read(backend, prompt(1, END, image(5), END, 2, END, image(6), 3), RULE, kept)
    assert again.cached_tokens > 0
    assert backend.seen == [5, 6], "the first image is in the KV cache"
    edited = read(backend, prompt(3, END, image(5), END, 2, END, image(6), 3), RULE, kept)
    assert (edited.cached_tokens, backend.seen) == (0, [5, 6]), "everything is encoded again, with the features kept"
    assert [spans for spans in backend.spans if spans][-2:] == [[(0, 5.0)], [(0, 6.0)]]
    read(backend, prompt(3, END, image(5), END), RULE, kept, salt="another client")
    assert backend.seen == [5, 6, 5], "nobody learns from the time it takes what another client has sent"


def test_features_have_their_share_of_the_limit() -> None:
    backend = Spans()
    size = backend.see([image(0)])[0].nbytes
    kept = PrefixCache(16 * 3 * size, buffer_bytes=0)
    for value in (1, 2, 3, 4):
        kept.features(backend, image(value), "")
    assert kept.nbytes == 3 * size
    for value in (2, 3, 4, 1):
        kept.features(backend, image(value), "")
    assert backend.seen == [0, 1, 2, 3, 4, 1], "the least recently used was dropped"
    PrefixCache(0).features(backend, image(9), "")
    kept.clear()
    assert kept.nbytes == 0


def test_a_reply_after_images_is_kept_with_them() -> None:
    backend, kept = Spans(), PrefixCache()
    context: Context = read(backend, prompt(1, image(5), END, 2), RULE, kept)
    settle(backend, context, [3, 4, END], RULE, kept, step=CANVAS)
    found = read(backend, prompt(1, image(5), END, 2, 3, 4, END, 7), RULE, kept)
    assert found.cached_tokens == 8
    other = read(backend, prompt(1, image(6), END, 2, 3, 4, END, 7), RULE, kept)
    assert other.cached_tokens == 0
