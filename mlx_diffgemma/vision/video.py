"""Reads videos: chooses frames as `transformers` does, and reads each of them as an image.

Which frames: of N frames, number i of n is the one with index i * N // n. PyAV reads MP4, MOV, WebM, MKV, AVI, MPEG-TS and GIF.
The format is found from the first bytes, and no other format is tried: some of FFmpeg's formats are lists of files and addresses
that it would open.

A video is read twice: first without decoding, to find the time of each frame, and then from the keyframe before each frame that
is needed. So a long video costs little more than a short one, and only the patches of the frames are kept.
"""

import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from operator import itemgetter
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image

from mlx_diffgemma import fields
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.steps import Steps, run
from mlx_diffgemma.vision.film import Film
from mlx_diffgemma.vision.patches import Patches
from mlx_diffgemma.vision.pictures import open_file, picture_size, read_picture, reading, shown_path, to_patches
from mlx_diffgemma.vision.sources import FRAME_TOKENS, FRAMES, MAX_SEEN, TooManyTokens
from mlx_diffgemma.vision_config import VisionConfig

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

#: The most bytes of a video, frames in it, and pixels of a frame (which is that of 8K).
MAX_BYTES, MAX_FRAMES, MAX_FRAME_PIXELS = 2 << 30, 1 << 20, 1 << 25
#: The most pixels that are decoded: 18 minutes of 1,920 x 1,080 at 30 frames per second. A video with keyframes needs far less.
MAX_DECODED = 1 << 36
#: Frames per second of a list of images, unless the caller says otherwise; as `transformers` assumes.
LIST_FPS = 24.0

# Pixels that one step decodes, and packets that one step reads.
_STEP_PIXELS, _STEP_PACKETS = 1 << 23, 1 << 12
# Seconds by which the times in a file may differ from those of a regular video, because containers round them.
_ROUNDING = 0.05
_CONTAINERS = (
    ("mov", re.compile(rb"....(ftyp|moov|mdat|wide|free|skip)", re.DOTALL)),
    ("matroska", re.compile(rb"\x1a\x45\xdf\xa3")),
    ("avi", re.compile(rb"RIFF....AVI ", re.DOTALL)),
    ("gif", re.compile(rb"GIF8[79]a")),
    ("mpegts", re.compile(rb"(.{4})?\x47.{187}(.{4})?\x47.{187}(.{4})?\x47", re.DOTALL)),
)
# The containers whose packets have the times of their frames. In others, frames are counted from the start.
_TIMED = ("mov", "matroska")
_CODECS = (
    *("h264", "hevc", "libdav1d", "av1", "vp8", "vp9", "libvpx", "libvpx-vp9", "mpeg4", "mpeg2video", "mpeg1video", "h263"),
    *("mjpeg", "prores", "ffv1", "gif", "theora", "png", "rawvideo", "msmpeg4v3", "wmv2"),
)
_TURNED = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


def read_video(
    source: Any, vision: VisionConfig, frames: int = FRAMES, fps: float | None = None, budget: int = FRAME_TOKENS
) -> Film:
    """Read a video.

    Args:
        source: a path, the bytes of a file, or a list of images, each as in
            :func:`~mlx_diffgemma.vision.pictures.read_picture`.
        frames: how many frames the model sees, at equal distances. A shorter video has fewer.
        fps: frames per second that the model sees, instead of ``frames``. A list of images has this many per second, and the
            model sees all of them; without ``fps``, the list has 24, of which the model sees ``frames``.
        budget: the most soft tokens of a frame, one of :data:`~mlx_diffgemma.vision_config.BUDGETS`.

    Returns:
        The frames, turned upright as the video says, with their times. A time is the frame's index over the mean frame rate, as
        in `transformers`, unless the file has another time for the frame.

    Raises:
        InputError: the source is no such video, is damaged or too large, cannot be read or has no frames; PyAV is not installed;
            or an argument is out of range. (A file that is cut short is read as far as it goes, if its format allows that: WebM,
            MKV, AVI, MPEG-TS and GIF do.)
    """
    return run(read_video_steps(source, vision, frames, fps, budget))


def read_video_steps(
    source: Any,
    vision: VisionConfig,
    frames: int = FRAMES,
    fps: float | None = None,
    budget: int = FRAME_TOKENS,
    max_soft_tokens: int | None = None,
) -> Steps[Film]:
    """:func:`read_video` in steps.

    Args:
        max_soft_tokens: raise InputError if the frames together take more. This is known before they are decoded.
    """
    fields.integer("frames", frames, 1, MAX_SEEN, InputError)
    if fps is not None:
        fields.number("fps", fps, 1e-3, 1e3, InputError)
    wanted = _Wanted(vision, frames, fps, budget, max_soft_tokens)
    if isinstance(source, list | tuple) or (isinstance(source, np.ndarray) and source.ndim == 4):
        return (yield from _read_list(list(source), wanted))
    if not isinstance(source, str | os.PathLike | bytes | bytearray | memoryview):
        raise InputError(f"a video must be a path, bytes or a list of images, got an object of type {type(source).__name__}")
    name = shown_path(source) if isinstance(source, str | os.PathLike) else "the video"
    with reading(name), _file(source) as file:
        return (yield from _read_file(file, name, wanted))


@dataclass(frozen=True)
class _Wanted:
    """What to read of a video: the arguments of read_video_steps."""

    vision: VisionConfig
    frames: int
    fps: float | None
    budget: int
    max_soft_tokens: int | None

    def indices(self, total: int, rate: float, name: str) -> list[int]:
        """The indices of the frames that the model sees, of ``total`` frames of which there are ``rate`` per second."""
        count = self.frames if self.fps is None else max(1, int(total / rate * self.fps))
        count = min(count, total)
        if count > MAX_SEEN:
            raise InputError(f"{name}: fps {self.fps:g} makes {count:,} frames, but at most {MAX_SEEN:,} fit; use a smaller fps")
        return [index * total // count for index in range(count)]

    def check_tokens(self, tokens: int, name: str) -> None:
        if self.max_soft_tokens is not None and tokens > self.max_soft_tokens:
            raise TooManyTokens(
                f"{name}: its frames have {tokens:,} soft tokens, but only {self.max_soft_tokens:,} fit; use fewer frames"
            )


def _read_list(pictures: Sequence[Any], wanted: _Wanted) -> Steps[Film]:
    if not len(pictures):
        raise InputError("the video has no frames")
    rate = LIST_FPS if wanted.fps is None else float(wanted.fps)
    seen: list[tuple[float, Patches]] = []
    tokens = 0
    for index in wanted.indices(len(pictures), rate, "the video"):
        patches = read_picture(pictures[index], wanted.vision, wanted.budget)
        tokens += patches.soft_tokens
        wanted.check_tokens(tokens, "the video")
        seen.append((index / rate, patches))
        yield
    return Film(tuple(seen))


# ---- Files


@dataclass(frozen=True)
class _Times:
    """The frames of a file.

    Attributes:
        total: how many there are.
        rate: frames per second, on average.
        stamps: the time stamp of each frame, in order, in units of ``unit`` seconds; empty if they are not known.
        keys: the frames that can be decoded without others, as (time stamp, time stamp to seek), in order.
    """

    total: int
    rate: float
    unit: float
    stamps: Sequence[int] = ()
    keys: Sequence[tuple[int, int]] = ()

    def seconds(self, index: int, stamp: int | None) -> float:
        """The time of a frame from the start of the video."""
        regular = index / self.rate
        if not self.stamps or stamp is None:
            return regular
        exact = (stamp - self.stamps[0]) * self.unit
        return regular if abs(exact - regular) < _ROUNDING else max(exact, 0.0)

    def index(self, stamp: int | None, before: int) -> int:
        """The index of the frame with a time stamp. It is the one after ``before`` if time stamps are not known."""
        return bisect_right(self.stamps, stamp) - 1 if self.stamps and stamp is not None else before + 1


def _read_file(file: BinaryIO, name: str, wanted: _Wanted) -> Steps[Film]:
    start = file.read(1024)
    container = next((container for container, pattern in _CONTAINERS if pattern.match(start)), None)
    if container is None:
        what = "not a video that can be read" if start else "empty"
        raise InputError(f"{name}: {what}; use an MP4, MOV, WebM, MKV, AVI, MPEG-TS or GIF file")
    with _opened(file, container, name) as (opened, stream):
        size = picture_size(stream.height, stream.width, wanted.vision, wanted.budget)
        times = yield from _times(opened, stream, container, name)
    indices = wanted.indices(times.total, times.rate, name)
    wanted.check_tokens(len(indices) * size.soft_tokens, name)
    seen: list[tuple[float, Patches]] = []
    with _opened(file, container, name) as (opened, stream):
        for decoded in _decoded(opened, stream, times, indices, name):
            if decoded is not None:
                index, frame = decoded
                seen.append((times.seconds(index, frame.pts), _patches(frame, wanted)))
            yield
    if not seen:
        raise InputError(f"{name}: has no frames that can be read")
    return Film(tuple(seen))


@contextmanager
def _file(source: Any) -> Iterator[BinaryIO]:
    if isinstance(source, str | os.PathLike):
        with open_file(source, MAX_BYTES, "a video") as file:
            yield file
    else:
        if len(source) > MAX_BYTES:
            raise InputError(f"the video: has {len(source):,} bytes, but a video may have {MAX_BYTES:,}; make it smaller")
        yield BytesIO(source)


@contextmanager
def _opened(file: BinaryIO, container: str, name: str) -> "Iterator[tuple[InputContainer, VideoStream]]":
    """The file, and the video in it."""
    try:
        import av
    except ImportError:
        raise InputError(f"{name}: video needs another package; run: pip install av") from None
    file.seek(0)
    limits = {"max_pixels": str(MAX_FRAME_PIXELS)}
    options = {**limits, "codec_whitelist": ",".join(_CODECS)}
    with av.open(file, mode="r", format=container, options=options, metadata_errors="replace") as opened:
        streams = [stream for stream in opened.streams.video if "attached_pic" not in str(stream.disposition)]
        if not streams:
            raise InputError(f"{name}: has no video in it")
        stream = streams[0]
        if stream.codec_context is None or not stream.width or not stream.height:
            raise InputError(f"{name}: its video is of a kind that cannot be read; convert it to MP4 with H.264")
        if stream.width * stream.height > MAX_FRAME_PIXELS:
            size = f"{stream.width} x {stream.height}"
            raise InputError(f"{name}: its frames have {size} pixels, more than {MAX_FRAME_PIXELS:,}; make it smaller")
        stream.codec_context.options = limits
        yield opened, stream


def _times(opened: "InputContainer", stream: "VideoStream", container: str, name: str) -> Steps[_Times]:
    """Find the frames of a video, without decoding them."""
    timed, total, stamps, keys = container in _TIMED, 0, [], []
    for packet in opened.demux(stream):
        if not packet.size or packet.is_discard:
            continue
        total += 1
        if total > MAX_FRAMES:
            raise InputError(f"{name}: has more than {MAX_FRAMES:,} frames; cut it")
        if packet.pts is None:
            timed = False
        elif timed:
            stamps.append(packet.pts)
            if packet.is_keyframe:
                keys.append((packet.pts, packet.pts if packet.dts is None else min(packet.pts, packet.dts)))
        if total % _STEP_PACKETS == 0:
            yield
    if not total:
        raise InputError(f"{name}: has no frames")
    rate = float(stream.average_rate or stream.guessed_rate or LIST_FPS)
    if not timed:
        return _Times(total, rate, float(stream.time_base or 1))
    stamps = sorted(set(stamps))
    return _Times(len(stamps), rate, float(stream.time_base or 1), stamps, sorted(keys))


def _decoded(
    opened: "InputContainer", stream: "VideoStream", times: _Times, indices: Sequence[int], name: str
) -> "Iterator[tuple[int, VideoFrame] | None]":
    """Yields the frames with these indices, in order, each with its index; and None after each _STEP_PIXELS of decoding.

    If a frame is missing, the next one takes its place.
    """
    frames, at, pixels, total = opened.decode(stream), -1, 0, 0
    for index in indices:
        if index <= at:
            continue  # missing, and a later frame took its place
        if times.stamps:
            number = bisect_right(times.keys, times.stamps[index], key=itemgetter(0)) - 1
            first = times.index(times.keys[number][0], at) if number >= 0 else 0
            if first > at + 1:
                opened.seek(times.keys[number][1], stream=stream)
                frames, at = opened.decode(stream), first - 1
        while True:
            frame = next(frames, None)
            if frame is None:
                return
            at = times.index(frame.pts, at)
            pixels += frame.width * frame.height
            if pixels >= _STEP_PIXELS:
                total, pixels = total + pixels, 0
                if total > MAX_DECODED:
                    raise InputError(f"{name}: takes too long to decode; make it shorter or smaller, or give it more keyframes")
                yield None
            if at >= index:
                break
        yield at, frame


def _patches(frame: "VideoFrame", wanted: _Wanted) -> Patches:
    rgb = Image.fromarray(frame.to_ndarray(format="rgb24"))
    turned = _TURNED.get(frame.rotation % 360)
    if turned is not None:
        rgb = rgb.transpose(turned)
    return to_patches(rgb, picture_size(rgb.height, rgb.width, wanted.vision, wanted.budget), wanted.vision)
