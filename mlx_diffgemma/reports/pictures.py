"""Pictures of random pixels, for reports that need no real ones."""

import numpy as np

from mlx_diffgemma import noise
from mlx_diffgemma.vision.patches import Patches
from mlx_diffgemma.vision_config import VisionConfig


def random_picture(vision: VisionConfig, rows: int, columns: int, seed: int, number: int) -> Patches:
    """A picture of ``rows`` x ``columns`` soft tokens. Another ``number`` gives another picture of the same seed."""
    side = vision.pooling_kernel_size
    shape = rows * columns * side**2, 3 * vision.patch_size**2
    pixels = noise.canvas_tokens(seed, number, 1, shape[0] * shape[1], 256).astype(np.uint8)
    return Patches(pixels.reshape(shape), rows * side, columns * side, rows * columns)
