"""Saved images and videos: to JSON, as a saved conversation has them, and back.

An image is saved as the model sees it: resized, as a PNG in base64. It is the same after reading it back, whatever happened to
the file that it came from. Because a saved conversation can come from a stranger, it cannot name files or addresses to read, and
all sizes are checked before an image is decoded.
"""

import base64
import io
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlx_diffgemma import fields
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.vision.film import Film, Media, Picture
from mlx_diffgemma.vision.patches import Patches
from mlx_diffgemma.vision_config import BUDGETS, VisionConfig

# The last seconds that a frame can have: about 30 years.
_LAST = 1e9
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What Pillow raises for a damaged PNG.
_DAMAGED = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error)


def media_to_json(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with their :class:`~mlx_diffgemma.vision.film.Picture` and Film as JSON."""

    def saved(part: Any, where: str) -> Any:
        kind = part.get("type") if isinstance(part, Mapping) else None
        return {"type": kind, kind: _to_json(part[kind])} if kind in ("image", "video") else part

    return with_parts(messages, saved)


def media_from_json(messages: Sequence[Mapping[str, Any]], vision: VisionConfig | None, most_tokens: int) -> list[dict[str, Any]]:
    """The messages with the images and videos that :func:`media_to_json` wrote.

    Args:
        vision: the model's; None if it reads text only.
        most_tokens: the most soft tokens that all images together may have. It bounds the memory.

    Raises:
        InputError: an image or video is damaged or not such as ``media_to_json`` writes, does not fit the model, or is too much.
    """
    reader = _Reader(vision, most_tokens)
    return with_parts(messages, reader.part)


def with_parts(messages: Sequence[Any], change: Callable[[Any, str], Any]) -> list[Any]:
    """The messages with each part of a content changed. ``change`` also takes the place of the message, for errors."""

    def changed(message: Any, where: str) -> Any:
        content = message.get("content") if isinstance(message, Mapping) else None
        return {**message, "content": [change(part, where) for part in content]} if isinstance(content, list | tuple) else message

    return [changed(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _to_json(media: Media) -> dict[str, Any]:
    if isinstance(media, Picture):
        return _patches_to_json(media.patches)
    return {"frames": [{"seconds": float(seconds), **_patches_to_json(patches)} for seconds, patches in media.frames]}


def _patches_to_json(patches: Patches) -> dict[str, Any]:
    rows, columns, side = patches.rows, patches.columns, round((patches.pixels.shape[1] / 3) ** 0.5)
    pixels = patches.pixels.reshape(rows, columns, side, side, 3).swapaxes(1, 2).reshape(rows * side, columns * side, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {"rows": rows, "columns": columns, "png": base64.b64encode(file.getvalue()).decode()}


class _Reader:
    """Reads the images of one conversation.

    Attributes:
        left: how many soft tokens the images that follow may have.
    """

    def __init__(self, vision: VisionConfig | None, most_tokens: int) -> None:
        self.vision, self.most_tokens, self.left = vision, most_tokens, most_tokens

    def part(self, part: Any, where: str) -> Any:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            return part
        if kind not in ("image", "video") or set(part) != {"type", kind}:
            raise InputError(f"{where} is damaged: each part must be a text, or a saved image or video")
        if kind == "image":
            return {"type": kind, kind: Picture(self._patches(part[kind], f"{where}: image"))}
        frames = fields.table(f"{where}: video", part[kind], InputError).get("frames")
        if not isinstance(frames, list) or not frames:
            raise InputError(f"{where}: video: frames must be a list of images, got {fields.shown(frames)}")
        return {"type": kind, kind: Film(tuple(self._frame(frame, f"{where}: video: frame") for frame in frames))}

    def _frame(self, saved: object, where: str) -> tuple[float, Patches]:
        seconds = fields.table(where, saved, InputError).get("seconds")
        return float(fields.number(f"{where}: seconds", seconds, 0, _LAST, InputError)), self._patches(saved, where)

    def _patches(self, saved: object, where: str) -> Patches:
        if self.vision is None:
            raise InputError(f"{where}: this model reads text only; load the conversation with a model that reads images")
        table, square = fields.table(where, saved, InputError), self.vision.pooling_kernel_size
        most = min(max(BUDGETS) * square, self.vision.position_embedding_size)
        rows, columns = (fields.integer(f"{where}: {name}", table.get(name), 1, most, InputError) for name in ("rows", "columns"))
        soft_tokens = rows * columns // square**2
        if rows % square or columns % square or soft_tokens > max(BUDGETS):
            raise InputError(
                f"{where}: {rows} rows and {columns} columns of patches do not fit the model, whose images have at most "
                f"{max(BUDGETS)} squares of {square} x {square}"
            )
        self.left -= soft_tokens
        if self.left < 0:
            raise InputError(
                f"{where}: the images up to this one have more soft tokens than the model's context, which is {self.most_tokens}"
            )
        side = self.vision.patch_size
        pixels = _pixels(table.get("png"), rows * side, columns * side, where)
        patches = pixels.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(rows * columns, side * side * 3)
        return Patches(patches, rows, columns, soft_tokens)


def _pixels(png: object, height: int, width: int, where: str) -> NDArray[np.uint8]:
    """The pixels [height, width, 3] of a PNG in base64, with no other chunks than those that hold pixels."""
    size = struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)  # in 8 bits, RGB, and not interlaced
    try:
        content = base64.b64decode(png.encode("ascii"), validate=True) if isinstance(png, str) else b""
        header, *others, _ = _chunks(content)
        if header != (b"IHDR", size) or any(kind != b"IDAT" for kind, _ in others):
            raise ValueError
        return np.asarray(Image.open(io.BytesIO(content), formats=["PNG"]))
    except _DAMAGED:
        raise InputError(
            f"{where} is damaged or for another model: png must be an RGB image of {width} x {height} pixels"
        ) from None


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The type and the data of each chunk of a PNG. (A second header, for example, would change its size.)"""
    at = len(_SIGNATURE)
    while at < len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        yield kind, content[at + 8 : at + 8 + length]
        at += length + 12
