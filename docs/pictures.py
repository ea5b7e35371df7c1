"""Draws the pictures of how-it-works.md from a run of the Sudoku model: ``python docs/pictures.py [MODEL]``.

Writes canvas.svg and acceptance.svg beside this file. The run equals ``mlx-diffgemma demo`` with the seed and clues below.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mlx_diffgemma.backends import load_backend
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.cli.demo import board_size, prompt_tokens
from mlx_diffgemma.cli.live import SETTLED, TAKEN_BACK, Settling
from mlx_diffgemma.demo import sudoku
from mlx_diffgemma.demo.sudoku import Grid
from mlx_diffgemma.sampler import Draft, Text, block_diffusion

SEED, CLUES = 6, 12
PANELS = 6  # steps shown in the first picture

CELL = 22
INK, FAINT, GREEN, ORANGE = "#1f2328", "#8c959f", "#1a7f37", "#bc4c00"
LEAST, MOST = (255, 255, 255), (97, 160, 255)  # colours of zero and of maximum entropy


def record(model: str) -> tuple[Grid, list[Draft]]:
    """The clues of the puzzle, and the canvas after each step."""
    checkpoint = Checkpoint.open(model)
    size = board_size(checkpoint.config.canvas_length)
    clues = sudoku.fresh_puzzle(size, CLUES, SEED).clues
    config = checkpoint.generation.replace(max_new_tokens=checkpoint.config.canvas_length)
    events = block_diffusion(load_backend(checkpoint), Text(prompt_tokens(clues), SEED), config)
    return clues, [event for event in events if isinstance(event, Draft)]


def canvas_picture(clues: Grid, drafts: Sequence[Draft]) -> str:
    """Grids side by side: the most likely digits after some of the steps, coloured by entropy."""
    size, settling = clues.size, Settling()
    states = [settling.update(draft) for draft in drafts]
    shown = sorted({round(step) for step in np.linspace(0, len(drafts) - 1, PANELS)})
    side = size * CELL
    parts = []
    for panel, index in enumerate(shown):
        left, top = 12 + panel * (side + 20), 34
        draft = drafts[index]
        parts.append(text(left, 22, f"step {draft.step}", INK, weight="bold"))
        digits = sudoku.from_tokens(draft.argmax[: size * size], size).tolist()
        for cell, digit in enumerate(digits):
            x, y = left + cell % size * CELL, top + cell // size * CELL
            parts.append(rectangle(x, y, CELL, CELL, shade(draft.entropy[cell], size), FAINT))
            given, state = clues.cells[cell] == digit, states[index][cell]
            colour = ORANGE if state == TAKEN_BACK else INK if given else GREEN if state == SETTLED else FAINT
            weight = "bold" if given or state == TAKEN_BACK else "normal"
            parts.append(text(x + CELL / 2, y + CELL * 0.7, str(digit or "?"), colour, anchor="middle", weight=weight))
        height, width = sudoku.BOXES[size]
        for box in range(size):
            column, row = box % (size // width) * width, box // (size // width) * height
            parts.append(rectangle(left + column * CELL, top + row * CELL, width * CELL, height * CELL, "none", INK))
    below = 34 + side + 22
    legend = [("given", INK, "bold"), ("settled", GREEN, "normal"), ("in doubt", FAINT, "normal"), ("taken back", ORANGE, "bold")]
    for place, (name, colour, weight) in enumerate(legend):
        parts.append(text(12 + place * 90, below, name, colour, weight=weight))
    parts.append(text(12 + len(legend) * 90, below, "the bluer, the higher the entropy", FAINT))
    return picture(12 + len(shown) * (side + 20), below + 14, parts)


def acceptance_picture(clues: Grid, drafts: Sequence[Draft]) -> str:
    """One row per step: entropy of each position, a dot if it was accepted, mean entropy, and number of accepted positions."""
    cells, wide, high, left, top = len(clues.cells), 13, 17, 48, 44
    right = left + cells * wide + 18
    parts = [
        text(left, 18, f"position in the canvas (the {cells} cells, row by row)", INK),
        text(left, 34, "colour: entropy; dot: accepted in this step", FAINT),
        text(right, 18, "mean", INK),
        text(right, 34, "entropy", INK),
        text(right + 78, 34, "accepted", INK),
    ]
    for row, draft in enumerate(drafts):
        y = top + row * high
        parts.append(text(left - 8, y + 13, str(draft.step), INK, anchor="end"))
        for cell in range(cells):
            x = left + cell * wide
            parts.append(rectangle(x, y, wide, high, shade(draft.entropy[cell], clues.size), "#d0d7de"))
            if draft.accepted[cell]:
                parts.append(f'<circle cx="{x + wide / 2}" cy="{y + high / 2}" r="2.5" fill="{INK}"/>')
        parts.append(text(right, y + 13, f"{draft.entropy[:cells].mean():.3f}", INK))
        parts.append(text(right + 78, y + 13, f"{draft.accepted[:cells].sum()} of {cells}", INK))
    parts.append(text(12, 34, "step", INK))
    return picture(right + 160, top + len(drafts) * high + 12, parts)


def shade(entropy: float, size: int) -> str:
    """A colour from LEAST to MOST: the entropy divided by that of a uniform choice among the digits."""
    part = min(1.0, float(entropy) / np.log(size))
    return "#" + "".join(f"{round(low + (high - low) * part):02x}" for low, high in zip(LEAST, MOST, strict=True))


def text(x: float, y: float, content: str, colour: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" fill="{colour}" text-anchor="{anchor}" font-weight="{weight}">{content}</text>'


def rectangle(x: float, y: float, width: float, height: float, fill: str, stroke: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" stroke="{stroke}"/>'


def picture(width: float, height: float, parts: Iterable[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">'
    return "\n".join([head, rectangle(0, 0, width, height, "#ffffff", "none"), *parts, "</svg>", ""])


if __name__ == "__main__":
    clues, drafts = record(sys.argv[1] if len(sys.argv) > 1 else "sudoku")
    folder = Path(__file__).parent
    (folder / "canvas.svg").write_text(canvas_picture(clues, drafts), encoding="utf-8")
    (folder / "acceptance.svg").write_text(acceptance_picture(clues, drafts), encoding="utf-8")
