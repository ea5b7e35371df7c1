"""The structure of image files: finds the size and the orientation, and leaves out all that holds no pixels.

Pillow reads metadata with code that a hostile file can make slow or large: 2 MB of EXIF can take 20 GB of memory, and 2 MB of
comments in a GIF take seconds. So Pillow gets files without metadata, and only files whose size was checked before.

Each format has a bound on its parts, far above what real files have. Beyond it, a file is refused as damaged.
"""

import re
import struct
from collections.abc import Callable
from typing import NamedTuple

#: The most parts of a file: segments of a JPEG, chunks of a PNG or WebP.
MAX_PARTS = 200_000
#: The most bytes of a GIF before its first frame: comments, for example.
MAX_BEFORE_FRAME = 1 << 22
#: The most passes over the pixels that a JPEG may ask for. Progressive files in use have about 10.
MAX_SCANS = 100
#: What is wrong with a file whose structure is not that of its format.
DAMAGED = "is damaged or cut short; save it or send it again"

# A marker of a JPEG, other than those without content: stuffed zeros, fill bytes, and restart markers.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
_START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_START_OF_SCAN, _END_OF_IMAGE, _EXIF_SEGMENT, _COMMENT = 0xDA, 0xD9, 0xE1, 0xFE
# The application segments of a JPEG that say how its colours are stored: JFIF and Adobe.
_COLOUR_SEGMENTS = (0xE0, 0xEE)
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_ORIENTATION = 0x0112


class BadFile(ValueError):
    """The file cannot be read. The message is the end of a sentence about it."""


class ImageFile(NamedTuple):
    """An image file.

    Attributes:
        format: as Pillow names it: PNG, JPEG, WEBP, GIF, BMP or HEIF.
        data: the file, without metadata.
        width, height: pixels as stored; 0 for HEIF, whose reader finds them without decoding pixels.
        orientation: EXIF's, from 1 (upright) to 8.
    """

    format: str
    data: bytes
    width: int
    height: int
    orientation: int = 1


def parse(data: bytes) -> ImageFile | None:
    """Read the structure of an image file. None if it has none of the formats. Raises BadFile."""
    parser = next((parser for pattern, parser in _PARSERS if pattern.match(data)), None)
    try:
        return parser and parser(data)
    except (struct.error, IndexError):
        raise BadFile(DAMAGED) from None


def exif_orientation(exif: bytes) -> int:
    """The orientation in EXIF data, from 1 to 8. It is 1 if there is none, or if the data are damaged."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (offset,) = struct.unpack_from(f"{order}L", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, offset)
        for entry in range(offset + 2, offset + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, entry)
            if tag == _ORIENTATION:
                (value,) = struct.unpack_from(f"{order}{'L' if kind == 4 else 'H'}", exif, entry + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _png(data: bytes) -> ImageFile:
    first, width, height = struct.unpack_from(">4sII", data, 12)
    if first != b"IHDR":
        raise BadFile(DAMAGED)
    kept, orientation, at = [data[:8]], 1, 8
    for _ in range(MAX_PARTS):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if kind in _PIXEL_CHUNKS and (kind != b"IHDR" or at == 8):  # a second header would change the size
            kept.append(data[at:end])
        elif kind == b"eXIf":
            orientation = exif_orientation(data[at + 8 : end - 4])
        if kind == b"IEND" or end >= len(data):
            return ImageFile("PNG", b"".join(kept), width, height, orientation)
        at = end
    raise BadFile(f"has more than {MAX_PARTS:,} parts; save it anew")


def _jpeg(data: bytes) -> ImageFile:
    kept, size, orientation, scans, at = [data[:2]], (0, 0), 1, 0, 2
    for _ in range(MAX_PARTS):
        found = _MARKER.search(data, at)
        if found is None or data[found.start() + 1] == _END_OF_IMAGE:
            if not scans:
                raise BadFile(DAMAGED)
            kept.append(data[at : found.end() if found else None])
            return ImageFile("JPEG", b"".join(kept), *size, orientation)
        start, kind = found.start(), data[found.start() + 1]
        (length,) = struct.unpack_from(">H", data, start + 2)
        end = start + 2 + length
        if scans:
            kept.append(data[at:start])  # the pixels of the scan before
        if kind == _START_OF_SCAN:
            scans += 1
            if scans > MAX_SCANS:
                raise BadFile(f"has more than {MAX_SCANS} scans; save it anew")
        elif kind in _START_OF_FRAME and not scans:
            height, width = struct.unpack_from(">HH", data, start + 5)
            size = (width, height)
        elif kind == _EXIF_SEGMENT and data[start + 4 : start + 10] == b"Exif\0\0" and orientation == 1:
            orientation = exif_orientation(data[start + 4 : end])
        if kind in _COLOUR_SEGMENTS or not (0xE0 <= kind <= 0xEF or kind == _COMMENT):
            kept.append(data[start:end])
        at = end
    raise BadFile(f"has more than {MAX_PARTS:,} parts; save it anew")


def _gif(data: bytes) -> ImageFile:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = header = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    control = b""
    while (kind := data[at]) != 0x2C and at < MAX_BEFORE_FRAME:
        if kind != 0x21:
            at += 1
            continue
        start, label, at = at, data[at + 1], at + 2
        while data[at] and at < MAX_BEFORE_FRAME:
            at += 1 + data[at]
        at += 1
        if label == 0xF9:  # says which colour is transparent
            control = data[start:at]
    if kind != 0x2C:
        raise BadFile(DAMAGED)
    left, top, across, down = struct.unpack_from("<HHHH", data, at + 1)
    return ImageFile("GIF", data[:header] + control + data[at:], max(width, left + across), max(height, top + down))


def _webp(data: bytes) -> ImageFile:
    width, height, orientation, at = 0, 0, 1, 12
    for _ in range(MAX_PARTS):
        kind, length = struct.unpack_from("<4sI", data, at)
        if kind == b"VP8X":
            canvas = struct.unpack_from("<HBHB", data, at + 12)
            width, height = canvas[0] + (canvas[1] << 16) + 1, canvas[2] + (canvas[3] << 16) + 1
        elif kind == b"VP8L" and not width:
            (bits,) = struct.unpack_from("<I", data, at + 9)
            width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        elif kind == b"VP8 " and not width:
            width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, at + 14))
        elif kind == b"EXIF":
            orientation = exif_orientation(data[at + 8 : at + 8 + length])
        at += 8 + length + length % 2
        if at + 8 > len(data):
            return ImageFile("WEBP", data, width, height, orientation)
    raise BadFile(f"has more than {MAX_PARTS:,} parts; save it anew")


def _bmp(data: bytes) -> ImageFile:
    (header,) = struct.unpack_from("<I", data, 14)
    if header == 12:
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height, _, _, compression = struct.unpack_from("<iiHHI", data, 18)
        if compression not in (0, 3, 6):  # Pillow's reader of run lengths is written in Python, and slow
            raise BadFile("is a compressed BMP file, which is not supported; save it as PNG")
    return ImageFile("BMP", data, abs(width), abs(height))


def _heif(data: bytes) -> ImageFile:
    return ImageFile("HEIF", data, 0, 0)


_PARSERS: tuple[tuple[re.Pattern[bytes], Callable[[bytes], ImageFile]], ...] = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), _png),
    (re.compile(rb"\xff\xd8\xff"), _jpeg),
    (re.compile(rb"GIF8[79]a"), _gif),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), _webp),
    (re.compile(rb"BM"), _bmp),
    (re.compile(rb"....ftyp(hei[cxms]|hev[cx]|mif1|msf1)", re.DOTALL), _heif),
)
