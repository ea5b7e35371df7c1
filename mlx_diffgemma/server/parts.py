"""The parts of a message's content: text, images and videos, in the forms that clients send.

An image or a video becomes a part that the library reads, with an :class:`~mlx_diffgemma.vision.sources.Image` or a
:class:`~mlx_diffgemma.vision.sources.Video` in it. Its source is a data URL or an http URL, and never a path: no request opens a
file of this machine.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic_core import PydanticCustomError

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.vision.media import DETAILS
from mlx_diffgemma.vision.sources import MAX_SEEN, Image, Video
from mlx_diffgemma.vision_config import VisionConfig

#: The types of parts with an image or a video, each with the fields that may hold it. OpenAI's come first.
_FIELDS = {
    "image_url": ("image_url",),
    "input_image": ("image_url",),
    "image": ("image", "source", "url", "base64", "data"),
    "video_url": ("video_url",),
    "video": ("video", "source", "url", "base64", "data"),
}
#: Fields that may hold base64 without ``data:`` in front, in a part or in its ``source``.
_BASE64 = ("image", "video", "base64", "data")
_UNSUPPORTED = {"audio": "audio is", "file": "files are", "document": "documents are"}


def input_modalities(config: ModelConfig) -> tuple[str, ...]:
    """What a model reads on this server: text, images, videos."""
    if config.vision is None:
        return ("text",)
    return ("text", "image", *(("video",) if importlib.util.find_spec("av") else ()))


def content(value: Any) -> Any:
    """The content of a message: None, a string, or a list of parts. Each part keeps only what the model reads."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _wrong("the content must be a string or a list of parts")
    return [_part(part) for part in value]


def _part(part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise _wrong("each part of the content must be an object with a type")
    for medium, media_are in _UNSUPPORTED.items():
        if medium in kind:
            raise _wrong(f"{media_are} not supported; send text, images or videos")
    if kind in _FIELDS:
        return _video(part, kind) if kind.startswith("video") else _image(part, kind)
    if kind != "text" or not isinstance(part.get("text"), str):
        raise _wrong("each part of the content must have the type text and a string as its text, or be an image or a video")
    return {"type": "text", "text": part["text"]}


def _image(part: Mapping[str, Any], kind: str) -> dict[str, Any]:
    source, inner = _source(part, kind)
    detail = inner.get("detail", part.get("detail"))
    if not (detail is None or isinstance(detail, str)) or detail not in DETAILS:
        raise _wrong("the detail of an image must be low, high or auto")
    return {"type": "image", "image": Image(source, DETAILS[detail])}


def _video(part: Mapping[str, Any], kind: str) -> dict[str, Any]:
    source, inner = _source(part, kind)
    asked = {name: value for name in ("frames", "fps") if (value := inner.get(name, part.get(name))) is not None}
    try:
        return {"type": "video", "video": Video(source, **asked)}
    except InputError as wrong:
        raise _wrong(f"a video's {wrong}") from None


def _source(part: Mapping[str, Any], kind: str) -> tuple[str, Mapping[str, Any]]:
    """The URL of an image or a video, and the object that holds it; the part itself if there is none."""
    medium = "video" if kind.startswith("video") else "image"
    given = [(name, part[name]) for name in _FIELDS[kind] if part.get(name) is not None]
    inner: Mapping[str, Any] = part
    if len(given) == 1 and isinstance(given[0][1], dict):
        inner = given[0][1]
        given = [(name, inner[name]) for name in ("url", "base64", "data") if inner.get(name) is not None]
    if len(given) != 1 or not isinstance(given[0][1], str):
        example = f'{{"type": "{medium}_url", "{medium}_url": {{"url": "data:..."}}}}'
        raise _wrong(f"a part with {'an image' if medium == 'image' else 'a video'} must have the form {example}")
    [(name, value)] = given
    scheme = value[:8].lower()
    if scheme.startswith("data:") or is_web(value):
        return value, inner
    if name not in _BASE64 or ":" in scheme:
        raise _wrong(f"the URL of {'an image' if medium == 'image' else 'a video'} must be a data URL, or begin with https://")
    return f"data:{medium}/any;base64,{value}", inner


def is_web(url: Any) -> bool:
    """Whether a source is an http or https URL."""
    return isinstance(url, str) and url[:8].lower().startswith(("http://", "https://"))


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("content", message)  # type: ignore[arg-type]


# ---- Messages whose contents are checked

Messages = tuple[dict[str, Any], ...]


def has_media(content: str | Sequence[Mapping[str, Any]] | None) -> bool:
    """Whether a content has images or videos."""
    return any(part["type"] != "text" for part in _parts(content))


def texts(messages: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The texts in the contents of messages."""
    for message in messages:
        yield from (part["text"] for part in _parts(message.get("content")) if part["type"] == "text")


def media(messages: Iterable[Mapping[str, Any]]) -> Iterator[Image | Video]:
    """The images and videos in the contents of messages, in order."""
    for message in messages:
        yield from (part[part["type"]] for part in _parts(message.get("content")) if part["type"] != "text")


def with_sources(messages: Messages, change: Callable[[Any], Any]) -> Messages:
    """Messages in which ``change`` was applied to the source of each image and video."""
    return with_media(messages, [replace(one, source=change(one.source)) for one in media(messages)])


def with_media(messages: Sequence[Mapping[str, Any]], media: Iterable[Any]) -> Messages:
    """Messages with other images and videos in the places of their own, in order."""
    rest = iter(media)

    def changed(part: dict[str, Any]) -> dict[str, Any]:
        return part if part["type"] == "text" else {"type": part["type"], part["type"]: next(rest)}

    return tuple(
        {**message, "content": list(map(changed, message["content"]))}
        if isinstance(message.get("content"), list)
        else dict(message)
        for message in messages
    )


def most_soft_tokens(medium: Image | Video, vision: VisionConfig) -> int:
    """The most soft tokens that an image or a video can take."""
    if isinstance(medium, Image):
        return medium.tokens or vision.soft_tokens
    return (medium.frames if medium.fps is None else MAX_SEEN) * medium.tokens


def _parts(content: str | Sequence[Mapping[str, Any]] | None) -> Sequence[Mapping[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content or ()
