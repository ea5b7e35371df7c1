"""Patches: an image as the vision tower takes it, and its key in the caches."""

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Patches:
    """The patches of one image, row by row.

    Attributes:
        pixels: uint8 [P, patch_size * patch_size * 3]. A patch is in the order (row, column, channel).
        rows, columns: patches along the height and the width of the image; P = rows * columns.
        soft_tokens: how many soft tokens the tower makes of them.
    """

    pixels: NDArray[np.uint8]
    rows: int
    columns: int
    soft_tokens: int

    @property
    def values(self) -> NDArray[np.float32]:
        """The pixels float32 [P, patch_size * patch_size * 3], from 0 to 1."""
        return (self.pixels.astype(np.float64) * (1 / 255)).astype(np.float32)

    @property
    def positions(self) -> NDArray[np.int32]:
        """The place int32 [P, 2] of each patch in the image, as (column, row)."""
        places = np.indices((self.rows, self.columns), np.int32)
        return np.stack([places[1], places[0]], axis=-1).reshape(-1, 2)

    @cached_property
    def digest(self) -> bytes:
        """A hash of the patches. Images with the same hash have the same features."""
        return blake2b(np.array([self.rows, self.columns], np.int32).tobytes() + self.pixels.tobytes(), digest_size=16).digest()

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes


@dataclass(frozen=True, eq=False)
class PlacedImage:
    """An image in a text: its soft tokens are the tokens from ``start`` on."""

    start: int
    patches: Patches

    @property
    def stop(self) -> int:
        return self.start + self.patches.soft_tokens
