"""The demo's Sudoku: solver, rules, generator, the split into training and held-out puzzles, and the tokenizer."""

import importlib
import itertools
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mlx_diffgemma.demo.sudoku import (
    BOXES,
    EMPTY_TOKEN,
    HIDDEN,
    NAKED,
    SEARCH,
    Grid,
    check,
    count_solutions,
    fresh_puzzle,
    from_tokens,
    grade,
    invariant,
    is_held_out,
    random_grid,
    to_tokens,
    units,
)
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.tokenizer import Tokenizer

# The example's scripts import each other from their own folder.
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "sudoku"))
puzzles = importlib.import_module("puzzles")
vocabulary = importlib.import_module("vocabulary")

SIZES = sorted(BOXES)
CLUES = {4: (5, 9), 6: (11, 22), 9: (27, 45)}

# From Wikipedia, "Sudoku".
WIKIPEDIA = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
WIKIPEDIA_SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
# From Wikipedia, "Sudoku solving algorithms": 17 clues, made hard for counting up; hidden singles solve it.
SPARSE = "..............3.85..1.2.......5.7.....4...1...9.......5......73..2.1........4...9"
SPARSE_SOLUTION = "987654321246173985351928746128537694634892157795461832519286473472319568863745219"
# "AI Escargot" by Arto Inkala, made hard for people.
ESCARGOT = "1....7.9..3..2...8..96..5....53..9...1..8...26....4...3......1..4......7..7...3.."
ESCARGOT_SOLUTION = "162857493534129678789643521475312986913586742628794135356478219241935867897261354"


def slow_solutions(cells: list[int], size: int) -> int:
    """All solutions, by trying every digit in the first empty cell."""
    if 0 not in cells:
        return 1
    cell = cells.index(0)
    height, width = BOXES[size]
    row, column = divmod(cell, size)
    seen = {
        cells[other]
        for other in range(size * size)
        if other // size == row
        or other % size == column
        or (other // size // height, other % size // width) == (row // height, column // width)
    }
    return sum(
        slow_solutions([*cells[:cell], digit, *cells[cell + 1 :]], size) for digit in range(1, size + 1) if digit not in seen
    )


def symmetric_form(cells: tuple[int, ...], size: int, rng: random.Random) -> tuple[int, ...]:
    """A random symmetric form, one elementary move at a time, unlike the vectorised implementation."""
    height, width = BOXES[size]
    rows = [list(cells[start : start + size]) for start in range(0, size * size, size)]

    def shuffle_lines(lines: list[list[int]], band: int) -> list[list[int]]:
        bands = [rng.sample(lines[start : start + band], band) for start in range(0, size, band)]
        return list(itertools.chain.from_iterable(rng.sample(bands, len(bands))))

    rows = shuffle_lines(rows, height)
    rows = [list(row) for row in zip(*shuffle_lines([list(column) for column in zip(*rows, strict=True)], width), strict=True)]
    if height == width and rng.random() < 0.5:
        rows = [list(column) for column in zip(*rows, strict=True)]
    labels = [0, *rng.sample(range(1, size + 1), size)]
    return tuple(labels[digit] for row in rows for digit in row)


def test_solver_counts_every_grid_of_4x4():
    assert count_solutions(Grid((0,) * 16), limit=1000) == 288  # the known number of 4x4 grids


@pytest.mark.parametrize("size", [4, 6])
def test_solver_agrees_with_trying_everything(size):
    rng = np.random.default_rng(size)
    for _ in range(20):
        cells = np.array(random_grid(size, rng).cells)
        cells[rng.random(size * size) < 0.6] = 0
        slow = slow_solutions(cells.tolist(), size)
        fast = count_solutions(Grid(tuple(cells.tolist())), limit=slow + 1)
        assert fast == slow, f"{fast} instead of {slow} solutions of {cells}"


def test_solver_on_published_puzzles():
    for text, solution in ((WIKIPEDIA, WIKIPEDIA_SOLUTION), (SPARSE, SPARSE_SOLUTION), (ESCARGOT, ESCARGOT_SOLUTION)):
        assert count_solutions(Grid.parse(text)) == 1
        assert check(Grid.parse(text), Grid.parse(solution)) == []
        assert count_solutions(Grid.parse("." + solution[1:])) == 1
    assert count_solutions(Grid.parse("55" + "." * 79)) == 0  # the clues contradict each other


def test_units_are_those_of_the_published_solution():
    for size in SIZES:
        assert len(units(size)) == 3 * size
        assert all(len(set(unit.cells)) == size for unit in units(size))
        assert all(sum(cell in unit.cells for unit in units(size)) == 3 for cell in range(size * size))
    assert units(6)[12].cells == (0, 1, 2, 6, 7, 8)  # 2 rows by 3 columns
    assert units(6)[13].name == "box 2"


def test_grades_of_known_puzzles():
    assert grade(Grid.parse("1.34 3412 2143 4321")) == (NAKED, 0)
    assert grade(Grid.parse(WIKIPEDIA)) == (NAKED, 0)
    assert grade(Grid.parse(SPARSE)) == (HIDDEN, 0)
    escargot = grade(Grid.parse(ESCARGOT))
    assert escargot.technique == SEARCH
    assert escargot.guesses > 0
    with pytest.raises(InputError, match="no solution"):
        grade(Grid.parse("55" + "." * 79))


@pytest.mark.parametrize("size", SIZES)
def test_fresh_puzzle_is_unique_held_out_and_by_its_seed(size):
    clues = CLUES[size][0] + 2
    made = [fresh_puzzle(size, clues, seed) for seed in range(3)]
    for puzzle, solution in made:
        assert puzzle.clue_count == clues
        assert count_solutions(puzzle) == 1
        assert check(puzzle, solution) == []
        assert is_held_out(np.array([puzzle.cells], np.int8))[0]
    assert len(set(made)) == 3
    assert made == [fresh_puzzle(size, clues, seed) for seed in range(3)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((5, 9, 0), "4, 6 or 9"), ((4, 16, 0), "1 to 15 clues"), ((4, 5, -1), "0 or more"), ((4, 3, 0), "no held-out 4x4")],
)
def test_fresh_puzzle_refuses(arguments, message):
    with pytest.raises(InputError, match=message):
        fresh_puzzle(*arguments)


@pytest.mark.parametrize("size", SIZES)
def test_made_puzzles_are_unique_within_bounds_and_on_their_side(size):
    low, high = CLUES[size]
    for held_out in (False, True):
        made, solutions = puzzles.make_puzzles(size, 60, (low, high), 5, held_out)
        assert made.shape == solutions.shape == (60, size * size)
        assert made.dtype == solutions.dtype == np.int8
        counts = (made > 0).sum(1)
        assert counts.min() >= low
        assert counts.max() <= high
        assert len(set(counts.tolist())) > 2
        assert (is_held_out(made) == held_out).all()
        for cells, solution in zip(made, solutions, strict=True):
            assert count_solutions(Grid.from_array(cells)) == 1
            assert check(Grid.from_array(cells), Grid.from_array(solution)) == []


def test_made_puzzles_follow_the_seed_and_never_global_state():
    np.random.seed(1)
    first, _ = puzzles.make_puzzles(6, 50, (10, 26), 1, False)
    np.random.seed(2)
    again, _ = puzzles.make_puzzles(6, 50, (10, 26), 1, False)
    longer, _ = puzzles.make_puzzles(6, 300, (10, 26), 1, False)
    other, _ = puzzles.make_puzzles(6, 50, (10, 26), 2, False)
    assert (first == again).all()
    assert (first == longer[:50]).all()
    assert (first != other).any()


def test_made_puzzles_refuse():
    with pytest.raises(InputError, match="exceed"):
        puzzles.make_puzzles(6, 1, (20, 10), 0, False)
    with pytest.raises(InputError, match="no 4x4 puzzle with 2 to 3 clues"):
        puzzles.make_puzzles(4, 1, (2, 3), 0, False)
    with pytest.raises(InputError, match="count"):
        puzzles.make_puzzles(4, -1, (5, 9), 0, False)


@settings(max_examples=60, deadline=None)
@given(size=st.sampled_from(SIZES), seed=st.integers(0, 2**32 - 1))
def test_invariant_is_that_of_every_symmetric_form(size, seed):
    rng, moves = np.random.default_rng(seed), random.Random(seed)
    cells = np.array(random_grid(size, rng).cells)
    cells[rng.random(size * size) < rng.random()] = 0
    forms = [tuple(cells.tolist()), *(symmetric_form(tuple(cells.tolist()), size, moves) for _ in range(5))]
    hashes = invariant(np.array(forms, np.int8))
    assert len(set(hashes.tolist())) == 1, f"{hashes} of {forms}"


def test_invariant_tells_puzzles_apart():
    for size in (6, 9):
        made, _ = puzzles.make_puzzles(size, 2000, CLUES[size], 3, False)
        distinct, hashes = len(np.unique(made, axis=0)), len(np.unique(invariant(made)))
        assert hashes >= 0.995 * distinct, f"{hashes} hashes of {distinct} puzzles of size {size}"
    cells = np.array(Grid.parse(WIKIPEDIA).cells, np.int8)
    moved = cells.copy()
    moved[[0, 2]] = moved[[2, 0]]  # the first clue moves within its row and box
    first, second = invariant(np.stack([cells, moved]))
    assert first != second
    assert invariant(np.empty((0, 81), np.int8)).shape == (0,)


@pytest.mark.parametrize("size", SIZES)
def test_symmetric_forms_stay_puzzles_on_their_side(size):
    made, solutions = puzzles.make_puzzles(size, 100, CLUES[size], 7, False)
    forms, solved = puzzles.random_symmetry(np.random.default_rng(0), made, solutions)
    assert (invariant(forms) == invariant(made)).all()
    assert not is_held_out(forms).any()
    assert (forms != made).any(1).mean() > 0.9
    for cells, solution in zip(forms, solved, strict=True):
        assert count_solutions(Grid.from_array(cells)) == 1
        assert check(Grid.from_array(cells), Grid.from_array(solution)) == []


def test_no_form_of_a_training_puzzle_is_a_held_out_one():
    """4x4 is small enough that both sides would often share a form, if that were possible."""
    rng = np.random.default_rng(0)
    training, _ = puzzles.make_puzzles(4, 3000, (5, 7), 0, False)
    held_out, _ = puzzles.make_puzzles(4, 500, (5, 7), 0, True)
    seen = {form.tobytes() for _ in range(10) for form in puzzles.random_symmetry(rng, training)[0]}
    tested = {form.tobytes() for _ in range(10) for form in puzzles.random_symmetry(rng, held_out)[0]}
    assert not seen & tested
    again = {form.tobytes() for _ in range(10) for form in puzzles.random_symmetry(rng, held_out)[0]}
    assert len(tested & again) > 100  # so puzzles of one side do share forms


def test_symmetries_reach_every_4x4_grid():
    """There are two grids up to symmetry, with 96 and 192 forms. Without transposing, fewer would be reached."""
    rng = np.random.default_rng(0)
    reached = []
    for text, forms in (("1234341221434321", 96), ("1234341223414123", 192)):
        start = np.array([Grid.parse(text).cells], np.int8)
        (moved,) = puzzles.random_symmetry(rng, np.repeat(start, 8000, 0))
        reached.append(np.unique(moved, axis=0))
        assert len(reached[-1]) == forms
    assert len(np.unique(np.concatenate(reached), axis=0)) == 288


def test_check_names_planted_errors():
    puzzle, answer = Grid.parse("1... .... .... ...1"), [1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1]
    assert check(puzzle, Grid(tuple(answer))) == []

    def changed(cell: int, digit: int) -> list[str]:
        return check(puzzle, Grid((*answer[:cell], digit, *answer[cell + 1 :])))

    assert changed(5, 0) == ["row 2, column 2 is empty"]
    assert changed(5, 2) == ["row 2 has 2 2 times", "column 2 has 2 2 times", "box 1 has 2 2 times"]
    assert "row 1, column 1 holds 3, but the clue is 1" in changed(0, 3)
    # A valid solution of another puzzle: each 1 becomes a 2, and each 2 a 1.
    swapped = Grid(tuple({1: 2, 2: 1}.get(digit, digit) for digit in answer))
    assert check(puzzle, swapped) == [
        "row 1, column 1 holds 2, but the clue is 1",
        "row 4, column 4 holds 2, but the clue is 1",
    ]
    with pytest.raises(InputError, match="4x4, but the answer is 9x9"):
        check(puzzle, Grid.parse(WIKIPEDIA_SOLUTION))


@settings(max_examples=50, deadline=None)
@given(cell=st.integers(0, 80), digit=st.integers(0, 9))
def test_check_catches_every_change_of_a_solution(cell, digit):
    solution = Grid.parse(WIKIPEDIA_SOLUTION)
    changed = Grid((*solution.cells[:cell], digit, *solution.cells[cell + 1 :]))
    assert bool(check(Grid.parse(WIKIPEDIA), changed)) == (digit != solution.cells[cell])


def test_grid_reads_and_writes_text():
    grid = Grid.parse("1 2 . 4\n3_00\n\t....\n4 3 2 1\n")
    assert grid.text() == "12.43.......4321"
    assert Grid.parse(grid.text()) == grid
    assert grid.clue_count == 8
    lines = Grid.parse("123456" + "." * 30).render().splitlines()
    assert lines[:2] == ["┌───────┬───────┐", "│ 1 2 3 │ 4 5 6 │"]
    assert lines[3] == "├───────┼───────┤"
    assert len(lines) == 10
    for size in SIZES:
        drawn = Grid((0,) * size**2).render()
        assert len({len(line) for line in drawn.splitlines()}) == 1
        assert drawn.count(".") == size**2
    for text, message in (("12", "not 2"), ("x" * 16, "digits"), ("9" * 16, "1 to 4"), ("²" * 16, "digits")):
        with pytest.raises(InputError, match=message):
            Grid.parse(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    written = tmp_path_factory.mktemp("tokenizer")
    vocabulary.write_tokenizer(written)
    return written


@pytest.mark.parametrize("size", SIZES)
def test_chat_template_renders_the_training_prompt(folder, size):
    tokenizer = Tokenizer.from_folder(folder)
    puzzle = fresh_puzzle(size, CLUES[size][1], 0).clues
    expected = vocabulary.prompt_tokens(np.array([puzzle.cells], np.int8))
    assert expected.dtype == np.int32
    rows = [puzzle.text()[start : start + size] for start in range(0, size * size, size)]
    typed = (
        puzzle.text(),
        "\n".join(rows),
        " ".join(puzzle.text()).replace(".", "0"),
        "\r\n".join(rows).replace(".", "_") + "\n",
    )
    for content in (*typed, [{"type": "text", "text": row} for row in rows]):
        assert tokenizer.chat([{"role": "user", "content": content}]) == expected[0].tolist()


def test_tokens_are_those_of_the_vocabulary(folder):
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.vocab_size == len(vocabulary.VOCABULARY) == 16
    assert [tokenizer.token_id(text) for text in vocabulary.VOCABULARY] == list(range(16))
    assert vocabulary.VOCABULARY[EMPTY_TOKEN] == "."
    names = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert names == (vocabulary.PAD, vocabulary.EOS, vocabulary.BOS)
    assert tokenizer.encode("a1") == [vocabulary.UNKNOWN, EMPTY_TOKEN + 1]


def test_answers_decode_to_their_digits(folder):
    solution = np.array(Grid.parse(WIKIPEDIA_SOLUTION).cells, np.int8)
    tokens = to_tokens(solution)
    assert (from_tokens(tokens, 9) == solution).all()
    answer = [*tokens.tolist(), vocabulary.END_OF_TURN, vocabulary.PAD, vocabulary.PAD]
    assert Tokenizer.from_folder(folder).decode(answer) == WIKIPEDIA_SOLUTION
    # and as another program would read the folder
    assert AutoTokenizer.from_pretrained(folder).decode(answer, skip_special_tokens=True) == WIKIPEDIA_SOLUTION


def test_cells_of_tokens_that_are_no_digit_are_empty():
    everything = np.arange(16, dtype=np.int32).reshape(2, 8)
    assert from_tokens(everything, 9).ravel().tolist() == [0] * 7 + list(range(1, 10))
    assert from_tokens(everything, 4).ravel().tolist() == [0] * 7 + [1, 2, 3, 4, 0, 0, 0, 0, 0]
