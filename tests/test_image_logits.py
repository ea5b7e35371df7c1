"""Logits of texts with images, on both backends, against `transformers` and against the same text cut into other pieces.

The reference takes a text at once. Under ``image_mask="transformers"`` it makes its own masks, as its ``generate`` does.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mlx_diffgemma import load
from mlx_diffgemma.backends import QUERY_TILE, Backend, ImageSpan, Piece, Row, load_backend
from mlx_diffgemma.backends.torch import reference as reference_backend
from mlx_diffgemma.backends.torch.cache import Cache, TrainingCache
from mlx_diffgemma.backends.torch.model import Segment
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.config import IMAGE_MASKS
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.pipeline import prepare
from mlx_diffgemma.prompts import CHUNK
from support.checkpoints import make_chat_checkpoint
from support.comparing import assert_close
from support.pictures import Placed, piece_with, random_picture, random_text
from support.reference import PICTURE_SHAPES, Reference

ATOL = 1e-4

Load = Callable[..., Backend]
Oracle = Callable[..., Reference]


def pictures(backend: Backend, *placed: tuple[int, int, int]) -> Placed:
    """Random pictures from (start, rows, columns) of soft tokens."""
    assert backend.config.vision is not None
    return [(start, random_picture(backend.config.vision, *size, seed=seed)) for seed, (start, *size) in enumerate(placed)]


def canvas_logits(backend: Backend, piece: Piece, canvas: NDArray[np.int32]) -> NDArray[np.float32]:
    return backend.logits([Row(canvas, piece.cache, 1.0)])[0]


#: Texts with 1, 2 and 5 images: their lengths, and (start, rows, columns) of the images. Text is between any two.
TEXTS: dict[str, tuple[int, tuple[tuple[int, int, int], ...]]] = {
    "one": (40, ((4, 3, 5),)),
    "one at each end": (50, ((0, 2, 3), (26, 4, 6))),
    "five": (70, ((1, 1, 1), (4, 2, 4), (13, 1, 9), (30, 5, 5), (57, 2, 1))),
}


@pytest.mark.parametrize("image_mask", IMAGE_MASKS)
@pytest.mark.parametrize("shape", PICTURE_SHAPES)
def test_logits_of_texts_with_images(backend: Load, reference: Oracle, backend_name: str, shape: str, image_mask: str) -> None:
    ours, oracle = backend(backend_name, shape, image_mask=image_mask), reference(shape)
    for name, (length, placed) in TEXTS.items():
        case, images = f"{backend_name}, {shape}, {image_mask}, {name}", pictures(ours, *placed)
        tokens, canvas = random_text(ours, length, images), random_text(ours, ours.config.canvas_length, seed=1)
        piece = piece_with(ours, tokens, images)
        [causal] = ours.logits([piece])
        expected = oracle.picture_logits(tokens, images, image_mask)
        assert_close(causal, expected, ATOL, f"{case}, causal")
        assert_close(ours.next_logits([piece.cache])[0], expected[-1], ATOL, f"{case}, the next token")
        expected = oracle.picture_logits(tokens, images, image_mask, canvas)
        assert_close(canvas_logits(ours, piece, canvas), expected, ATOL, f"{case}, canvas")


def test_the_masks_differ(backend: Load, backend_name: str) -> None:
    found = []
    for image_mask in IMAGE_MASKS:
        ours = backend(backend_name, "pictures", image_mask=image_mask)
        images = pictures(ours, (4, 3, 5))
        found.append(ours.logits([piece_with(ours, random_text(ours, 40, images), images)])[0])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert_close(found[one][:4], found[other][:4], ATOL, "before the image")
        assert np.abs(found[one][4:19] - found[other][4:19]).max() > 0.1, f"{IMAGE_MASKS[one]} is {IMAGE_MASKS[other]}"


def test_the_checkpoint_says_which_mask(backend: Load, backend_name: str) -> None:
    assert backend(backend_name, "pictures").config.image_mask == "makers"
    assert backend(backend_name, "base").config.image_mask == "causal"
    with pytest.raises(InputError, match="unknown image_mask 'all'; known are makers, transformers, causal"):
        backend(backend_name, "pictures", image_mask="all")


@pytest.mark.parametrize("image_mask", IMAGE_MASKS)
def test_an_image_longer_than_a_tile(backend: Load, reference: Oracle, backend_name: str, image_mask: str) -> None:
    """It is longer than the window, too."""
    ours, oracle = backend(backend_name, "small_squares", image_mask=image_mask), reference("small_squares")
    images = pictures(ours, (QUERY_TILE - 30, 15, 19), (QUERY_TILE + 260, 2, 2))
    assert images[0][1].soft_tokens > max(QUERY_TILE, ours.config.sliding_window)
    tokens, canvas = random_text(ours, QUERY_TILE + 280, images), random_text(ours, ours.config.canvas_length, seed=1)
    piece = piece_with(ours, tokens, images)
    case = f"{backend_name}, {image_mask}"
    assert_close(ours.logits([piece])[0], oracle.picture_logits(tokens, images, image_mask), ATOL, f"{case}, causal")
    expected = oracle.picture_logits(tokens, images, image_mask, canvas)
    assert_close(canvas_logits(ours, piece, canvas), expected, ATOL, f"{case}, canvas")


@pytest.mark.parametrize("image_mask", ["makers", "transformers"])
def test_an_image_longer_than_a_chunk(backend: Load, reference: Oracle, backend_name: str, image_mask: str) -> None:
    ours, oracle = backend(backend_name, "small_squares", image_mask=image_mask), reference("small_squares")
    images = pictures(ours, (5, 33, 32))
    assert images[0][1].soft_tokens > CHUNK
    tokens = random_text(ours, 1080, images)
    [causal] = ours.logits([piece_with(ours, tokens, images)])
    assert_close(causal, oracle.picture_logits(tokens, images, image_mask), ATOL, f"{backend_name}, {image_mask}")


# --- pieces ---


def cut(backend: Backend, tokens: NDArray[np.int32], images: Placed, ends: list[int]) -> tuple[NDArray[np.float32], Piece]:
    """Logits at every position of a text that is encoded in pieces, and the last piece."""
    features = backend.see([patches for _, patches in images])
    cache, found = backend.new_cache(), []
    for start, stop in zip([0, *ends], [*ends, len(tokens)], strict=True):
        spans = [
            ImageSpan(begin - start, each) for (begin, _), each in zip(images, features, strict=True) if start <= begin < stop
        ]
        piece = Piece(tokens[start:stop], cache, tuple(spans))
        found += backend.logits([piece])
    return np.concatenate(found), piece


@pytest.mark.parametrize("image_mask", ["makers", "transformers"])
def test_any_cut_gives_the_same_logits(backend: Load, backend_name: str, image_mask: str) -> None:
    """A text is cut at every place outside its images, which thus stand at every offset to the cut and to the window's edge."""
    ours = backend(backend_name, "pictures", image_mask=image_mask)
    images = pictures(ours, (3, 2, 2), (10, 3, 4), (24, 1, 3))  # the window is 8
    tokens, canvas = random_text(ours, 36, images), random_text(ours, ours.config.canvas_length, seed=1)
    whole, last = cut(ours, tokens, images, [])
    expected = canvas_logits(ours, last, canvas)
    inside = {place for start, patches in images for place in range(start + 1, start + patches.soft_tokens)}
    places = [place for place in range(1, len(tokens)) if place not in inside]
    for ends in (*([place] for place in places), places, places[::2], places[::3], places[1::4]):
        logits, piece = cut(ours, tokens, images, ends)
        case = f"{backend_name}, {image_mask}, cut at {ends}"
        assert_close(logits, whole, 1e-5, case)
        assert_close(canvas_logits(ours, piece, canvas), expected, 1e-5, f"{case}, canvas")


@pytest.mark.parametrize("image_mask", ["makers", "transformers"])
def test_images_at_every_offset_to_the_window(backend: Load, reference: Oracle, backend_name: str, image_mask: str) -> None:
    """A canvas and a piece after the image: it lies in the window, across its edge and before it."""
    ours, oracle = backend(backend_name, "pictures", image_mask=image_mask), reference("pictures")
    canvas = random_text(ours, ours.config.canvas_length, seed=1)
    for after in range(1, 14):
        images = pictures(ours, (2, 2, 3))
        tokens = random_text(ours, 8 + after, images)
        logits, piece = cut(ours, tokens, images, [8])
        case = f"{backend_name}, {image_mask}, {after} tokens after the image"
        assert_close(logits, oracle.picture_logits(tokens, images, image_mask), ATOL, case)
        expected = oracle.picture_logits(tokens, images, image_mask, canvas)
        assert_close(canvas_logits(ours, piece, canvas), expected, ATOL, f"{case}, canvas")


def test_texts_with_and_without_images_side_by_side(backend: Load, reference: Oracle, backend_name: str) -> None:
    ours, oracle = backend(backend_name, "pictures"), reference("pictures")
    given = [pictures(ours, (4, 3, 5)), [], pictures(ours, (0, 2, 2), (9, 4, 1)), []]
    texts = [random_text(ours, length, images, seed=length) for length, images in zip((30, 17, 13, 1), given, strict=True)]
    pieces = [piece_with(ours, tokens, images) for tokens, images in zip(texts, given, strict=True)]
    for tokens, images, logits in zip(texts, given, ours.logits(pieces), strict=True):
        expected = oracle.picture_logits(tokens, images, "makers") if images else oracle.causal_logits([tokens[None]])[0]
        assert_close(logits, expected, ATOL, f"{backend_name}, {len(tokens)} tokens beside others")


@pytest.mark.parametrize("image_mask", IMAGE_MASKS)
def test_score(backend: Load, reference: Oracle, backend_name: str, image_mask: str) -> None:
    ours, oracle = backend(backend_name, "pictures", image_mask=image_mask), reference("pictures")
    images = pictures(ours, (4, 3, 5), (22, 2, 2))
    tokens = random_text(ours, 40, images)
    logits = oracle.picture_logits(tokens, images, image_mask).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    [scores] = ours.score([piece_with(ours, tokens, images)])
    assert np.isnan(scores[0])
    assert_close(scores[1:], logprobs[np.arange(39), tokens[1:]], ATOL, f"{backend_name}, {image_mask}")


@pytest.mark.parametrize("image_mask", IMAGE_MASKS)
def test_the_reference_backend(backend: Load, checkpoint: Callable[..., Path], image_mask: str) -> None:
    """`transformers` behind our protocol, which `verify` compares with: in one piece and in several, with masks of its own."""
    ours = backend("torch", "pictures", image_mask=image_mask)
    opened = Checkpoint.open(checkpoint("pictures"))
    theirs: Any = reference_backend.load(Checkpoint(**{**vars(opened), "config": ours.config}))
    images = pictures(ours, (3, 2, 2), (10, 3, 4), (24, 1, 3))
    tokens, canvas = random_text(ours, 36, images), random_text(ours, ours.config.canvas_length, seed=1)
    for ends in ([], [9, 23], [1, 24]):
        (logits, piece), (expected, last) = (cut(each, tokens, images, ends) for each in (ours, theirs))
        assert_close(logits, expected, ATOL, f"{image_mask}, cut at {ends}")
        assert_close(canvas_logits(ours, piece, canvas), canvas_logits(theirs, last, canvas), ATOL, f"{image_mask}, canvas")


# --- training ---


def test_training_sees_images_and_gives_them_gradients(backend: Load) -> None:
    """A row has the states of a text alone, and gradients reach the features."""
    ours: Any = backend("torch", "pictures")
    model = ours.model
    texts = torch.tensor(np.stack([random_text(ours, 30, seed=seed) for seed in range(2)])).long()
    features = torch.tensor(np.random.default_rng(0).standard_normal((2, 6, 64), np.float32), requires_grad=True)
    trained = TrainingCache(model.config, 2)
    states = model.encode(texts.flatten(), [Segment(0, 60, trained, [(5, features)])]).unflatten(0, (2, -1))
    for text, own, row in zip(texts, features, states, strict=True):
        alone = model.encode(text, [Segment(0, 30, Cache(model.config), [(5, own.detach())])])
        assert_close(row.detach(), alone, 1e-5, "a row and a text alone")
    states[1, 20:].sum().backward()
    assert features.grad is not None
    assert features.grad[0].abs().max() == 0, "the rows see each other"
    assert (features.grad[1].abs().max(dim=1).values > 0).all()


# --- bad input ---


@pytest.mark.parametrize("starts", [(-1,), (35,), (3, 4), (20, 3), (3, 8)])
def test_spans_that_do_not_fit(backend: Load, backend_name: str, starts: tuple[int, ...]) -> None:
    ours = backend(backend_name, "pictures")
    [features] = ours.see([pictures(ours, (0, 2, 3))[0][1]])
    cache = ours.new_cache()
    piece = Piece(random_text(ours, 40), cache, tuple(ImageSpan(start, features) for start in starts))
    for call in (ours.encode, ours.score, ours.logits):
        with pytest.raises(InputError, match="images must lie in the piece, in order, and must not overlap"):
            call([piece])
    assert len(cache) == 0


def test_a_mask_of_another_name(checkpoint: Callable[..., Path], backend_name: str) -> None:
    with pytest.raises(InputError, match="unknown image_mask 5"):
        load_backend(Checkpoint.open(checkpoint("pictures")), backend_name, image_mask=5)  # type: ignore[arg-type]


def test_the_mask_of_a_loaded_model(tmp_path: Path, backend_name: str) -> None:
    folder = make_chat_checkpoint(tmp_path)
    for image_mask in IMAGE_MASKS:
        model = load(folder, backend=backend_name, image_mask=image_mask)
        assert model.config.image_mask == model.backend.config.image_mask == image_mask
    with pytest.raises(InputError, match="unknown image_mask 'all'; known are makers, transformers, causal"):
        prepare(folder, backend=backend_name, image_mask="all")
    with pytest.raises(InputError, match="image_mask must be a string, got 5"):
        load(folder, backend=backend_name, image_mask=5)  # type: ignore[arg-type]
