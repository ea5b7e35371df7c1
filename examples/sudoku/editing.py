"""Measures how well the tiny Sudoku model revises and proofreads solutions, and fills in missing rows.

    python examples/sudoku/editing.py [--checkpoint sudoku] [--backend torch] [--count 100] [--json FILE]

The prompt is always the puzzle, which has one solution. In revise and proofread, no clue is changed.

- Revise, at strengths 0 to 1: how many answers are the solution, and how many denoising steps they took. Drafts are the solution
  itself, and the solution with four wrong cells.
- Proofread a solution with wrong cells: how many of them are doubted (recall), and how many of the doubted cells are wrong
  (precision).
- Infill: rows of the solution left out in one hole of known length, and one row in a hole of unknown length.
"""

import argparse
import json
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from puzzles import Grids, make_puzzles
from rich.console import Console
from rich.table import Table
from solving import canvas_tokens
from vocabulary import END_OF_TURN, PAD, prompt_tokens

from mlx_diffgemma.backends import Backend, load_backend
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.demo.sudoku import to_tokens
from mlx_diffgemma.editing.infilling import Frame, Hole, fill
from mlx_diffgemma.editing.proofreading import second_look
from mlx_diffgemma.editing.revising import Original, rewrite
from mlx_diffgemma.prompts import PromptTokens

STRENGTHS = tuple(tenth / 10 for tenth in range(11))
#: Number of wrong cells in the draft to revise.
WRONG_IN_DRAFT = 4
#: Numbers of wrong cells in the solutions to proofread.
PLANTED = (1, 2, 4, 8)
#: Tokens after the cells in a canvas.
ENDING = (END_OF_TURN, PAD)


def with_errors(puzzles: Grids, solutions: Grids, count: int, seed: int) -> Grids:
    """Solutions with a wrong digit in ``count`` cells that are not clues (in all such cells if there are fewer)."""
    rng = np.random.default_rng([seed, count])
    size = isqrt(puzzles.shape[1])
    wrong = solutions.copy()
    for row, puzzle in zip(wrong, puzzles, strict=True):
        empty = np.flatnonzero(puzzle == 0)
        cells = rng.choice(empty, min(count, len(empty)), replace=False)
        row[cells] = (row[cells] - 1 + rng.integers(1, size, len(cells))) % size + 1
    return wrong


def revised(
    backend: Backend, config: GenerationConfig, puzzles: Grids, solutions: Grids, drafts: Grids, *, strength: float, seed: int
) -> dict[str, float]:
    """Share of answers that equal the solution, and mean number of denoising steps."""
    prompts, answers, steps, solved = prompt_tokens(puzzles), canvas_tokens(solutions), [], []
    for index, draft in enumerate(canvas_tokens(drafts)):
        original = Original(PromptTokens(prompts[index]), draft, np.zeros(len(draft), bool))
        tokens, _, taken = rewrite(backend, original, config, strength=strength, seed=seed + index)
        solved.append(bool((tokens == answers[index]).all()))
        steps.append(sum(taken))
    return {"solved": float(np.mean(solved)), "denoising_steps": float(np.mean(steps))}


def proofread_all(
    backend: Backend, config: GenerationConfig, puzzles: Grids, solutions: Grids, count: int, seed: int
) -> dict[str, float]:
    """Recall and precision over the cells of all puzzles."""
    prompts, drafts = prompt_tokens(puzzles), with_errors(puzzles, solutions, count, seed)
    doubted = np.zeros(drafts.shape, bool)
    corrected = 0
    for index, cells in enumerate(to_tokens(drafts)):
        argmax, _, _ = second_look(backend, PromptTokens(prompts[index]), cells, config, ending=ENDING)
        doubted[index] = argmax != cells
        corrected += int((argmax == to_tokens(solutions[index]))[drafts[index] != solutions[index]].sum())
    wrong = drafts != solutions
    found = int((doubted & wrong).sum())
    return {
        "planted": int(wrong.sum()),
        "doubted": int(doubted.sum()),
        "recall": found / int(wrong.sum()),
        "precision": found / max(1, int(doubted.sum())),
        "corrected": corrected / int(wrong.sum()),
    }


def rows_filled(
    backend: Backend,
    config: GenerationConfig,
    puzzles: Grids,
    solutions: Grids,
    rows: int,
    seed: int,
    *,
    slack: int = 0,
    whole: bool = True,
) -> dict[str, float]:
    """Share of holes of ``rows`` rows that are filled as in the solution.

    Args:
        slack: also try lengths that are up to this many tokens shorter or longer.
        whole: whether the canvas begins at the start of the solution. Otherwise it begins at the hole, where the model never
            began a canvas in training.
    """
    size = isqrt(puzzles.shape[1])
    rng = np.random.default_rng([seed, rows])
    prompts = prompt_tokens(puzzles)
    right, cells, lengths, steps = [], [], [], []
    for index, solution in enumerate(to_tokens(solutions)):
        start = int(rng.integers(size - rows + 1)) * size
        end = start + rows * size
        prefix = [*prompts[index].tolist(), *solution[:start].tolist()]
        hole = Hole(end - start - slack, end - start + slack)
        template = [prefix, hole, solution[end:].tolist()]
        frame = Frame(ENDING, in_canvas=start if whole else 0)
        best = fill(backend, template, config, seed=seed + index, frame=frame, batch="fast")[0]
        written: NDArray[np.int32] = np.array(best.holes[0], np.int32)
        same_length = len(written) == end - start
        lengths.append(same_length)
        right.append(same_length and bool((written == solution[start:end]).all()))
        cells.append(float((written == solution[start:end]).mean()) if same_length else 0.0)
        steps.append(best.steps)
    return {
        "filled": float(np.mean(right)),
        "cells": float(np.mean(cells)),
        "length_found": float(np.mean(lengths)),
        "denoising_steps": float(np.mean(steps)),
    }


def measure(backend: Backend, config: GenerationConfig, puzzles: Grids, solutions: Grids, seed: int) -> dict[str, Any]:
    """All measurements for one set of puzzles."""
    wrong = with_errors(puzzles, solutions, WRONG_IN_DRAFT, seed)
    drafts = {"from the solution": solutions, f"from {WRONG_IN_DRAFT} wrong cells": wrong}
    size = isqrt(puzzles.shape[1])
    return {
        "puzzles": len(puzzles),
        "revise": {
            name: {
                str(strength): revised(backend, config, puzzles, solutions, draft, strength=strength, seed=seed)
                for strength in STRENGTHS
            }
            for name, draft in drafts.items()
        },
        "proofread": {str(count): proofread_all(backend, config, puzzles, solutions, count, seed) for count in PLANTED},
        "infill": {
            **{f"rows: {rows}": rows_filled(backend, config, puzzles, solutions, rows, seed) for rows in range(1, size // 2 + 1)},
            "rows: 1, length 2 up or down": rows_filled(backend, config, puzzles, solutions, 1, seed, slack=2),
            "rows: 1, what is before in the cache": rows_filled(backend, config, puzzles, solutions, 1, seed, whole=False),
        },
    }


def tables(report: Mapping[str, Any]) -> list[Table]:
    """The report as tables for a terminal."""
    names = list(report["revise"])
    revising = Table("strength", *(f"{name}: {what}" for name in names for what in ("solved", "steps")), title="Revise")
    for strength in map(str, STRENGTHS):
        found = [report["revise"][name][strength] for name in names]
        revising.add_row(strength, *(part for of in found for part in (f"{of['solved']:.1%}", f"{of['denoising_steps']:.1f}")))
    proofreading = Table("planted in each", "recall", "precision", "corrected", title="Proofread")
    for count, of in report["proofread"].items():
        proofreading.add_row(count, f"{of['recall']:.1%}", f"{of['precision']:.1%}", f"{of['corrected']:.1%}")
    filling = Table("hole", "filled right", "cells right", "length found", "steps", title="Infill")
    for name, of in report["infill"].items():
        shares = (f"{of[key]:.1%}" for key in ("filled", "cells", "length_found"))
        filling.add_row(name, *shares, f"{of['denoising_steps']:.1f}")
    return [revising, proofreading, filling]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--checkpoint", default="sudoku", help="a folder, or the name of a model in the package (default %(default)s)"
    )
    parser.add_argument("--backend", help="mlx or torch (default: the package's choice)")
    parser.add_argument("--count", type=int, default=100, help="number of puzzles (default %(default)s)")
    parser.add_argument("--clues", default="14-18", help="range of clues (default %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=3, help="seed of the puzzles, the changes and the sampler (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="file to write the report to")
    arguments = parser.parse_args()

    checkpoint = Checkpoint.open(arguments.checkpoint)
    backend = load_backend(checkpoint, arguments.backend)
    low, _, high = arguments.clues.partition("-")
    size = isqrt(checkpoint.config.canvas_length)
    puzzles, solutions = make_puzzles(size, arguments.count, (int(low), int(high or low)), arguments.seed, held_out=True)
    report = {
        "checkpoint": str(arguments.checkpoint),
        "backend": f"{backend.name} on {backend.device}, {backend.dtype}",
        "clues": arguments.clues,
        "seed": arguments.seed,
        **measure(backend, checkpoint.generation, puzzles, solutions, arguments.seed),
    }
    Console(width=140).print(*tables(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
