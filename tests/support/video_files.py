"""Video files that tests make. Each frame shows its number."""

import io
import struct
from collections.abc import Iterator, Sequence
from contextlib import closing
from fractions import Fraction
from typing import Any

import av
import numpy as np

from mlx_diffgemma.vision.patches import Patches
from support.image_files import Pixels


def numbered(number: int, height: int = 64, width: int = 96) -> Pixels:
    """A frame [height, width, 3] with its number, and with a red top so that one sees how it is turned."""
    frame = np.zeros((height, width, 3), np.uint8)
    field = width // 12
    for bit in range(12):
        frame[height // 4 :, bit * field : (bit + 1) * field] = 255 * (number >> bit & 1)
    frame[: height // 4] = (255, 0, 0)
    return frame


def number_of(patches: Patches) -> int:
    """The number of the frame that was read from a video of numbered frames."""
    side = round((patches.pixels.shape[1] / 3) ** 0.5)
    rows, columns = patches.rows, patches.columns
    image = patches.pixels.reshape(rows, columns, side, side, 3).swapaxes(1, 2).reshape(rows * side, columns * side, 3)
    middle, field = image[image.shape[0] * 5 // 8, :, 1], image.shape[1] / 12
    return sum(1 << bit for bit in range(12) if middle[int((bit + 0.5) * field)] > 127)


def video(
    count: int,
    container: str = "mp4",
    codec: str = "libx264",
    rate: Fraction | int = 30,
    times: Sequence[int] | None = None,
    size: tuple[int, int] = (64, 96),
    pixels: str = "yuv420p",
    **options: str,
) -> bytes:
    """A video of ``count`` numbered frames.

    Args:
        times: the time of each frame in milliseconds; as ``rate`` says by default.
        size: height and width.
    """
    file = io.BytesIO()
    with av.open(file, "w", format=container) as opened:
        stream = opened.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *size, pixels
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(numbered(number, *size), "rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            opened.mux(stream.encode(frame))
        opened.mux(stream.encode())
    return file.getvalue()


def sound() -> bytes:
    """An MP4 without a video."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as opened:
        stream = opened.add_stream("aac", rate=8000)
        for start in range(0, 8192, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 8000, start
            opened.mux(stream.encode(frame))
        opened.mux(stream.encode())
    return file.getvalue()


def turned(mp4: bytes, degrees: int) -> bytes:
    """An MP4 that says that players turn it by so many degrees, clockwise, as phones do."""
    cosine, sine = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    matrix = struct.pack(">9i", cosine << 16, sine << 16, 0, -sine << 16, cosine << 16, 0, 0, 0, 1 << 30)
    place = mp4.index(b"tkhd") + 4 + 40
    return mp4[:place] + matrix + mp4[place + 36 :]


def packets(content: bytes) -> Iterator[Any]:
    """The packets of a video."""
    with closing(av.open(io.BytesIO(content))) as opened:
        yield from (packet for packet in opened.demux(opened.streams.video[0]) if packet.size)
