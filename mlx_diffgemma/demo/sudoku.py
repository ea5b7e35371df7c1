"""Sudoku for the boxed model: grids, the rules, an exact solver, fresh puzzles, and which puzzles are held out from training.

A grid is 4x4 (boxes of 2x2), 6x6 (boxes of 2 rows by 3 columns) or 9x9 (boxes of 3x3). Cells go row by row; an empty cell is 0.

For each digit, the solver keeps the set of cells that may hold it, as the bits of one integer. Counting over the digits then
finds all cells with one or two candidates at once, and placing a digit is one mask.

**Held-out puzzles.** :func:`is_held_out` uses :func:`invariant`, which is the same for every symmetric form of a puzzle. Training
uses only puzzles that are not held out, so a held-out puzzle is new to the model in every symmetric form. Its solution may not be
new: up to symmetry, there are few complete 4x4 and 6x6 grids.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.errors import InputError
from mlx_diffgemma.noise import mix

#: The boxed model's token id of an empty cell. Digit d is this + d.
EMPTY_TOKEN = 6

#: Rows and columns of a box, by the size of the grid.
BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}

#: How many complete grids are tried for one puzzle.
MAX_GRIDS = 300

NAKED, HIDDEN, SEARCH = "naked singles", "hidden singles", "search"

_ROUNDS = 4
_BOX, _DIGIT = np.uint32(0x9E3779B9), np.uint32(0x3C6EF372)  # keep boxes and digits distinct from rows and columns in the hash


@dataclass(frozen=True)
class Grid:
    """Cells row by row, 0 for an empty cell. Checked on construction (InputError), but not for the rules; see :func:`check`."""

    cells: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.size not in BOXES:
            raise InputError(f"a Sudoku grid has 16, 36 or 81 cells, not {len(self.cells)}")
        wrong = [digit for digit in self.cells if not 0 <= digit <= self.size]
        if wrong:
            raise InputError(f"a {self.size}x{self.size} grid holds the digits 1 to {self.size}, not {wrong[0]}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a grid from text: one character per cell, ``.``, ``0`` or ``_`` for an empty cell. White space is ignored."""
        cells = "".join(text.split()).replace(".", "0").replace("_", "0")
        if not (cells.isascii() and cells.isdigit()):
            raise InputError("a grid must be written with digits, and '.', '0' or '_' for an empty cell")
        return cls(tuple(map(int, cells)))

    @classmethod
    def from_array(cls, cells: NDArray[np.int8]) -> Self:
        """Make a grid from one row [cells] of an array of grids."""
        return cls(tuple(cells.tolist()))

    @property
    def size(self) -> int:
        """The number of rows, columns and digits. 0 if the number of cells fits no Sudoku."""
        return next((size for size in BOXES if size * size == len(self.cells)), 0)

    @property
    def clue_count(self) -> int:
        """How many cells hold a digit."""
        return sum(digit > 0 for digit in self.cells)

    def text(self) -> str:
        """One character per cell, row by row, ``.`` for an empty cell: the form that the model reads and writes."""
        return "".join(str(digit) if digit else "." for digit in self.cells)

    def render(self) -> str:
        """The grid as lines for a terminal, with ruled boxes."""
        size, (height, width) = self.size, BOXES[self.size]
        rule = ["─" * (2 * width + 1)] * (size // width)
        lines = ["┌" + "┬".join(rule) + "┐"]
        for row in range(size):
            if row and row % height == 0:
                lines.append("├" + "┼".join(rule) + "┤")
            cells = self.text()[row * size : (row + 1) * size]
            boxes = [" ".join(cells[column : column + width]) for column in range(0, size, width)]
            lines.append("│ " + " │ ".join(boxes) + " │")
        return "\n".join([*lines, "└" + "┴".join(rule) + "┘"])


class Puzzle(NamedTuple):
    """Clues with exactly one solution, and that solution."""

    clues: Grid
    solution: Grid


class Grade(NamedTuple):
    """How hard a puzzle is.

    Attributes:
        technique: the simplest technique that solves the puzzle: ``NAKED`` (fill cells with one candidate), ``HIDDEN`` (also fill
            digits with one place left in a row, column or box), or ``SEARCH`` (also guess).
        guesses: how many digits were tried until the solution was found, with both techniques after each; 0 if no guess is
            needed. Cells with two candidates are tried first, and otherwise cells and digits are tried in order.
    """

    technique: str
    guesses: int


class Unit(NamedTuple):
    """A row, column or box: its name and its cells in order."""

    name: str
    cells: tuple[int, ...]


@cache
def units(size: int) -> tuple[Unit, ...]:
    """All rows, then all columns, then all boxes. Their names count from 1."""
    height, width = BOXES[size]
    named: dict[str, list[int]] = {f"{kind} {index + 1}": [] for kind in ("row", "column", "box") for index in range(size)}
    for cell in range(size * size):
        row, column = divmod(cell, size)
        box = row // height * (size // width) + column // width
        for name in (f"row {row + 1}", f"column {column + 1}", f"box {box + 1}"):
            named[name].append(cell)
    return tuple(Unit(name, tuple(cells)) for name, cells in named.items())


def check(puzzle: Grid, answer: Grid) -> list[str]:
    """How ``answer`` breaks the rules, one line per violation. Empty if it solves ``puzzle``.

    Every row, column and box must hold each digit once, and the clues must be unchanged.
    """
    if puzzle.size != answer.size:
        raise InputError(f"the puzzle is {puzzle.size}x{puzzle.size}, but the answer is {answer.size}x{answer.size}")
    violations = []
    for cell, (clue, digit) in enumerate(zip(puzzle.cells, answer.cells, strict=True)):
        place = f"row {cell // puzzle.size + 1}, column {cell % puzzle.size + 1}"
        if not digit:
            violations.append(f"{place} is empty")
        elif clue not in (0, digit):
            violations.append(f"{place} holds {digit}, but the clue is {clue}")
    for name, cells in units(puzzle.size):
        held = [answer.cells[cell] for cell in cells]
        violations += [
            f"{name} has {digit} {held.count(digit)} times" for digit in sorted(set(held) - {0}) if held.count(digit) > 1
        ]
    return violations


def count_solutions(grid: Grid, limit: int = 2) -> int:
    """The number of solutions of a grid, counted up to ``limit``."""
    return sum(1 for _ in islice(_solutions(grid.size, _candidates(grid)), limit))


def grade(puzzle: Grid) -> Grade:
    """The difficulty of a puzzle. Raises InputError if it has no solution."""
    for technique, hidden in ((NAKED, False), (HIDDEN, True)):
        state = _propagate(puzzle.size, _candidates(puzzle), 0, hidden=hidden)
        if state and not state.branch:
            return Grade(technique, 0)
    for _, guesses in _solutions(puzzle.size, _candidates(puzzle)):
        return Grade(SEARCH, guesses)
    raise InputError("the puzzle has no solution")


def random_grid(size: int, rng: np.random.Generator) -> Grid:
    """A random complete grid. Every grid is possible, but not all have the same probability."""
    cells = size * size
    candidates, _ = next(_solutions(size, [(1 << cells) - 1] * size, rng))
    return Grid(tuple(next(digit for digit in range(size) if candidates[digit] >> cell & 1) + 1 for cell in range(cells)))


def remove_clues(solution: Grid, clues: int, rng: np.random.Generator) -> Grid:
    """A puzzle with this one solution. Empties cells in random order until ``clues`` are left or no other cell can be emptied."""
    size, cells = solution.size, list(solution.cells)
    left = len(cells)
    for cell in rng.permutation(len(cells)).tolist():
        if left <= clues:
            break
        digit, cells[cell] = cells[cell], 0
        # The solution was the only one, so any new solution must differ from it in this cell.
        candidates = _candidates(Grid(tuple(cells)))
        candidates[digit - 1] &= ~(1 << cell)
        if next(_solutions(size, candidates), None) is None:
            left -= 1
        else:
            cells[cell] = digit
    return Grid(tuple(cells))


def require_valid(size: int, clues: int, seed: int) -> None:
    """Raise InputError if the size, the number of clues or the seed is out of range."""
    if size not in BOXES:
        raise InputError(f"the size of a Sudoku must be 4, 6 or 9, got {size}")
    if not 0 < clues < size * size:
        raise InputError(f"a {size}x{size} puzzle must have 1 to {size * size - 1} clues, got {clues}")
    if seed < 0:
        raise InputError(f"the seed must be 0 or more, got {seed}")


def fresh_puzzle(size: int, clues: int, seed: int) -> Puzzle:
    """A held-out puzzle with one solution and exactly ``clues`` clues. The same ``seed`` (0 or more) gives the same puzzle.

    This holds for one version of NumPy, which may change its generators' methods between versions (NEP 19).

    Raises:
        InputError: an argument is out of range, or ``MAX_GRIDS`` complete grids gave no such puzzle. Few clues are rare.
    """
    require_valid(size, clues, seed)
    rng = np.random.default_rng(seed)
    for _ in range(MAX_GRIDS):
        solution = random_grid(size, rng)
        puzzle = remove_clues(solution, clues, rng)
        if puzzle.clue_count == clues and is_held_out(np.array([puzzle.cells], np.int8))[0]:
            return Puzzle(puzzle, solution)
    raise InputError(f"no held-out {size}x{size} puzzle with {clues} clues in {MAX_GRIDS} grids; ask for another number of clues")


def invariant(puzzles: NDArray[np.int8]) -> NDArray[np.uint32]:
    """A hash [n] of puzzles [n, cells] that is the same for all symmetric forms of a puzzle.

    The symmetries relabel the digits, permute rows within bands, columns within stacks, bands and stacks, and transpose.

    The hash is a colour refinement. A cell's first colour says whether it holds a clue. In each round, the colour takes in the
    multisets of colours in the cell's row and column (in no order), in its box, and among the clues of its own digit. Only sums
    over cells are used, so no order and no label has an influence. In rare cases, puzzles that are not symmetric forms of each
    other have the same hash. Then both are held out, or neither is.
    """
    chunk = 1024  # keeps the temporaries in cache
    hashes = [_refine(puzzles[start : start + chunk]) for start in range(0, len(puzzles), chunk)]
    return np.concatenate([np.empty(0, np.uint32), *hashes])


def is_held_out(puzzles: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Which puzzles [n, cells] are held out: training never sees them in any symmetric form. One in ten is held out."""
    held_out: NDArray[np.bool_] = invariant(puzzles) % 10 == 0
    return held_out


def to_tokens(cells: NDArray[np.int8]) -> NDArray[np.int32]:
    """The boxed model's token ids of cells (0 for an empty cell), for arrays of any shape."""
    return cells.astype(np.int32) + EMPTY_TOKEN


def from_tokens(tokens: NDArray[np.int32], size: int) -> NDArray[np.int8]:
    """The cells of the boxed model's token ids, for arrays of any shape. A token that is not a digit up to ``size`` gives 0."""
    digits = tokens - EMPTY_TOKEN
    return np.where((digits > 0) & (digits <= size), digits, 0).astype(np.int8)


def _refine(puzzles: NDArray[np.int8]) -> NDArray[np.uint32]:
    count, cells = puzzles.shape
    size = next(size for size in BOXES if size * size == cells)
    height, width = BOXES[size]
    boxed = (count, size // height, height, size // width, width)
    colours = (puzzles > 0).astype(np.uint32)
    for _ in range(_ROUNDS):
        words = mix(colours)
        square = words.reshape(count, size, size)
        rows = mix(square.sum(2, dtype=np.uint32, keepdims=True))  # [n, size, 1]
        columns = mix(square.sum(1, dtype=np.uint32, keepdims=True))  # [n, 1, size]
        boxes = mix(words.reshape(boxed).sum((2, 4), dtype=np.uint32, keepdims=True) ^ _BOX)
        neighbours = (rows + columns).reshape(count, cells) + np.broadcast_to(boxes, boxed).reshape(count, cells)
        for digit in range(1, size + 1):
            holds = puzzles == digit
            alike = mix(np.where(holds, words, np.uint32(0)).sum(1, dtype=np.uint32) ^ _DIGIT)
            neighbours += np.where(holds, alike[:, None], np.uint32(0))
        colours = words + mix(neighbours)
    return mix(mix(colours).sum(1, dtype=np.uint32))


class _State(NamedTuple):
    """The state after propagation: the decided cells and the cell to guess, both as bits. ``branch`` is 0 if it is solved."""

    decided: int
    branch: int


@cache
def _unit_masks(size: int) -> tuple[int, ...]:
    return tuple(sum(1 << cell for cell in unit.cells) for unit in units(size))


@cache
def _cells_left(size: int) -> tuple[int, ...]:
    """For each cell, the cells that may still hold a digit after that digit is placed in it, as bits."""
    masks, everywhere = _unit_masks(size), (1 << size * size) - 1
    keep = []
    for cell in range(size * size):
        seen = 0
        for mask in masks:
            seen |= mask if mask >> cell & 1 else 0
        keep.append(everywhere & ~seen | 1 << cell)
    return tuple(keep)


def _candidates(grid: Grid) -> list[int]:
    """For each digit, the cells that may hold it, as bits. Clues restrict only their own cells here."""
    empty = sum(1 << cell for cell, digit in enumerate(grid.cells) if not digit)
    candidates = [empty] * grid.size
    for cell, digit in enumerate(grid.cells):
        if digit:
            candidates[digit - 1] |= 1 << cell
    return candidates


def _propagate(size: int, candidates: list[int], decided: int, *, hidden: bool) -> _State | None:
    """Place naked and, if ``hidden``, hidden singles until none is left. Changes ``candidates``. None at a contradiction."""
    everywhere, keep = (1 << size * size) - 1, _cells_left(size)
    while True:
        once = twice = thrice = 0  # cells with at least one, two or three candidates
        for mask in candidates:
            thrice |= twice & mask
            twice |= once & mask
            once |= mask
        if once != everywhere:
            return None
        new = once & ~twice & ~decided
        if new:
            decided |= new
            for digit, mask in enumerate(candidates):
                placed = mask & new
                while placed:
                    cell = placed.bit_length() - 1
                    candidates[digit] &= keep[cell]
                    placed ^= 1 << cell
        elif not twice:
            return _State(decided, 0)
        elif not (hidden and _place_hidden(size, candidates, decided)):
            first = twice & ~thrice or thrice
            return _State(decided, first & -first)


def _place_hidden(size: int, candidates: list[int], decided: int) -> bool:
    """If a digit has one place left in a unit, make it the only candidate of that cell. False if there is no such digit."""
    found = False
    for digit, mask in enumerate(candidates):
        if not mask & ~decided:
            continue
        places = 0
        for unit in _unit_masks(size):
            place = mask & unit
            if not place & (place - 1):
                places |= place
        places &= ~decided
        if places:
            found = True
            for other in range(size):
                if other != digit:
                    candidates[other] &= ~places
    return found


def _solutions(size: int, candidates: list[int], rng: np.random.Generator | None = None) -> Iterator[tuple[list[int], int]]:
    """Depth-first search: each solution, as candidates, and the guesses until then. With ``rng``, digits in random order."""
    stack = [(candidates, 0)]
    guesses = -1
    while stack:
        candidates, decided = stack.pop()
        guesses += 1
        state = _propagate(size, candidates, decided, hidden=True)
        if state is None:
            continue
        if not state.branch:
            yield candidates, guesses
            continue
        digits = [digit for digit in reversed(range(size)) if candidates[digit] & state.branch]
        if rng is not None:
            rng.shuffle(digits)
        for digit in digits:
            guess = [mask if other == digit else mask & ~state.branch for other, mask in enumerate(candidates)]
            stack.append((guess, state.decided))
