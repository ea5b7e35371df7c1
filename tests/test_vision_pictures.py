"""Images become the patches of transformers' processor, bit for bit. Bad files are one clear line, and cost little."""

import io
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.gemma4 import image_processing_pil_gemma4 as theirs

from mlx_diffgemma.errors import InputError
from mlx_diffgemma.vision.formats import exif_orientation
from mlx_diffgemma.vision.patches import Patches
from mlx_diffgemma.vision.pictures import MAX_PIXELS, picture_size, read_picture
from mlx_diffgemma.vision_config import BUDGETS
from support.alone import run_alone
from support.image_files import (
    BOMBS,
    VISION,
    chunk,
    exif,
    noise,
    png,
    saved,
    with_segment,
)

#: How the pixels of an upright image are stored with each EXIF orientation.
STORED: dict[int, Callable[[Any], Any]] = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.swapaxes(0, 1),
    6: np.rot90,
    7: lambda upright: np.rot90(upright.swapaxes(0, 1), 2),
    8: lambda upright: np.rot90(upright, -1),
}


def random_sizes(count: int, largest: float, seed: int) -> list[tuple[int, int, int]]:
    """Heights, widths and budgets, up to 2 ** largest pixels a side. One in four is very long."""
    rng, sizes = np.random.default_rng(seed), []
    for index in range(count):
        height, width = (int(2 ** rng.uniform(0, largest)) for _ in range(2))
        if index % 4 == 0:
            height, width = (int(rng.integers(1, 4)), width) if index % 8 else (height, int(rng.integers(1, 4)))
        sizes.append((height, width, BUDGETS[min(int(rng.exponential(0.7)), 4)]))
    return sizes


# ---- Sizes and patches


def assert_as_transformers(patches: Patches, image: Image.Image, budget: int) -> None:
    """The patches of an upright image are those of `transformers`, bit for bit."""
    made = theirs.Gemma4ImageProcessorPil(max_soft_tokens=budget)(image, return_tensors="np")
    values, places, count = made["pixel_values"][0], made["image_position_ids"][0], len(patches.pixels)
    assert patches.soft_tokens == made["num_soft_tokens_per_image"][0]
    assert (places[count:] == -1).all()
    np.testing.assert_array_equal(patches.positions, places[:count])
    assert patches.values.dtype == values.dtype
    np.testing.assert_array_equal(patches.values, values[:count])


def test_sizes_are_those_of_transformers() -> None:
    for height, width, budget in random_sizes(500, 14.5, seed=0):
        wanted = theirs.get_aspect_ratio_preserving_size(height, width, 16, budget * 9, 3)
        size = picture_size(height, width, VISION, budget)
        assert (size.height, size.width) == wanted, (height, width, budget)
        assert size.soft_tokens == wanted[0] * wanted[1] // 48**2 <= budget


@pytest.mark.parametrize(("width", "height", "tokens"), [(384, 188, 253), (1920, 1080, 264), (4000, 3000, 266), (1, 10_000, 280)])
def test_soft_tokens(width: int, height: int, tokens: int) -> None:
    assert picture_size(height, width, VISION).soft_tokens == tokens


def test_patches_are_those_of_transformers() -> None:
    for number, (height, width, budget) in enumerate(random_sizes(100, 9, seed=1)):
        pixels = noise(height, width, seed=number)
        assert_as_transformers(read_picture(pixels, VISION, budget), Image.fromarray(pixels), budget)


@pytest.mark.parametrize("size", [(672, 960), (1, 10_000), (10_000, 1), (48, 48), (1, 1)])
def test_patches_of_special_sizes_are_those_of_transformers(size: tuple[int, int]) -> None:
    pixels = noise(*size)
    assert_as_transformers(read_picture(pixels, VISION), Image.fromarray(pixels), 280)


def test_a_budget_is_one_of_the_models() -> None:
    assert read_picture(noise(20, 30), VISION).soft_tokens == read_picture(noise(20, 30), VISION, VISION.soft_tokens).soft_tokens
    for budget in (0, 100, 280.0, True, "280"):
        with pytest.raises(InputError, match=r"one of 70, 140, 280, 560, 1120"):
            picture_size(10, 10, VISION, budget)  # type: ignore[arg-type]


def test_an_image_has_no_more_patches_than_the_tower_has_positions() -> None:
    few = replace(VISION, position_embedding_size=60)
    assert picture_size(500, 500, few).width == 768
    with pytest.raises(InputError, match="positions for 60; use a smaller budget"):
        picture_size(500, 5000, few)


# ---- Files. Each is read as transformers reads what Pillow finds in it.


def animated(kind: str, **options: Any) -> bytes:
    frames = [Image.fromarray(noise(60, 90, seed=seed)) for seed in range(3)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def heic(pixels: Any, **options: Any) -> bytes:
    from pillow_heif import from_pillow

    file = io.BytesIO()
    from_pillow(Image.fromarray(pixels)).save(file, quality=80, **options)
    return file.getvalue()


PALETTE = Image.fromarray(noise(60, 90)).quantize(40)
FILES: dict[str, Callable[[], bytes]] = {
    "png RGB": lambda: saved(noise(61, 93), "PNG"),
    "png RGBA": lambda: saved(noise(61, 93, 4), "PNG"),
    "png grey": lambda: saved(noise(61, 93, 1), "PNG"),
    "png grey and alpha": lambda: saved(Image.fromarray(noise(61, 93, 4)).convert("LA"), "PNG"),
    "png palette": lambda: saved(PALETTE, "PNG"),
    "png palette with a clear colour": lambda: saved(PALETTE, "PNG", transparency=3),
    "png palette with alpha": lambda: saved(PALETTE, "PNG", transparency=bytes(range(0, 200, 5))),
    "png 1 bit": lambda: saved(Image.fromarray(noise(61, 93, 1)).convert("1"), "PNG"),
    "png 2 bits": lambda: saved(Image.fromarray(noise(61, 93, 1)).quantize(4), "PNG", bits=2),
    "png RGB with a clear colour": lambda: saved(np.full((61, 93, 3), 7, np.uint8), "PNG", transparency=(7, 7, 7)),
    "png RGB 16 bits": lambda: png(
        9, 7, 16, 2, b"".join(b"\0" + row.tobytes() for row in np.random.default_rng(0).integers(0, 2**16, (7, 27)).astype(">u2"))
    ),
    "png animated": lambda: animated("PNG"),
    "png with metadata": lambda: png(
        9, 7, 8, 2, b"".join(b"\0" + row.tobytes() for row in noise(7, 27, 1)), chunk(b"tEXt", b"a\0b") + chunk(b"gAMA", bytes(4))
    ),
    "jpeg": lambda: saved(noise(61, 93), "JPEG"),
    "jpeg without subsampling": lambda: saved(noise(61, 93), "JPEG", subsampling=0, quality=100),
    "jpeg grey": lambda: saved(noise(61, 93, 1), "JPEG"),
    "jpeg progressive": lambda: saved(noise(61, 93), "JPEG", progressive=True),
    "jpeg CMYK": lambda: saved(Image.fromarray(noise(61, 93, 4), "CMYK"), "JPEG"),
    "jpeg with restarts": lambda: saved(noise(61, 93), "JPEG", restart_marker_blocks=2),
    "jpeg with metadata": lambda: with_segment(
        with_segment(saved(noise(61, 93), "JPEG"), 0xE2, b"ICC_PROFILE\0\1\1x"), 0xFE, b"hi"
    ),
    "jpeg and more after its end": lambda: saved(noise(61, 93), "JPEG") + b"\xff\xda" * 500,
    "jpeg of several pictures": lambda: saved(
        Image.fromarray(noise(61, 93)), "MPO", save_all=True, append_images=[Image.fromarray(noise(61, 93, seed=1))]
    ),
    "webp": lambda: saved(noise(61, 93), "WEBP"),
    "webp lossless": lambda: saved(noise(61, 93), "WEBP", lossless=True),
    "webp RGBA": lambda: saved(noise(61, 93, 4), "WEBP", lossless=True, exact=True),
    "webp animated": lambda: animated("WEBP"),
    "gif": lambda: saved(noise(61, 93, 1), "GIF"),
    "gif with a clear colour": lambda: saved(PALETTE, "GIF", transparency=5),
    "gif animated": lambda: animated("GIF", comment="hi", loop=0, duration=40, disposal=2),
    "bmp": lambda: saved(noise(61, 93), "BMP"),
    "bmp palette": lambda: saved(PALETTE, "BMP"),
    "heic": lambda: heic(noise(64, 96)),
    "heic RGBA": lambda: heic(noise(64, 96, 4)),
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_as_transformers_reads_them(name: str) -> None:
    if name.startswith("heic"):
        from pillow_heif import HeifImageFile as opened
    else:
        opened = Image.open
    data = FILES[name]()
    assert_as_transformers(read_picture(data, VISION, 70), opened(io.BytesIO(data)), 70)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "heic"])
def test_images_are_turned_upright(kind: str, orientation: int) -> None:
    upright = noise(61, 93)
    stored = np.ascontiguousarray(STORED[orientation](upright))
    order = "<" if orientation % 2 else ">"
    if kind == "heic":
        data = heic(stored, exif=exif(orientation, order))
        from pillow_heif import HeifImageFile

        wanted = HeifImageFile(io.BytesIO(data))  # libheif turns it
        assert wanted.size == (93, 61)
    elif kind == "jpeg":
        plain = saved(stored, "JPEG", quality=100)
        data = with_segment(plain, 0xE1, b"Exif\0\0" + exif(orientation, order))
        decoded = np.asarray(Image.open(io.BytesIO(plain)))
        undo = {6: 8, 8: 6}.get(orientation, orientation)
        wanted = Image.fromarray(np.ascontiguousarray(STORED[undo](decoded)))
    else:
        data = saved(stored, "PNG" if kind == "png" else "WEBP", exif=exif(orientation, order), lossless=True)
        wanted = Image.fromarray(upright)
    assert_as_transformers(read_picture(data, VISION, 70), wanted, 70)
    if kind != "heic":
        assert_as_transformers(read_picture(Image.open(io.BytesIO(data)), VISION, 70), wanted, 70)


def test_damaged_exif_turns_nothing() -> None:
    good = exif(6)
    assert exif_orientation(good) == exif_orientation(b"Exif\0\0" + good) == 6
    for length in range(len(good) - 6):
        assert exif_orientation(good[:length]) == 1
    for bad in (exif(0), exif(9), b"II*\0" + b"\xff" * 20, b"XX*\0" + good[4:], b""):
        assert exif_orientation(bad) == 1


def test_alpha_lies_over_white() -> None:
    clear = np.zeros((48, 48, 4), np.uint8)
    for source in (clear, saved(clear, "PNG"), saved(clear, "WEBP"), Image.fromarray(clear).convert("LA").convert("La")):
        assert (read_picture(source, VISION, 70).pixels == 255).all()
    half = np.full((48, 48, 4), (0, 0, 0, 128), np.uint8)
    assert set(read_picture(half, VISION, 70).pixels.ravel()) == {127}


def test_16_bits_are_scaled_to_8() -> None:
    deep = np.random.default_rng(0).integers(0, 2**16, (384, 384)).astype(np.uint16)
    deep[0, :3] = 0, 65535, 300
    bright = np.rint(deep / 65535 * 255).astype(np.uint8)
    for source in (saved(deep, "PNG"), Image.fromarray(deep)):
        assert_as_transformers(read_picture(source, VISION, 70), Image.fromarray(bright), 70)
    clear = read_picture(saved(deep, "PNG", transparency=300), VISION, 70)
    bright[deep == 300] = 255
    assert_as_transformers(clear, Image.fromarray(bright), 70)


def test_wide_images_are_converted_in_bands_without_seams() -> None:
    pixels = noise(300, 9000, 4)
    assert_as_transformers(read_picture(pixels, VISION, 70), Image.fromarray(pixels), 70)


def test_sources_give_the_same_patches(tmp_path: Path) -> None:
    pixels = noise(61, 93)
    data, file = saved(pixels, "PNG"), tmp_path / "a.jpeg"  # the content counts, not the name
    file.write_bytes(data)
    wanted = read_picture(pixels, VISION).digest
    floats = (pixels / 255).astype(np.float32)
    for source in (
        *(data, bytearray(data), memoryview(data), file, str(file), Image.open(file)),
        *(floats, floats.astype(np.float64), np.asfortranarray(pixels), pixels[::-1][::-1]),
        np.concatenate([pixels, np.full((61, 93, 1), 255, np.uint8)], axis=2),
    ):
        assert read_picture(source, VISION).digest == wanted, type(source)
    grey = noise(61, 93, 1)
    assert read_picture(grey, VISION).digest == read_picture(np.stack([grey] * 3, axis=2), VISION).digest
    assert read_picture(noise(61, 93, seed=1), VISION).digest != wanted


# ---- What is no image

HEADS = {
    "a PDF": b"%PDF-1.7\n" + bytes(100),
    "an SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "a text": b"Hi there",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "a TIFF": saved(noise(9, 9), "TIFF"),
    "an ICO": saved(noise(16, 16), "ICO"),
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("name", HEADS)
def test_other_files_are_no_images(name: str, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(HEADS[name])
    with pytest.raises(InputError, match=r"picture\.png: not an image that can be read; use a PNG, JPEG, WebP"):
        read_picture(file, VISION)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "the image: empty; use a PNG"),
        (np.zeros((0, 5, 3), np.uint8), "has no pixels: it is 5 x 0"),
        (Image.new("RGB", (0, 5)), "has no pixels: it is 0 x 5"),
        (png(0, 5, 8, 2, b""), "has no pixels: it is 0 x 5"),
        (np.zeros((5, 5, 2), np.uint8), "3 or 4 channels as its last axis, got 5 x 5 x 2"),
        (np.zeros((3, 5, 5), np.uint8), "got 3 x 5 x 5"),
        (np.zeros(5, np.uint8), "got 5"),
        (np.zeros((5, 5), np.int64), "of uint8, or of floats from 0 to 1, got int64"),
        (np.full((5, 5), 1.5), "values from 0 to 1, got 1.5 to 1.5"),
        (np.full((5, 5), np.nan), "values from 0 to 1, got nan to nan"),
        (np.zeros((5, 5), bool), "got bool"),
        (None, "must be a path, bytes, a Pillow image or a NumPy array, got an object of type NoneType"),
        ([1, 2], "got an object of type list"),
        (Image.new("F", (5, 5)), "mode F have no known range; convert it to RGB"),
        (Image.new("I", (5, 5)), "mode I have no known range"),
        ("nowhere.png", r"nowhere\.png: there is no such file"),
        ("a\0b.png", r"a\\x00b\.png: cannot be read: embedded null byte"),
        ("x" * 100_000, r"x\.\.\.: cannot be read: File name too long"),
        ("/dev/zero", "/dev/zero: not a file; give the path of an image"),
        ("", "cannot be read|there is no such file|not a file"),
    ],
)
def test_other_sources_are_refused(source: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        read_picture(source, VISION)
    assert len(str(refused.value)) < 400


def test_pipes_and_folders_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path):
        with pytest.raises(InputError, match="not a file; give the path of an image"):
            read_picture(path, VISION)


def test_heic_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic(noise(64, 96))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(InputError, match="the image: HEIC needs another package; run: pip install pillow-heif"):
        read_picture(data, VISION)


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith(("metadata", "end", "pictures"))])
@pytest.mark.filterwarnings("error")
def test_truncated_files_are_refused(name: str) -> None:
    data = FILES[name]()
    for length in (len(data) // (4 if "animated" in name else 2), len(data) // 4, 40, 20, 12):
        with pytest.raises(InputError, match=r"^the image: (is damaged or cut short; save it or|has no pixels|not an image)"):
            read_picture(data[: min(length, len(data) - 20)], VISION)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("error")
def test_damaged_files_are_refused_or_read(name: str) -> None:
    """No other error, no warning, and not slow."""
    rng, data = np.random.default_rng(0), FILES[name]()
    for _ in range(12):
        damaged = bytearray(data)
        for _ in range(int(rng.integers(1, 6))):
            at = int(rng.integers(0, min(len(data), 300) if rng.random() < 0.7 else len(data)))
            damaged[at] = rng.integers(0, 256)
        said = problem_of(bytes(damaged))
        assert said is None or (said.startswith("the image: ") and len(said) < 200)


def problem_of(data: bytes) -> str | None:
    """What is wrong with a file; None if it is read."""
    try:
        assert 1 <= read_picture(data, VISION, 70).soft_tokens <= 70
    except InputError as refused:
        return str(refused)
    return None


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux counts it")
def test_bombs_cost_little_and_a_large_image_8_bytes_per_pixel() -> None:
    printed = run_alone("""
import warnings
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.vision.pictures import read_picture
from support.alone import run_alone
from support.image_files import BOMBS, VISION, png

warnings.simplefilter("error")

def read(data):
    try:
        return f"read: {read_picture(data, VISION).soft_tokens}"
    except InputError as refused:
        return str(refused)

for name, make in (*BOMBS.items(), ("a large image", lambda: png(5000, 4000, 8, 6, bytes(4000 * 20001)))):
    data = make()
    print(name, len(data), *measured(lambda: read(data)), sep="|")
""")
    print(printed)
    *bombs, large = [line.split("|") for line in printed.splitlines()]
    assert [name for name, *_ in bombs] == list(BOMBS)
    for name, size, said, grown, seconds in bombs:
        assert said.startswith("the image: ") or name in ("a JPEG with EXIF of 16 GB", "a PNG with two headers"), (name, said)
        assert float(grown) < 50 + 3 * int(size) / 2**20, (name, grown)
        assert float(seconds) < 5, (name, seconds)
    assert large[2] == "read: 252"
    assert float(large[3]) < 9.5 * 20  # megapixels


def test_the_most_pixels_are_those_that_pillow_warns_of() -> None:
    """So Pillow's warning and its error never reach anyone."""
    assert Image.MAX_IMAGE_PIXELS is not None
    assert MAX_PIXELS <= Image.MAX_IMAGE_PIXELS
    wide = Image.new("1", (MAX_PIXELS + 1, 1))
    with pytest.raises(InputError, match=r"has 89478486 x 1 pixels, more than 89,478,485; make it smaller"):
        read_picture(wide, VISION)
