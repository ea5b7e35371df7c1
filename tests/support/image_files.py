"""Image files that tests make: of every kind, and hostile ones. It imports no framework, so that memory can be measured."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlx_diffgemma.vision_config import VisionConfig

Pixels = NDArray[np.uint8]

#: The released model's patches; the rest of the tower does not matter here.
VISION = VisionConfig(
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=8,
    patch_size=16,
    pooling_kernel_size=3,
    position_embedding_size=10240,
)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> Pixels:
    """Random pixels [height, width, channels]; [height, width] for one channel."""
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# ---- Image files


def saved(image: Image.Image | NDArray[Any], kind: str, **options: Any) -> bytes:
    """An image as a file of a format of Pillow."""
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int, order: str = "<") -> bytes:
    """EXIF data with an orientation, behind two other entries."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}LH", 8, 3)
    entries = [struct.pack(f"{order}HHLL", tag, 4, 1, 72) for tag in (0x0100, 0x0101)]
    return head + b"".join(entries) + struct.pack(f"{order}HHLHHL", 0x0112, 3, 1, orientation, 0, 0)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG with this header, and these rows, each behind its filter byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_segment(jpeg: bytes, marker: int, data: bytes) -> bytes:
    """A JPEG with one more segment, or with several if the data are long."""
    parts = [data[at : at + 65000] for at in range(0, len(data), 65000)]
    return jpeg[:2] + b"".join(struct.pack(">BBH", 0xFF, marker, len(part) + 2) + part for part in parts) + jpeg[2:]


# ---- Hostile files: small to send, and costly for a reader that takes them at their word


def exif_bomb() -> bytes:
    """A JPEG of 1 MB whose EXIF has 20,000 entries that each claim almost all of it: 16 GB for a reader that keeps them."""
    count, size = 20_000, 1 << 20
    entries = (struct.pack("<HHLL", 1000 + each, 7, size - 12 * count - 64, 12 * count + 32) for each in range(count))
    data = b"II*\0" + struct.pack("<LH", 8, count) + b"".join(entries)
    jpeg = saved(noise(8, 8), "JPEG")
    for at in range(0, size, 60000):
        jpeg = with_segment(jpeg, 0xE1, b"Exif\0\0" + data.ljust(size, b"\1")[at : at + 60000])
    return jpeg


def scan_bomb() -> bytes:
    """A progressive JPEG of 4 megapixels with 20,000 scans."""
    jpeg = saved(np.full((2000, 2000), 128, np.uint8), "JPEG", progressive=True)
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:last] + jpeg[last:-2] * 20_000 + jpeg[-2:]


def gif_bomb() -> bytes:
    """A GIF with a million comments before its frame."""
    gif = saved(noise(8, 8, 1), "GIF")
    header = 13 + (3 << (gif[10] & 7) + 1)
    return gif[:header] + b"!\xfe\x01a\0" * 1_000_000 + gif[header:]


def webp_bomb() -> bytes:
    """An animated WebP whose canvas claims 16,000 x 16,000 pixels."""
    frames = [Image.fromarray(noise(32, 32, seed=seed)) for seed in range(2)]
    webp = bytearray(saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    webp[24:30] = (15_999).to_bytes(3, "little") * 2
    return bytes(webp)


def gif_of(screen: int, frame: int) -> bytes:
    """A GIF without pixels. The sides of its screen and of its frame are as it claims."""
    head = struct.pack("<HHBBB", screen, screen, 0x80, 0, 0) + bytes(6)
    return b"GIF89a" + head + b"," + struct.pack("<HHHHB", 0, 0, frame, frame, 0) + b"\2\0;"


def two_headers() -> bytes:
    """A PNG of 8 x 8 pixels whose second header claims 9,000 x 9,000."""
    return png(8, 8, 8, 0, bytes(72), chunk(b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 0, 0, 0, 0)))


BOMBS: dict[str, Callable[[], bytes]] = {
    "a PNG header of 60,000 x 60,000": lambda: png(60_000, 60_000, 8, 2, bytes(100)),
    "a PNG of 13,000 x 13,000 that is almost empty": lambda: png(13_000, 13_000, 1, 0, bytes(1626 * 13_000)),
    "a PNG with two headers": two_headers,
    "a PNG of 300,000 chunks": lambda: png(8, 8, 8, 0, bytes(72), chunk(b"aaAa", b"") * 300_000),
    "a GIF of 65,535 x 65,535": lambda: gif_of(65_535, 8),
    "a GIF frame of 65,535 x 65,535": lambda: gif_of(8, 65_535),
    "a GIF of a million comments": gif_bomb,
    "a JPEG with EXIF of 16 GB": exif_bomb,
    "a JPEG of 20,000 scans": scan_bomb,
    "a WebP canvas of 16,000 x 16,000": webp_bomb,
    "a BMP of 30,000 x 30,000": lambda: b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 30_000, -30_000, 1, 24, 0) + bytes(40),
}
