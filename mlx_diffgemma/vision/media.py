"""Images and videos in messages: reads them, and leaves their places behind.

A message's content may have these parts, in which X is a path, the bytes of a file, a data URL, an http URL (if the caller
fetches these), a Pillow image, a NumPy array, for a video a list of these, an :class:`~mlx_diffgemma.vision.sources.Image` or
:class:`~mlx_diffgemma.vision.sources.Video`, or a :class:`~mlx_diffgemma.vision.film.Picture` or
:class:`~mlx_diffgemma.vision.film.Film`, which was read before:

- ``{"type": "image", "image": X}``, ``{"type": "video", "video": X}``. Instead of ``image`` or ``video``, the field may be
  ``path``, ``url`` (a URL or a path, as in `transformers`), or ``data`` or ``base64`` with base64 or bytes.
- ``{"type": "image_url", "image_url": {"url": ..., "detail": ...}}`` or with the URL itself, as in OpenAI's chat completions;
  ``{"type": "input_image", "image_url": ..., "detail": ...}`` as in its responses; and ``{"type": "video_url", ...}``.

``detail`` says how finely the model sees an image: ``low`` is the smallest budget of the model, 70 soft tokens, enough to tell
what a photo shows; ``high`` the largest, 1,120, which reads small print; ``auto`` the caller's or the checkpoint's. For OpenAI's
models, too, ``low`` is a small fixed number of tokens, and ``high`` as many as an image can take. A part with a video may have
``frames`` and ``fps``.
"""

import binascii
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_diffgemma import fields
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.steps import Steps, run
from mlx_diffgemma.vision import pictures, video
from mlx_diffgemma.vision.film import Film, Media, Picture
from mlx_diffgemma.vision.pictures import read_picture
from mlx_diffgemma.vision.sources import FRAMES, Image, TooManyTokens, Video
from mlx_diffgemma.vision.video import read_video_steps
from mlx_diffgemma.vision_config import BUDGETS, VisionConfig

__all__ = ["DETAILS", "Film", "Media", "Picture", "split_media", "split_media_steps"]

#: The budget of each ``detail``; None is the default.
DETAILS: Mapping[str | None, int | None] = {"low": min(BUDGETS), "high": max(BUDGETS), "auto": None, None: None}

#: Fetches an http or https URL.
Fetch = Callable[[str], bytes]

_MEDIA = {
    **dict.fromkeys(("image", "image_url", "input_image"), "image"),
    **dict.fromkeys(("video", "video_url", "input_video"), "video"),
}
_DATA_URL = re.compile(r"data:(?:image|video)/[\w.+-]+(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.ASCII | re.IGNORECASE)
_URL = re.compile(r"([a-z][a-z0-9+.-]+):", re.ASCII | re.IGNORECASE)


def split_media(
    messages: Sequence[Any],
    vision: VisionConfig | None,
    *,
    budget: int | None = None,
    frames: int = FRAMES,
    fps: float | None = None,
    allow_paths: bool = True,
    fetch: Fetch | None = None,
    max_soft_tokens: int | None = None,
) -> tuple[list[Any], list[Media]]:
    """Read the images and videos of messages, in order.

    Args:
        messages: messages with parts as described above. Whatever is no image or video is left as it is.
        vision: the model's configuration; None if the model reads text only.
        budget: the most soft tokens of an image that does not say, one of :data:`~mlx_diffgemma.vision_config.BUDGETS`.
        frames, fps: as in :func:`~mlx_diffgemma.vision.video.read_video`, for videos that do not say.
        allow_paths: whether a source may be a path. A server must not read the files that a client names.
        fetch: fetches an http or https URL and returns the bytes. Without it, such a URL is an InputError.
        max_soft_tokens: the most soft tokens of all images and videos together. Reading stops as soon as there are more, so it
            bounds the memory: a soft token takes ``3 * vision.side ** 2`` bytes.

    Returns:
        The messages, in which each image is ``{"type": "image"}`` and each video ``{"type": "video"}``; and what was read.

    Raises:
        InputError: a part is no image or video, cannot be read, or is not allowed; there is audio; there are too many soft
            tokens; or ``vision`` is None and there is an image or a video.
    """
    steps = split_media_steps(
        messages,
        vision,
        budget=budget,
        frames=frames,
        fps=fps,
        allow_paths=allow_paths,
        fetch=fetch,
        max_soft_tokens=max_soft_tokens,
    )
    return run(steps)


def split_media_steps(
    messages: Sequence[Any],
    vision: VisionConfig | None,
    *,
    budget: int | None = None,
    frames: int = FRAMES,
    fps: float | None = None,
    allow_paths: bool = True,
    fetch: Fetch | None = None,
    max_soft_tokens: int | None = None,
) -> Steps[tuple[list[Any], list[Media]]]:
    """:func:`split_media` in steps: one for each image, and for each few frames of a video."""
    reader = _Reader(vision, budget, frames, fps, allow_paths, fetch, max_soft_tokens)
    changed, media, tokens = [], [], 0
    for index, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, list | tuple):
            changed.append(message)
            continue
        parts = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if not isinstance(kind, str) or (kind not in _MEDIA and "audio" not in kind):
                parts.append(part)
                continue
            one = yield from reader.read(part, kind, f"messages[{index}]", tokens)
            tokens += sum(image.soft_tokens for image in one.images)
            media.append(one)
            parts.append({"type": _MEDIA[kind]})
            yield
        changed.append({**message, "content": parts})
    return changed, media


@dataclass(frozen=True)
class _Reader:
    """Reads single parts. The attributes are arguments of split_media."""

    vision: VisionConfig | None
    budget: int | None
    frames: int
    fps: float | None
    allow_paths: bool
    fetch: Fetch | None
    max_soft_tokens: int | None

    def read(self, part: Mapping[str, Any], kind: str, where: str, tokens: int) -> Steps[Media]:
        """Read the image or video of a part. ``tokens`` are the soft tokens of those before it."""
        if kind not in _MEDIA:
            raise InputError(f"{where}: audio is not supported; send text, images and videos only")
        if self.vision is None:
            raise InputError(
                "this checkpoint has no vision tower, so it reads text only; leave out images and videos, or use a checkpoint "
                "with its vision tower"
            )
        asked = self._asked(part, _MEDIA[kind], where)
        if isinstance(asked, Image | Video):
            source = self._source(asked.source, where, video.MAX_BYTES if isinstance(asked, Video) else pictures.MAX_BYTES)
            left = None if self.max_soft_tokens is None else max(0, self.max_soft_tokens - tokens)
            try:
                if isinstance(asked, Image):
                    media: Media = Picture(read_picture(source, self.vision, asked.tokens or self.budget))
                else:
                    media = yield from read_video_steps(source, self.vision, asked.frames, asked.fps, asked.tokens, left)
            except InputError as wrong:
                # The name of a file says more than the number of a message.
                raise type(wrong)(str(wrong) if isinstance(source, os.PathLike) else f"{where}: {wrong}") from None
        else:
            media = asked
        tokens += sum(image.soft_tokens for image in media.images)
        if self.max_soft_tokens is not None and tokens > self.max_soft_tokens:
            raise TooManyTokens(
                f"{where}: the images and videos up to this one have {tokens:,} soft tokens, but only {self.max_soft_tokens:,} "
                "fit; send fewer, or with a smaller budget"
            )
        return media

    def _asked(self, part: Mapping[str, Any], medium: str, where: str) -> Image | Video | Media:
        """What a part asks for."""
        names = (medium, f"{medium}_url", "path", "url", "data", "base64")
        given = {name: part[name] for name in names if part.get(name) is not None}
        if len(given) != 1:
            what = f"more than one source ({', '.join(given)})" if given else "no source"
            raise InputError(f'{where}: the part with {_a(medium)} has {what}; use {{"type": "{medium}", "{medium}": ...}}')
        [(name, source)] = given.items()
        inner = source if isinstance(source, Mapping) else part
        if inner is source:
            name, source = "url", inner.get("url")
        if isinstance(source, Image | Picture if medium == "image" else Video | Film):
            return source
        if isinstance(source, Image | Video | Picture | Film):
            raise InputError(f"{where}: the part with {_a(medium)} holds {_a(_other(medium))}; its type must be {_other(medium)}")
        if name in ("url", f"{medium}_url") and not (isinstance(source, str) and (self.allow_paths or _URL.match(source))):
            raise InputError(f"{where}: the URL of {_a(medium)} must be a data, http or https URL, got {fields.shown(source)}")
        if name == "path":
            if not isinstance(source, str | os.PathLike):
                raise InputError(f"{where}: the path of {_a(medium)} must be a string, got {fields.shown(source)}")
            source = Path(source)
        elif name in ("data", "base64") and isinstance(source, str) and not _DATA_URL.match(source):
            source = f"data:{medium}/any;base64,{source}"
        if medium == "image":
            detail = inner.get("detail", part.get("detail"))
            if not isinstance(detail, str | None) or detail not in DETAILS:
                raise InputError(f"{where}: the detail of an image must be low, high or auto, got {fields.shown(detail)}")
            return Image(source, DETAILS[detail])
        frames, fps = (inner.get(name, part.get(name)) for name in ("frames", "fps"))
        if frames is None and fps is None:
            fps = self.fps
        try:
            return Video(source, self.frames if frames is None else frames, fps)
        except InputError as wrong:
            raise InputError(f"{where}: the video's {wrong}") from None

    def _source(self, source: Any, where: str, most: int) -> Any:
        """A path, bytes or pixels, or a list of these."""
        if isinstance(source, list | tuple):
            return [each if isinstance(each, list | tuple) else self._source(each, where, most) for each in source]
        if isinstance(source, str):
            if source[:5].lower() == "data:":
                return _decoded(source, where, most)
            scheme = _URL.match(source)
            if scheme and scheme[1].lower() in ("http", "https"):
                if self.fetch is None:
                    raise InputError(f"{where}: addresses are not fetched; send the content as a data URL instead")
                fetched: object = self.fetch(source)
                if not isinstance(fetched, bytes | bytearray):
                    raise InputError(f"{where}: fetch must return bytes, got an object of type {type(fetched).__name__}")
                return fetched
            if scheme and source[scheme.end() :].startswith("//"):
                raise InputError(f"{where}: only data, http and https URLs are supported, got {fields.shown(source)}")
            source = Path(source)
        if isinstance(source, os.PathLike) and not self.allow_paths:
            raise InputError(f"{where}: paths are not allowed here; send the content as a data URL instead")
        return source


def _decoded(url: str, where: str, most: int) -> bytes:
    """The content of a data URL. What it says about its type is not used: the content itself says what it is."""
    start = _DATA_URL.match(url)
    if start is None:
        raise InputError(f"{where}: a data URL must begin like data:image/png;base64, and hold an image or a video")
    if (len(url) - start.end()) // 4 * 3 > most + 3:
        raise InputError(f"{where}: the data URL has more than {most:,} bytes; make it smaller")
    try:
        return binascii.a2b_base64(url[start.end() :], strict_mode=True)
    except ValueError:
        raise InputError(f"{where}: the base64 of the data URL is damaged; send it again") from None


def _a(medium: str) -> str:
    return "an image" if medium == "image" else "a video"


def _other(medium: str) -> str:
    return "video" if medium == "image" else "image"
