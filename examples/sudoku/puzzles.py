"""Makes many Sudoku puzzles with one solution each for training and evaluation, and random symmetric forms of them.

Reducing a grid to few clues takes one solver call per cell. Adding random clues again costs nothing and keeps the solution
unique, so each reduced grid gives several puzzles.
"""

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.demo.sudoku import BOXES, MAX_GRIDS, is_held_out, random_grid, remove_clues, require_valid
from mlx_diffgemma.errors import InputError

Grids = NDArray[np.int8]

_PER_GRID = 8  # puzzles from one reduced grid
_BATCH = 32  # grids that are reduced before clues are added to all of them at once


def make_puzzles(size: int, count: int, clues: tuple[int, int], seed: int, held_out: bool) -> tuple[Grids, Grids]:
    """``count`` puzzles and their solutions, int8 [count, cells] each. The same arguments give the same puzzles.

    Args:
        clues: fewest and most clues. The number of clues is uniform between them. If a grid was not reduced to the fewest, the
            range starts at the number it reached.
        seed: 0 or more. Training and held-out puzzles with the same seed come from different grids.
        held_out: whether to make puzzles that training never sees (:func:`mlx_diffgemma.demo.sudoku.is_held_out`) or others.

    Raises:
        InputError: an argument is out of range, or ``MAX_GRIDS`` grids in a row gave no puzzle because so few clues are rare.
    """
    low, high = clues
    for bound in clues:
        require_valid(size, bound, seed)
    if low > high:
        raise InputError(f"the fewest clues, {low}, exceed the most, {high}; swap them")
    if count < 0:
        raise InputError(f"the count must be 0 or more, got {count}")
    rng = np.random.default_rng([seed, held_out])
    puzzles = [np.empty((0, size * size), np.int8)]
    solutions = [puzzles[0]]
    made = barren = 0
    while made < count:
        reduced, complete = _reduced_grids(size, low, rng)
        batch, answers = _give_back(reduced, complete, low, high, rng)
        wanted = is_held_out(batch) == held_out
        puzzles.append(batch[wanted])
        solutions.append(answers[wanted])
        made += int(wanted.sum())
        barren = 0 if wanted.any() else barren + _BATCH
        if barren >= MAX_GRIDS:
            raise InputError(
                f"no {size}x{size} puzzle with {low} to {high} clues in {barren} grids; ask for other numbers of clues"
            )
    return np.concatenate(puzzles)[:count], np.concatenate(solutions)[:count]


def random_symmetry(rng: np.random.Generator, *grids: Grids) -> tuple[Grids, ...]:
    """Random symmetric forms of grids int8 [n, cells]. Row i of every array gets the same form, so a puzzle fits its solution.

    Digits are relabelled. Rows are permuted within bands, columns within stacks, and whole bands and stacks too. If boxes are
    square, half of the grids are transposed. None of this changes :func:`mlx_diffgemma.demo.sudoku.invariant`.
    """
    count, cells = grids[0].shape
    size = next(size for size in BOXES if size * size == cells)
    height, width = BOXES[size]
    rows = _line_permutations(count, size, height, rng)[:, :, None]
    columns = _line_permutations(count, size, width, rng)[:, None, :]
    source = rows * size + columns  # [n, size, size]
    if height == width:
        transposed = columns * size + rows
        source = np.where(rng.random((count, 1, 1)) < 0.5, transposed, source)
    source = source.reshape(count, cells)
    labels = np.zeros((count, size + 1), np.int8)  # 0 stays 0
    labels[:, 1:] = _permutations((count, size), rng) + 1
    return tuple(np.take_along_axis(labels, np.take_along_axis(grid, source, 1), 1) for grid in grids)


def _reduced_grids(size: int, clues: int, rng: np.random.Generator) -> tuple[Grids, Grids]:
    complete = [random_grid(size, rng) for _ in range(_BATCH)]
    reduced = [remove_clues(grid, clues, rng) for grid in complete]
    return np.array([grid.cells for grid in reduced], np.int8), np.array([grid.cells for grid in complete], np.int8)


def _give_back(reduced: Grids, complete: Grids, low: int, high: int, rng: np.random.Generator) -> tuple[Grids, Grids]:
    reached = (reduced > 0).sum(1)
    source = np.repeat(np.flatnonzero(reached <= high), _PER_GRID)
    reduced, complete, reached = reduced[source], complete[source], reached[source]
    target = rng.integers(np.maximum(reached, low), high, endpoint=True)
    order = rng.random(reduced.shape)
    order[reduced > 0] = -1.0  # the clues that were left come first
    rank = order.argsort(1).argsort(1)
    batch = np.where(rank < target[:, None], complete, np.int8(0))
    # Grids to which nothing was added twice are equal: keep one.
    distinct = np.sort(np.unique(batch, axis=0, return_index=True)[1])
    return batch[distinct], complete[distinct]


def _permutations(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.intp]:
    """Independent random permutations along the last axis."""
    return rng.random(shape).argsort(-1)


def _line_permutations(count: int, size: int, band: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """[count, size]: the old line for each new line. Bands of ``band`` lines stay together."""
    bands = _permutations((count, size // band), rng)
    within = _permutations((count, size // band, band), rng)
    return (bands[:, :, None] * band + within).reshape(count, size)
