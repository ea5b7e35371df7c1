"""Images and videos as callers give them, with how finely the model sees each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_diffgemma import fields
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.vision.film import Film
from mlx_diffgemma.vision_config import BUDGETS

#: The frames of a video, and the soft tokens of each frame, unless the caller says otherwise: as the model was trained.
FRAMES, FRAME_TOKENS = 32, 70
#: The most frames of a video that the model can see.
MAX_SEEN = 1024


class TooManyTokens(InputError):
    """Images and videos take more soft tokens than there is room for."""


@dataclass(frozen=True, eq=False)
class Image:
    """An image, and how finely the model sees it. Checked on construction (InputError).

    Attributes:
        source: a path, the bytes of a file, a data URL, a Pillow image, or an array [height, width], [height, width, 3] or
            [height, width, 4] of uint8, or of floats from 0 to 1.
        tokens: the most soft tokens it takes: 70, 140, 280, 560 or 1,120. By default as the checkpoint says, 280.
    """

    source: Any
    tokens: int | None = None

    def __post_init__(self) -> None:
        _check_budget(self.tokens)


@dataclass(frozen=True, eq=False)
class Video:
    """A video, and how finely the model sees it. Checked on construction (InputError).

    Attributes:
        source: a path, the bytes of a file or a data URL.
        frames: how many frames the model sees, at equal distances. A shorter video has fewer.
        fps: frames per second that the model sees, instead of ``frames``.
        tokens: the most soft tokens of a frame, as in :class:`Image`.
    """

    source: Any
    frames: int = FRAMES
    fps: float | None = None
    tokens: int = FRAME_TOKENS

    def __post_init__(self) -> None:
        fields.integer("frames", self.frames, 1, MAX_SEEN, InputError)
        if self.fps is not None:
            fields.number("fps", self.fps, 1e-3, 1e3, InputError)
        _check_budget(self.tokens)


def _check_budget(tokens: object) -> None:
    if tokens is not None and tokens not in BUDGETS:
        raise InputError(f"tokens must be one of {', '.join(map(str, BUDGETS))}, got {fields.shown(tokens)}")


def with_images(messages: Sequence[Any], images: Sequence[Any]) -> list[Any]:
    """Put images and videos before the content of the last message of the user.

    Args:
        images: each an :class:`Image`, a :class:`Video`, the source of an image, or what was read before, a
            :class:`~mlx_diffgemma.vision.film.Picture` or :class:`~mlx_diffgemma.vision.film.Film`.

    Raises InputError if there is no message of the user.
    """
    changed = list(messages)
    if not len(images):
        return changed
    places = [index for index, each in enumerate(changed) if isinstance(each, Mapping) and each.get("role") == "user"]
    if not places:
        raise InputError("images need a message of the user that they belong to")
    kinds = ["video" if isinstance(each, Video | Film) else "image" for each in images]
    parts = [{"type": kind, kind: each} for kind, each in zip(kinds, images, strict=True)]
    message = changed[places[-1]]
    content = message.get("content")
    after = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])
    changed[places[-1]] = {**message, "content": [*parts, *after]}
    return changed
