"""Reads images: decodes them, turns them upright, and cuts them into patches of the size that a budget allows.

The patches are those of Gemma 4's image processor in `transformers` (``Gemma4ImageProcessorPil``), bit for bit, except that an
image is turned upright as its EXIF data say, and that 16-bit grey is scaled to 8 bits. Colour profiles are not applied, as there.
"""

import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlx_diffgemma import fields
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.files import first_line
from mlx_diffgemma.vision.formats import DAMAGED, BadFile, exif_orientation, parse
from mlx_diffgemma.vision.patches import Patches
from mlx_diffgemma.vision_config import BUDGETS, VisionConfig

#: The most pixels of an image before it is resized. Pillow warns beyond this number. Reading takes up to 8 bytes per pixel.
MAX_PIXELS = 89_478_485
#: The most bytes of an image file.
MAX_BYTES = 256 << 20

# Pixels that are converted at once.
_BAND = 1 << 20
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FORMATS = "a PNG, JPEG, WebP, GIF, BMP or HEIC file"


class Size(NamedTuple):
    """What an image is resized to, in pixels, and the soft tokens that it takes then."""

    height: int
    width: int
    soft_tokens: int


def read_picture(source: Any, vision: VisionConfig, budget: int | None = None) -> Patches:
    """Read an image.

    Args:
        source: a path; the bytes of a file; a Pillow image; or an array [height, width], [height, width, 3] or
            [height, width, 4] of uint8, or of floats from 0 to 1. Of a file with several frames, the first one is read. A Pillow
            image is turned upright as its EXIF data say.
        budget: the most soft tokens, one of :data:`~mlx_diffgemma.vision_config.BUDGETS`; ``vision.soft_tokens`` by default.

    Returns:
        The patches of the image on a white background.

    Raises:
        InputError: the source is no such image, is damaged or too large, or cannot be read; or the budget is no such number.
    """
    name = shown_path(source) if isinstance(source, str | os.PathLike) else "the image"
    with reading(name):
        image, orientation = _opened(source, name)
        _check_size(*image.size, name)
        rgb = _as_rgb(image, name)
        del image  # as large as the copy
        if orientation != 1:
            rgb = rgb.transpose(_UPRIGHT[orientation])
    return to_patches(rgb, picture_size(rgb.height, rgb.width, vision, budget), vision)


def picture_size(height: int, width: int, vision: VisionConfig, budget: int | None = None) -> Size:
    """The size that an upright image of ``height`` and ``width`` pixels is resized to, without reading it.

    With a budget of B soft tokens, the sides are the largest multiples of ``vision.side`` that keep the aspect ratio, rounded
    down, within B squares of that side. A side that would be 0 becomes one square. The other side then is the aspect ratio,
    rounded down, in squares, and at most B.

    Raises InputError if the budget is not one of :data:`~mlx_diffgemma.vision_config.BUDGETS`, if a side is not positive, or if
    the tower has not enough positions for one.
    """
    budget = vision.soft_tokens if budget is None else budget
    if type(budget) is not int or budget not in BUDGETS:
        raise InputError(f"the budget of an image must be one of {', '.join(map(str, BUDGETS))}, got {fields.shown(budget)}")
    if min(height, width) < 1:
        raise InputError(f"the image has no pixels: it is {width} x {height}")
    side = vision.side
    factor = math.sqrt(budget * side**2 / (height * width))
    rows, columns = (math.floor(factor * length / side) for length in (height, width))
    if rows == 0:
        rows, columns = 1, min(width // height, budget)
    elif columns == 0:
        rows, columns = min(height // width, budget), 1
    patches = max(rows, columns) * vision.pooling_kernel_size
    if patches > vision.position_embedding_size:
        raise InputError(
            f"an image of {width} x {height} has {patches} patches along a side, but the model has positions for "
            f"{vision.position_embedding_size}; use a smaller budget, or a less narrow image"
        )
    return Size(rows * side, columns * side, rows * columns)


def to_patches(rgb: Image.Image, size: Size, vision: VisionConfig) -> Patches:
    """Resize an upright RGB image, and cut it into patches."""
    if rgb.size != (size.width, size.height):
        rgb = rgb.resize((size.width, size.height), Image.Resampling.BICUBIC)
    side = vision.patch_size
    rows, columns = size.height // side, size.width // side
    pixels = np.asarray(rgb).reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(rows * columns, side * side * 3)
    return Patches(pixels, rows, columns, size.soft_tokens)


def open_file(path: str | os.PathLike[str], most: int, what: str) -> BinaryIO:
    """Open a file. Raises InputError unless it is a regular file of at most ``most`` bytes, or a link to one.

    Nothing else is opened: a pipe, for example, would wait for its writer.
    """
    name = shown_path(path)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{name}: not a file; give the path of {what}")
        if status.st_size > most:
            raise InputError(f"{name}: has {status.st_size:,} bytes, but {what} may have {most:,}; make it smaller")
        return open(path, "rb")
    except FileNotFoundError:
        raise InputError(f"{name}: there is no such file") from None
    except InputError:
        raise
    except (OSError, ValueError) as broken:
        reason = broken.strerror if isinstance(broken, OSError) and broken.strerror else first_line(broken)
        raise InputError(f"{name}: cannot be read: {reason}") from None


def shown_path(path: str | os.PathLike[str]) -> str:
    """A path as a message shows it, not longer than a line."""
    name = str(path)
    return name if len(name) <= 200 else f"{name[:197]}..."


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Raises InputError for whatever a damaged file raises within."""
    try:
        yield
    except InputError:
        raise
    except BadFile as bad:
        raise InputError(f"{name}: {bad}") from None
    except Exception:  # noqa: BLE001 (Pillow and FFmpeg raise errors of many classes)
        raise InputError(f"{name}: {DAMAGED}") from None


def _opened(source: Any, name: str) -> tuple[Image.Image, int]:
    """The image, whose pixels need not be decoded yet, and its orientation."""
    if isinstance(source, Image.Image):
        exif = source.info.get("exif", b"")
        return source, exif_orientation(exif) if isinstance(exif, bytes) else 1
    if isinstance(source, np.ndarray):
        return _of_array(source), 1
    if isinstance(source, str | os.PathLike):
        with open_file(source, MAX_BYTES, "an image") as file:
            data = file.read(MAX_BYTES)
    elif isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    else:
        raise InputError(
            f"an image must be a path, bytes, a Pillow image or a NumPy array, got an object of type {type(source).__name__}"
        )
    if len(data) > MAX_BYTES:
        raise InputError(f"{name}: has {len(data):,} bytes, but an image may have {MAX_BYTES:,}; make it smaller")
    return _of_file(data, name)


def _of_file(data: bytes, name: str) -> tuple[Image.Image, int]:
    file = parse(data)
    if file is None:
        what = "empty" if not data else "not an image that can be read"
        raise InputError(f"{name}: {what}; use {_FORMATS}")
    if file.format == "HEIF":
        return _heif(file.data, name), 1  # its reader turns it upright
    _check_size(file.width, file.height, name)
    image = Image.open(BytesIO(file.data), formats=[file.format])
    if image.size != (file.width, file.height):
        raise BadFile(DAMAGED)
    return image, file.orientation


def _heif(data: bytes, name: str) -> Image.Image:
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise InputError(f"{name}: HEIC needs another package; run: pip install pillow-heif") from None
    image: Image.Image = HeifImageFile(BytesIO(data))  # type: ignore[no-untyped-call]
    return image


def _check_size(width: int, height: int, name: str) -> None:
    if min(width, height) < 1:
        raise InputError(f"{name}: has no pixels: it is {width} x {height}")
    if width * height > MAX_PIXELS:
        raise InputError(f"{name}: has {width} x {height} pixels, more than {MAX_PIXELS:,}; make it smaller")


def _of_array(array: NDArray[Any]) -> Image.Image:
    """An image of uint8 or floats."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        shape = " x ".join(map(str, array.shape))
        raise InputError(f"an image array must be [height, width], or have 3 or 4 channels as its last axis, got {shape}")
    _check_size(array.shape[1], array.shape[0], "the image")
    if array.dtype.kind == "f":
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 1):  # also if it is NaN
            raise InputError(f"an image array of floats must have values from 0 to 1, got {low:g} to {high:g}")
        pixels = np.empty(array.shape, np.uint8)
        for rows in _bands(array.shape[1], array.shape[0]):
            pixels[rows] = np.rint(array[rows].astype(np.float32) * 255)
        array = pixels
    elif array.dtype != np.uint8:
        raise InputError(f"an image array must be of uint8, or of floats from 0 to 1, got {array.dtype}")
    return Image.fromarray(array)


def _bands(width: int, height: int) -> list[slice]:
    """Slices of rows of about _BAND pixels."""
    rows = max(1, _BAND // width)
    return [slice(top, min(top + rows, height)) for top in range(0, height, rows)]


def _as_rgb(image: Image.Image, name: str) -> Image.Image:
    """The image as RGB on white. A band at a time: whole, it would take four copies."""
    if image.mode in ("I", "F"):
        raise InputError(f"{name}: its pixels of Pillow's mode {image.mode} have no known range; convert it to RGB")
    image.load()
    if image.mode == "RGB" and image.info.get("transparency") is None:
        return image
    rgb = Image.new("RGB", image.size)
    for rows in _bands(*image.size):
        band = image.crop((0, rows.start, image.size[0], rows.stop))
        rgb.paste(_flattened(band), (0, rows.start))
    return rgb


def _flattened(band: Image.Image) -> Image.Image:
    transparent = band.info.get("transparency")
    if band.mode.startswith("I;16"):
        grey = np.asarray(band).astype(np.uint32)
        bright = ((grey * 255 + 32767) // 65535).astype(np.uint8)
        if transparent is not None:
            bright[grey == transparent] = 255
        return Image.fromarray(bright).convert("RGB")
    if band.mode == "La":
        band = band.convert("LA")
    if transparent is None and not band.mode.endswith(("A", "a")):
        return band.convert("RGB")
    band = band.convert("RGBA")
    white = Image.new("RGBA", band.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, band).convert("RGB")
