"""Draws 4x4 Sudokus as pictures, with Pillow alone: six kinds of digits, and random sizes, places, slants, colours and noise.

The digits need no font file. Two fonts come with Pillow, and four are drawn here, two from lines and two from squares. A picture
follows from its clues and its random generator.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import cos, radians, sin

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]
Colour = NDArray[np.float64]

SIZE = 4  # cells along one side of a grid
#: How many weights each font has, from light to bold.
WEIGHTS = 3
#: Pixels along one side of the smallest and the largest picture.
SIDES = (144, 420)
#: How much darker than the paper the digits are at least, of 255.
CONTRAST = 90

_GLYPH = 64  # pixels along one side of a digit before it is placed
_DRAWN = 4 * _GLYPH  # lines are drawn larger and reduced, so that they have smooth edges

# Lines through points of a unit square, y down.
_STROKES: Mapping[int, Sequence[Sequence[tuple[float, float]]]] = {
    1: [[(0.36, 0.28), (0.54, 0.12), (0.54, 0.88)]],
    2: [[(0.27, 0.3), (0.32, 0.18), (0.44, 0.12), (0.6, 0.12), (0.72, 0.22), (0.72, 0.38), (0.27, 0.88), (0.76, 0.88)]],
    3: [
        [(0.27, 0.2), (0.42, 0.12), (0.6, 0.13), (0.71, 0.23), (0.7, 0.38), (0.58, 0.47), (0.44, 0.48)],
        [(0.58, 0.47), (0.72, 0.58), (0.74, 0.72), (0.62, 0.86), (0.42, 0.88), (0.25, 0.79)],
    ],
    4: [[(0.6, 0.88), (0.6, 0.12), (0.22, 0.64), (0.8, 0.64)]],
}
_ANGULAR: Mapping[int, Sequence[Sequence[tuple[float, float]]]] = {
    1: [[(0.34, 0.24), (0.5, 0.12), (0.5, 0.88)], [(0.32, 0.88), (0.68, 0.88)]],
    2: [[(0.26, 0.12), (0.72, 0.12), (0.72, 0.46), (0.26, 0.6), (0.26, 0.88), (0.74, 0.88)]],
    3: [[(0.26, 0.12), (0.74, 0.12), (0.46, 0.44), (0.74, 0.6), (0.7, 0.88), (0.26, 0.88)]],
    4: [[(0.32, 0.12), (0.26, 0.56), (0.76, 0.56)], [(0.64, 0.3), (0.64, 0.88)]],
}
# The seven segments of a clock's digit: top, upper left, upper right, middle, lower left, lower right, bottom.
_SEGMENTS = (
    ((0.3, 0.12), (0.7, 0.12)),
    ((0.26, 0.16), (0.26, 0.46)),
    ((0.74, 0.16), (0.74, 0.46)),
    ((0.3, 0.5), (0.7, 0.5)),
    ((0.26, 0.54), (0.26, 0.84)),
    ((0.74, 0.54), (0.74, 0.84)),
    ((0.3, 0.88), (0.7, 0.88)),
)
_LIT: Mapping[int, Sequence[int]] = {1: (2, 5), 2: (0, 2, 3, 4, 6), 3: (0, 2, 3, 5, 6), 4: (1, 2, 3, 5)}
# Squares, 3 by 5.
_SQUARES: Mapping[int, str] = {
    1: ".#. ##. .#. .#. ###",
    2: "##. ..# .#. #.. ###",
    3: "##. ..# .#. ..# ##.",
    4: "#.# #.# ### ..# ..#",
}


def _lines(lines: Sequence[Sequence[tuple[float, float]]], weight: int) -> Image.Image:
    image = Image.new("L", (_DRAWN, _DRAWN))
    pen, width = ImageDraw.Draw(image), int(_DRAWN * (0.07 + 0.035 * weight))
    for line in lines:
        points = [(x * _DRAWN, y * _DRAWN) for x, y in line]
        pen.line(points, fill=255, width=width, joint="curve")
        for x, y in (points[0], points[-1]):
            pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=255)
    return image


def _squares(digit: int, weight: int) -> Image.Image:
    image = Image.new("L", (_DRAWN, _DRAWN))
    pen, step, gap = ImageDraw.Draw(image), 0.155 * _DRAWN, (2 - weight) * 0.008 * _DRAWN
    for row, line in enumerate(_SQUARES[digit].split()):
        for column, square in enumerate(line):
            if square == "#":
                x, y = 0.27 * _DRAWN + column * step, 0.11 * _DRAWN + row * step
                pen.rectangle((x + gap, y + gap, x + step - gap, y + step - gap), fill=255)
    return image


def _outline(digit: int, weight: int) -> Image.Image:
    """Pillow's outline font. It has one weight; a stroke around it makes it bolder."""
    image = Image.new("L", (_DRAWN, _DRAWN))
    font = ImageFont.load_default(size=0.95 * _DRAWN)
    ImageDraw.Draw(image).text(
        (_DRAWN / 2, _DRAWN / 2), str(digit), fill=255, font=font, anchor="mm", stroke_width=5 * weight, stroke_fill=255
    )
    return image


def _bitmap(digit: int, weight: int) -> Image.Image:
    """Pillow's bitmap font, 6 by 11 pixels."""
    image = Image.new("L", (6 + weight // 2, 11))
    pen = ImageDraw.Draw(image)
    for shift in range(1 + weight // 2):
        pen.text((shift, 0), str(digit), fill=255, font=ImageFont.load_default_imagefont())
    left, top, right, bottom = image.getbbox() or (0, 0, *image.size)
    tall = int(0.8 * _DRAWN)
    wide = min(tall, tall * (right - left) // (bottom - top))
    enlarged = image.crop((left, top, right, bottom)).resize(
        (wide, tall), (Image.Resampling.NEAREST, Image.Resampling.BICUBIC)[weight % 2]
    )
    placed = Image.new("L", (_DRAWN, _DRAWN))
    placed.paste(enlarged, ((_DRAWN - wide) // 2, (_DRAWN - tall) // 2))
    return placed


#: The kinds of digits: each draws a digit, 1 to 4, in one of the weights, white on black.
FONTS: Mapping[str, Callable[[int, int], Image.Image]] = {
    "outline": _outline,
    "bitmap": _bitmap,
    "strokes": lambda digit, weight: _lines(_STROKES[digit], weight),
    "angular": lambda digit, weight: _lines(_ANGULAR[digit], weight),
    "segments": lambda digit, weight: _lines([_SEGMENTS[index] for index in _LIT[digit]], weight),
    "squares": _squares,
}


@cache
def glyph(font: str, digit: int, weight: int) -> Image.Image:
    """A digit in one of :data:`FONTS`, as a mask."""
    return FONTS[font](digit, weight).resize((_GLYPH, _GLYPH), Image.Resampling.BOX)


@dataclass(frozen=True)
class Look:
    """How a picture looks: where its grid lies, and how its digits are drawn.

    Attributes:
        side: pixels along one side of the picture.
        grid: pixels along one side of the grid.
        left, top: the grid's corner.
        angle: degrees by which lines and digits are turned.
        font: one of :data:`FONTS`.
        weight: 0 to 2.
        tall, wide: size of a digit, in cells.
        slant: how far a digit leans.
        unrest: how far digits are off their places and how much they are turned, from 0 to 1.
        paper, rules, ink: the colours [3] of the background, the lines and the digits.
        noise: standard deviation, of 255.
    """

    side: int
    grid: float
    left: float
    top: float
    angle: float
    font: str
    weight: int
    tall: float
    wide: float
    slant: float
    unrest: float
    paper: Colour
    rules: Colour
    ink: Colour
    noise: float


def random_look(rng: np.random.Generator, *, variety: float = 1.0, font: str | None = None) -> Look:
    """A random look.

    Args:
        variety: from 0 (black on white, always the same font, size and place) to 1.
        font: one of :data:`FONTS`. By default a random one.
    """

    def around(middle: float, low: float, high: float) -> float:
        return middle + variety * (rng.uniform(low, high) - middle)

    side = round(around(240, *SIDES))
    grid = side * around(0.89, 0.83, 0.95)
    if font is None:
        font = list(FONTS)[rng.integers(len(FONTS))] if rng.random() < variety else "strokes"
    paper, ink = around(255, 190, 255), around(0, 0, 190 - CONTRAST)
    tall = around(0.75, 0.55, 0.9)
    return Look(
        side=side,
        grid=grid,
        left=(side - grid) * around(0.5, 0.2, 0.8),
        top=(side - grid) * around(0.5, 0.2, 0.8),
        angle=around(0, -3, 3),
        font=font,
        weight=int(rng.integers(WEIGHTS)) if rng.random() < variety else 1,
        tall=tall,
        wide=tall * around(1, 0.85, 1.1),
        slant=around(0, -0.18, 0.29),
        unrest=variety,
        paper=paper + variety * rng.uniform(-25, 25, 3),
        rules=paper + (ink - paper) * around(1, 0.3, 1) + variety * rng.uniform(-20, 20, 3),
        ink=ink + variety * rng.uniform(-40, 40, 3),
        noise=around(0, 0, 12),
    )


def draw(clues: NDArray[np.int8], look: Look, rng: np.random.Generator) -> Picture:
    """A picture uint8 [side, side, 3] of clues int8 [16]."""
    lines, digits = (
        mask.rotate(look.angle, Image.Resampling.BILINEAR) for mask in (_rules(look, rng), _digits(clues, look, rng))
    )
    picture = np.broadcast_to(look.paper, (look.side, look.side, 3)).astype(np.float32)
    for mask, colour in ((lines, look.rules), (digits, look.ink)):
        share = np.asarray(mask, np.float32)[..., None] / 255
        picture = picture + share * (colour.astype(np.float32) - picture)
    noise = rng.standard_normal((look.side, look.side, 1), np.float32) * np.float32(look.noise)
    return (picture + noise).clip(0, 255).astype(np.uint8)


def _rules(look: Look, rng: np.random.Generator) -> Image.Image:
    """The lines of the grid, those around boxes thicker. One grid in ten has no others."""
    image = Image.new("L", (look.side, look.side))
    pen, cell = ImageDraw.Draw(image), look.grid / SIZE
    thick = max(2, round(look.grid * rng.uniform(0.008, 0.02)))
    thin = max(1, round(thick * rng.uniform(0.3, 0.8))) if rng.random() < 0.9 else 0
    for index in range(SIZE + 1):
        width = thin if index % 2 else thick
        if width:
            x, y = look.left + index * cell, look.top + index * cell
            pen.line((x, look.top, x, look.top + look.grid), fill=255, width=width)
            pen.line((look.left, y, look.left + look.grid, y), fill=255, width=width)
    return image


def _digits(clues: NDArray[np.int8], look: Look, rng: np.random.Generator) -> Image.Image:
    image, cell = Image.new("L", (look.side, look.side)), look.grid / SIZE
    for index in np.flatnonzero(clues):
        row, column = divmod(int(index), SIZE)
        shift, turn = look.unrest * rng.uniform(-0.06, 0.06, 2), look.unrest * rng.uniform(-4, 4)
        x, y = np.array([look.left, look.top]) + cell * (np.array([column, row]) + 0.5 + shift)
        left, top = int(x - cell / 2), int(y - cell / 2)
        placed = _placed(look, glyph(look.font, int(clues[index]), look.weight), (x - left, y - top), turn)
        image.paste(255, (left, top), placed)
    return image


def _placed(look: Look, mask: Image.Image, centre: tuple[float, float], angle: float) -> Image.Image:
    """A digit in a square as large as a cell, with its centre at ``centre``: turned by ``angle``, slanted and scaled."""
    cell, turn = look.grid / SIZE, radians(angle)
    size = np.diag([cell * look.wide / _GLYPH, cell * look.tall / _GLYPH])
    shape = np.array([[cos(turn), -sin(turn)], [sin(turn), cos(turn)]]) @ np.array([[1.0, -look.slant], [0.0, 1.0]]) @ size
    inverse = np.linalg.inv(shape)  # from a pixel of the square to one of the mask
    shift = _GLYPH / 2 - inverse @ np.array(centre)
    data = (*inverse[0], shift[0], *inverse[1], shift[1])
    return mask.transform((int(cell) + 2, int(cell) + 2), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
