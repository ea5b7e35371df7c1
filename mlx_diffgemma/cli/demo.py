"""``mlx-diffgemma demo``: shows the Sudoku model of this package solving a new puzzle."""

import secrets
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from math import log

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from mlx_diffgemma.backends import NAMES, Backend, find_place, load_backend
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.cli.live import SETTLED, STATUS_STYLE, TAKEN_BACK, Region, Settling, cut, live_console
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.demo import sudoku
from mlx_diffgemma.demo.sudoku import Grid, Puzzle
from mlx_diffgemma.sampler import Draft, block_diffusion
from mlx_diffgemma.sampler import Text as SampledText

MODEL = "sudoku"

#: Default number of clues, by the size of the grid.
CLUES = {4: 6, 6: 12, 9: 30}

#: Seconds that each step is shown.
PAUSE = 0.15

#: Shares of the maximum entropy. A cell above DOT is shown as a dot, and a cell up to LIKELY as likely.
DOT, LIKELY = 0.5, 0.1

# Must be readable without colour, too.
_STYLES = {"given": "bold", "settled": "green", "likely": "", "in doubt": "dim", "taken back": "yellow underline"}

# Tokens that the model's chat template puts around the cells: <bos><|turn> and <turn|><|turn>.
_BEFORE, _AFTER = (2, 4), (5, 4)

#: A character, and its style.
Cell = tuple[str, str]


@click.command(short_help="Watch the tiny model of this package solve a Sudoku.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    metavar="N",
    help="Seed of the puzzle and the sampler; the same seed gives the same run.  [default: a new one each time]",
)
@click.option(
    "--clues", type=int, metavar="N", help=f"Number of given cells; fewer make a harder puzzle.  [default: {CLUES[6]} of 36]"
)
@click.option(
    "--backend",
    type=click.Choice(NAMES),
    help="Framework that runs the model.  [default: mlx on Apple silicon; elsewhere torch if installed, else mlx]",
)
@click.option("--no-live", is_flag=True, help="Print a line per step instead of redrawing the grid.")
@click.pass_context
def demo(context: click.Context, seed: int | None, clues: int | None, backend: str | None, no_live: bool) -> None:
    """Make a new Sudoku and let the tiny model that comes with this package solve it.

    In training, the model saw no symmetric form of the puzzle. It writes all cells at once and denoises them step by step; cells
    that it accepted may be taken back. The answer is checked against the rules of Sudoku. The exit status is 0 if it is right,
    and 1 if it is wrong.
    """
    find_place(backend)
    checkpoint = Checkpoint.open(MODEL)
    size = board_size(checkpoint.config.canvas_length)
    seed = secrets.randbits(32) if seed is None else seed
    puzzle = sudoku.fresh_puzzle(size, CLUES[size] if clues is None else clues, seed)
    click.echo(f"A {size}x{size} Sudoku with {puzzle.clues.clue_count} clues, new to the model; seed {seed}.")
    console = None if no_live else live_console()
    solved = solve(load_backend(checkpoint, backend), checkpoint.generation, puzzle, seed, console)
    click.echo(
        f"The same again:  mlx-diffgemma demo --seed {seed} --clues {puzzle.clues.clue_count}\n"
        f"As plain text:   mlx-diffgemma generate {MODEL} {puzzle.clues.text()}\n"
        'The real model:  mlx-diffgemma generate google/diffusiongemma-26B-A4B-it "Why is the sky blue?"',
        err=True,
    )
    context.exit(0 if solved else 1)


def board_size(canvas_length: int) -> int:
    """Size of the largest grid whose cells fit into a canvas of this length."""
    return max(size for size in sudoku.BOXES if size * size <= canvas_length)


def prompt_tokens(clues: Grid) -> NDArray[np.int32]:
    """Token ids [cells + 4] of a chat whose only turn is the puzzle. The tokenizer is not used: importing it takes a second."""
    return np.array([*_BEFORE, *sudoku.to_tokens(np.array(clues.cells, np.int8)), *_AFTER], np.int32)


def solve(backend: Backend, generation: GenerationConfig, puzzle: Puzzle, seed: int, console: Console | None) -> bool:
    """Let the model solve a puzzle in one canvas. Show the steps on ``console``, or as lines if None. True if it is solved."""
    clues, settling, steps = puzzle.clues, Settling(), 0
    config = generation.replace(max_new_tokens=backend.config.canvas_length)
    if not console:
        click.echo(clues.render())
    with Region(console) if console else nullcontext() as region:
        for event in block_diffusion(backend, SampledText(prompt_tokens(clues), seed), config):
            if not isinstance(event, Draft):
                answer, steps = _read(event.tokens, clues.size), event.steps
                continue
            states = settling.update(event)[: len(clues.cells)]
            status = _status(event, states)
            if region:
                region.draw(_picture(_cells(clues, event, states), clues.size, status, region.console.size))
                time.sleep(PAUSE)
            else:
                click.echo(status)
    taken_back = settling.taken_back[: len(clues.cells)]
    if console:
        console.print(_ruled(_finished(clues, answer, taken_back), clues.size), no_wrap=True, overflow="crop")
    else:
        click.echo(answer.render())
    violations = sudoku.check(clues, answer)
    click.echo(_verdict(violations, steps, len(clues.cells)))
    click.echo(_mended(taken_back, answer, puzzle.solution))
    return not violations


def _read(tokens: NDArray[np.int32], size: int) -> Grid:
    return Grid.from_array(sudoku.from_tokens(tokens[: size * size], size))


def _status(draft: Draft, states: NDArray[np.int64]) -> str:
    settled, taken_back = int((states == SETTLED).sum()), int((states == TAKEN_BACK).sum())
    entropy = draft.entropy[: len(states)].mean()
    return (
        f"step {draft.step:2}  entropy {entropy:.3f}  settled {settled} of {len(states)}  taken back {taken_back}  "
        f"tokens per forward {settled / draft.step:.1f}"
    )


def _cells(clues: Grid, draft: Draft, states: NDArray[np.int64]) -> list[Cell]:
    """The most likely digits, styled by how sure the model is."""
    digits = _read(draft.argmax, clues.size).cells
    doubt = draft.entropy / log(clues.size)
    return [show_cell(*each) for each in zip(clues.cells, digits, states.tolist(), doubt.tolist(), strict=False)]


def show_cell(clue: int, digit: int, state: int, doubt: float) -> Cell:
    """The character and style of a cell.

    Args:
        clue: the given digit, 0 in an empty cell.
        digit: the digit that the model writes, 0 if its token is not a digit.
        state: state of the canvas position, see :class:`~mlx_diffgemma.cli.live.Settling`.
        doubt: entropy as a share of its maximum, 0 to 1.
    """
    character = str(digit or "?")
    if state == TAKEN_BACK:
        return character, _STYLES["taken back"]
    if clue and clue == digit:
        return character, _STYLES["given"]
    if state == SETTLED:
        return character, _STYLES["settled"]
    if doubt > DOT:
        return "·", _STYLES["in doubt"]
    return character, _STYLES["in doubt" if doubt > LIKELY else "likely"]


def _finished(clues: Grid, answer: Grid, taken_back: NDArray[np.bool_]) -> list[Cell]:
    states = np.where(taken_back, TAKEN_BACK, SETTLED).tolist()
    return [show_cell(*each, 0.0) for each in zip(clues.cells, answer.cells, states, strict=True)]


def _ruled(cells: Iterable[Cell], size: int) -> Text:
    """The grid in colour, with lines around its boxes."""
    text, each = Text(), iter(cells)
    for character in Grid((0,) * size * size).render():
        text.append(*(next(each) if character == "." else (character, "dim")))
    return text


def _picture(cells: Sequence[Cell], size: int, status: str, screen: tuple[int, int]) -> list[Text]:
    """The grid, a legend of its styles, and the status. A low screen gets no legend and no horizontal rules, then fewer rows."""
    width, height = screen
    rows = list(_ruled(cells, size).split("\n"))
    legend = [Text("  ").join(Text(name, style) for name, style in _STYLES.items())]
    if len(rows) + 2 > height:
        rows, legend = [row for row in rows if row.plain[0] == "│"], []
    return [cut(line, width) for line in [*rows[: height - 1], *legend, Text(status, STATUS_STYLE)]]


def _verdict(violations: Sequence[str], steps: int, cells: int) -> str:
    took = f"{steps} steps, {cells / steps:.1f} cells per forward"
    if not violations:
        return f"Solved, no rule broken: {took}."
    more = f"; and {len(violations) - 3} more" if len(violations) > 3 else ""
    return f"Not solved: {took}. {'; '.join(violations[:3])}{more}."


def _mended(taken_back: NDArray[np.bool_], answer: Grid, solution: Grid) -> str:
    if not taken_back.any():
        return "No cell was taken back after being accepted."
    mended = int((taken_back & (np.array(answer.cells) == np.array(solution.cells))).sum())
    return f"Cells taken back after being accepted: {taken_back.sum()}; right in the end: {mended}."
