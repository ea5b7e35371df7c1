"""The demo: its output on a terminal and as lines, and its exit status. The model is a fake."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from mlx_diffgemma.cli import demo
from mlx_diffgemma.cli.live import SETTLED, TAKEN_BACK, UNSETTLED
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.demo import sudoku
from mlx_diffgemma.demo.sudoku import Grid
from support.fake import MODEL, Answer, Asked, FakeBackend, full
from support.screen import Screen

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "sudoku"))
from vocabulary import prompt_tokens

CLUES, SEED = 6, 1
PUZZLE = sudoku.fresh_puzzle(4, CLUES, SEED)
FREE = [cell for cell, clue in enumerate(PUZZLE.clues.cells) if not clue]
STEPS = len(FREE)
CONFIG = GenerationConfig()
BOLD, GREEN, DIM, TAKEN = "1", "32", "2", "4;33"


def next_digit(grid: Grid, cell: int) -> Grid:
    """The grid with a different digit in one cell."""
    digits = list(grid.cells)
    digits[cell] = digits[cell] % 4 + 1
    return Grid(tuple(digits))


WRONG = next_digit(PUZZLE.solution, FREE[-1])


def fake(answer: Grid) -> FakeBackend:
    """A backend that converges on ``answer``. In step s all free cells but the first s are uncertain; in steps 1 and 2 the
    first is wrong."""

    def script(asked: Asked) -> Answer:
        grid = next_digit(answer, FREE[0]) if asked.step <= 2 else answer
        entropy = np.zeros(16, np.float32)
        entropy[FREE[asked.step :]] = 1.2
        return full(sudoku.to_tokens(np.array(grid.cells, np.int8)), entropy, width=16)

    return FakeBackend(script, replace(MODEL, canvas_length=16, vocab_size=16))


def run(monkeypatch: pytest.MonkeyPatch, answer: Grid, *options: str) -> Result:
    """Run the command with a given checkpoint and backend."""
    checkpoint = SimpleNamespace(config=fake(answer).config, generation=CONFIG)
    monkeypatch.setattr(demo, "Checkpoint", SimpleNamespace(open=lambda source: checkpoint))
    monkeypatch.setattr(demo, "load_backend", lambda opened, name: fake(answer))
    return CliRunner().invoke(demo.demo, [*options], catch_exceptions=False)


def test_solved_in_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, PUZZLE.solution, "--seed", str(SEED), "--clues", str(CLUES))
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert lines[0] == f"A 4x4 Sudoku with {CLUES} clues, new to the model; seed {SEED}."
    assert "\n".join(lines[1:8]) == PUZZLE.clues.render()
    steps = lines[8 : 8 + STEPS]
    assert [line.split()[:2] for line in steps] == [["step", str(step)] for step in range(1, STEPS + 1)]
    assert steps[0] == "step  1  entropy 0.675  settled 0 of 16  taken back 0  tokens per forward 0.0"
    assert steps[2] == "step  3  entropy 0.525  settled 9 of 16  taken back 1  tokens per forward 3.0"
    assert "\n".join(lines[8 + STEPS : 15 + STEPS]) == PUZZLE.solution.render()
    assert lines[15 + STEPS :] == [
        f"Solved, no rule broken: {STEPS} steps, {16 / STEPS:.1f} cells per forward.",
        "Cells taken back after being accepted: 1; right in the end: 1.",
    ]
    assert f"mlx-diffgemma demo --seed {SEED} --clues {CLUES}" in result.stderr
    assert "\x1b" not in result.output


def test_not_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, WRONG, "--seed", str(SEED))
    assert result.exit_code == 1
    violations = sudoku.check(PUZZLE.clues, WRONG)
    assert len(violations) == 3
    assert f"Not solved: {STEPS} steps, {16 / STEPS:.1f} cells per forward. {'; '.join(violations)}." in result.stdout


def test_a_clue_that_is_changed_is_not_a_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    relabelled = Grid(tuple(digit % 4 + 1 for digit in PUZZLE.solution.cells))
    assert not sudoku.check(Grid((0,) * 16), relabelled), "a valid grid, of another puzzle"
    result = run(monkeypatch, relabelled, "--seed", str(SEED))
    assert result.exit_code == 1
    assert f"; and {CLUES - 3} more." in result.stdout


def test_what_was_taken_back_and_not_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, next_digit(PUZZLE.solution, FREE[0]), "--seed", str(SEED))
    assert result.exit_code == 1
    assert result.stdout.endswith("Cells taken back after being accepted: 1; right in the end: 0.\n")


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        ((3, 3, UNSETTLED, 0.9), ("3", "bold")),
        ((3, 2, SETTLED, 0.0), ("2", "green")),  # a clue that the model changes
        ((0, 2, SETTLED, 0.9), ("2", "green")),
        ((0, 2, UNSETTLED, 0.09), ("2", "")),
        ((0, 2, UNSETTLED, 0.4), ("2", "dim")),
        ((0, 2, UNSETTLED, 0.6), ("·", "dim")),
        ((3, 3, TAKEN_BACK, 0.6), ("3", "yellow underline")),
        ((0, 0, SETTLED, 0.0), ("?", "green")),
    ],
)
def test_how_a_cell_is_shown(cell: tuple[int, int, int, float], shown: tuple[str, str]) -> None:
    assert demo.show_cell(*cell) == shown


def test_each_run_is_another_puzzle(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (run(monkeypatch, PUZZLE.solution).stdout.splitlines() for _ in range(2))
    assert first[0] != second[0]
    seed = first[0].split()[-1].rstrip(".")
    assert run(monkeypatch, PUZZLE.solution, "--seed", seed).stdout.splitlines()[:8] == first[:8]


def test_impossible_clues_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(sudoku.InputError, match="1 to 15 clues"):
        run(monkeypatch, PUZZLE.solution, "--clues", "16")


def test_the_prompt_is_that_of_training() -> None:
    backend = fake(PUZZLE.solution)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(click, "echo", lambda text: None)
        demo.solve(backend, CONFIG, PUZZLE, 0, None)
    assert backend.tokens_of("encode") == [prompt_tokens(np.array([PUZZLE.clues.cells], np.int8)).tolist()]


def test_cells_by_what_is_known_of_them() -> None:
    """Step 3 of the fake: one cell was just taken back, three are settled (one uncertain but accepted), the rest are open."""
    screen, seen = Screen(80, 30), []

    def digits(style: str) -> str:
        return "".join(character for character in screen.styled(style) if character.isdecimal())

    def look(seconds: float) -> None:
        seen.append((digits(BOLD), digits(TAKEN), digits(GREEN), screen.styled(DIM).count("·"), screen.lines[-2:]))

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(demo.time, "sleep", look)
        monkeypatch.setattr(click, "echo", lambda text: screen.write(f"{text}\n"))
        assert demo.solve(fake(PUZZLE.solution), CONFIG, PUZZLE, 0, screen.console())
    given, taken_back, settled, dots, below = seen[2]
    solution = PUZZLE.solution.cells
    assert given == "".join(str(clue) for clue in PUZZLE.clues.cells if clue)
    assert taken_back == str(solution[FREE[0]])
    assert settled == "".join(str(solution[cell]) for cell in FREE[1:4])
    assert dots == len(FREE) - 4
    assert below == [
        "given  settled  likely  in doubt  taken back",
        "step  3  entropy 0.525  settled 9 of 16  taken back 1  tokens per forward 3.0",
    ]
    assert "\n".join(screen.lines[:7]) == PUZZLE.solution.render(), "more than the grid is left of the picture"
    assert digits(TAKEN) == taken_back, "what was taken back is no longer marked in the end"
    assert screen.lines[7].startswith("Solved")
    assert len(screen.lines) == 9
    assert not screen.cursor_hidden


@pytest.mark.parametrize("size", [(80, 24), (40, 12), (24, 5), (12, 3), (5, 1)])
def test_small_screens(size: tuple[int, int]) -> None:
    screen = Screen(*size)

    def look(seconds: float) -> None:
        assert max(map(len, screen.rows)) <= size[0]
        assert len(screen.rows) <= size[1], "the picture has scrolled the screen"
        assert (screen.lines[-1][-1] == "…") == (size[0] < 78)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(demo.time, "sleep", look)
        monkeypatch.setattr(click, "echo", lambda text: None)
        demo.solve(fake(PUZZLE.solution), CONFIG, PUZZLE, 0, screen.console())
    grid = PUZZLE.solution.render().splitlines()
    assert screen.lines == [line[: size[0]].rstrip() for line in grid]


def test_interrupted() -> None:
    screen = Screen(80, 30)
    backend = fake(PUZZLE.solution)

    def pressed(seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(demo.time, "sleep", pressed)
        with pytest.raises(KeyboardInterrupt):
            demo.solve(backend, CONFIG, PUZZLE, 0, screen.console())
    assert screen.lines == []
    assert not screen.cursor_hidden
    assert screen.wraps
    assert len(backend.asked) == 1, "it went on computing"
