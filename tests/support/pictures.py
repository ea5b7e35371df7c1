"""Random pictures as patches, texts with pictures in them, and what `transformers` takes for these."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mlx_diffgemma.backends import Backend, Cache, ImageSpan, Piece
from mlx_diffgemma.config import FULL, SLIDING
from mlx_diffgemma.vision.patches import Patches
from mlx_diffgemma.vision_config import VisionConfig

#: Images in a text: where the soft tokens of each begin.
Placed = Sequence[tuple[int, Patches]]


def random_picture(vision: VisionConfig, rows: int, columns: int, seed: int = 0) -> Patches:
    """A picture of rows x columns soft tokens."""
    side = vision.pooling_kernel_size
    shape = (rows * columns * side**2, 3 * vision.patch_size**2)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Patches(pixels, rows * side, columns * side, rows * columns)


def random_text(backend: Backend, length: int, images: Placed = (), seed: int = 0) -> NDArray[np.int32]:
    """Random tokens [N], and soft tokens where the images are. Only these are soft tokens."""
    soft = backend.config.image_token_id
    assert soft == backend.config.vocab_size - 1
    tokens = np.random.default_rng(seed).integers(0, soft, length, dtype=np.int32)
    for start, patches in images:
        tokens[start : start + patches.soft_tokens] = soft
    return tokens


def piece_with(backend: Backend, tokens: NDArray[np.int32], images: Placed, cache: Cache | None = None) -> Piece:
    """A piece with images in it, for a new cache unless one is given."""
    features = backend.see([patches for _, patches in images])
    spans = [ImageSpan(start, seen) for (start, _), seen in zip(images, features, strict=True)]
    return Piece(tokens, backend.new_cache() if cache is None else cache, tuple(spans))


def with_images(tokens: NDArray[Any], images: Placed) -> dict[str, torch.Tensor]:
    """What `transformers` takes besides tokens [B, N]. Its image processor pads all images to one number of patches."""
    kinds, most = np.zeros(tokens.shape, np.int64), max(len(patches.pixels) for _, patches in images)
    pixels, positions = [], []
    for start, patches in images:
        kinds[:, start : start + patches.soft_tokens] = 1
        missing = ((0, most - len(patches.pixels)), (0, 0))
        pixels.append(np.pad(patches.values, missing))
        positions.append(np.pad(patches.positions, missing, constant_values=-1))
    return {
        "pixel_values": torch.tensor(np.stack(pixels * len(tokens))),
        "image_position_ids": torch.tensor(np.stack(positions * len(tokens)), dtype=torch.long),
        "mm_token_type_ids": torch.tensor(kinds),
    }


def explicit_masks(length: int, window: int, images: Placed, *, both_ways: bool) -> dict[str, torch.Tensor]:
    """The masks of the causal pass by definition. On sliding layers, images see each other in both directions or not at all."""
    image = np.full(length, -1)
    for index, (start, patches) in enumerate(images):
        image[start : start + patches.soft_tokens] = index
    after = np.arange(length)[:, None] - np.arange(length)[None]  # how far a query stands after a key
    within = (image[:, None] == image[None]) & (image[:, None] >= 0) & both_ways
    masks = {SLIDING: ((after >= 0) | within) & (np.abs(after) < window), FULL: after >= 0}
    return {kind: torch.where(torch.tensor(seen), 0.0, -torch.inf)[None, None] for kind, seen in masks.items()}
