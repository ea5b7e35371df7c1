"""The model in the package: it solves puzzles it has never seen, with the same tokens on both backends."""

import importlib
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_diffgemma.backends import Piece, load_backend
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.demo.sudoku import Grid, check, fresh_puzzle, from_tokens, is_held_out, to_tokens
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.hub import BOXED, local_folder
from mlx_diffgemma.pipeline import load
from mlx_diffgemma.sampler import FREE
from support.comparing import BACKENDS
from support.reference import Reference

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "sudoku"))
evaluation = importlib.import_module("evaluate")
make_puzzles = importlib.import_module("puzzles").make_puzzles
solving = importlib.import_module("solving")
vocabulary = importlib.import_module("vocabulary")

COUNT, LEAST = 20, 18


@cache
def solved(backend_name: str) -> Any:
    """20 held-out puzzles with 14 to 26 clues."""
    checkpoint = Checkpoint.open("sudoku")
    backend = load_backend(checkpoint, backend_name, device="cpu", dtype="float32")
    return solving.solve(backend, *held_out(), checkpoint.generation, keep_drafts=True)


@cache
def held_out() -> tuple[np.ndarray, np.ndarray]:
    puzzles, solutions = make_puzzles(6, COUNT, (14, 26), seed=77, held_out=True)
    assert is_held_out(puzzles).all()
    return puzzles, solutions


def test_it_solves_held_out_puzzles(backend_name: str) -> None:
    result = solved(backend_name)
    print(f"{backend_name}: {result.solved.sum()} of {COUNT} solved in {result.steps.mean():.1f} denoising steps")
    assert result.solved.sum() >= LEAST
    assert result.steps.mean() < result.new_tokens.mean() / 2, "it takes as many steps as one token at a time would"
    assert (result.tokens[:, 36:] == [5, 0, 0, 0]).all(), "the end of the turn and the padding"


def test_the_same_tokens_on_all_backends() -> None:
    share = evaluation.agreement([solved(name) for name in BACKENDS])
    print(f"{share:.0%} of the puzzles have the same tokens in the same number of steps")
    assert share == 1


def test_each_puzzle_has_a_template_of_its_own(backend_name: str) -> None:
    """Several puzzles with frozen clues in one pass: each result is the same as alone."""
    puzzles, solutions = (grids[:6] for grids in held_out())
    checkpoint = Checkpoint.open("sudoku")
    backend = load_backend(checkpoint, backend_name, device="cpu", dtype="float32")
    templates = np.where(puzzles > 0, to_tokens(puzzles), FREE).astype(np.int32)
    together = solving.solve(backend, puzzles, solutions, checkpoint.generation, frozen=templates)
    assert (from_tokens(together.tokens[:, :36], 6) == puzzles)[puzzles > 0].all()
    for index in range(6):
        row = slice(index, index + 1)
        alone = solving.solve(backend, puzzles[row], solutions[row], checkpoint.generation, seed=index, frozen=templates[row])
        assert (alone.tokens == together.tokens[row]).all()
        assert (alone.steps == together.steps[row]).all()


def test_transformers_writes_the_same() -> None:
    checkpoint, rows = Checkpoint.open("sudoku"), 8
    prompts = vocabulary.prompt_tokens(held_out()[0][:rows])
    config = checkpoint.generation.replace(max_new_tokens=checkpoint.config.canvas_length)
    expected = Reference(checkpoint.folder).generate(prompts, range(rows), config)
    result = solved(BACKENDS[0])
    same = (result.tokens[:rows] == expected.tokens).all(axis=1) & (result.steps[:rows] == expected.steps[0])
    print(f"{same.sum()} of {rows} puzzles have the same tokens in the same number of steps")
    assert same.all()


def test_causal_mode(backend_name: str) -> None:
    """Causal mode solves a puzzle exactly when each token of the solution is the likeliest after those before it."""
    puzzles, solutions = held_out()
    backend = load_backend(Checkpoint.open("sudoku"), backend_name, device="cpu", dtype="float32")
    found = evaluation.causal(backend, puzzles, solutions)
    texts = np.concatenate([vocabulary.prompt_tokens(puzzles), solving.canvas_tokens(solutions)], axis=1)
    logits = np.stack(backend.logits([Piece(text, backend.new_cache()) for text in texts]))
    right = logits[:, 39:75].argmax(axis=-1) == texts[:, 40:76]  # the 36 cells follow 40 tokens of prompt
    print(f"{backend_name}: {found}, {right.mean():.1%} of the cells are the likeliest")
    assert found["solve_rate"] == right.all(axis=1).mean()
    assert 0 < found["loss"] < 0.3


def test_self_correction_adds_up() -> None:
    found = evaluation.self_correction(solved(BACKENDS[0]), *held_out())
    print(found)
    assert found["empty_cells"] == (held_out()[0] == 0).sum()
    assert found["taken_back_and_right"] <= found["taken_back"] <= found["empty_cells"]
    # A cell that ends right, but was once accepted wrong, was taken back.
    assert found["taken_back_and_right"] <= found["wrong_when_accepted"]


def test_the_puzzle_as_text(backend_name: str) -> None:
    model = load("sudoku", backend=backend_name, device="cpu", dtype="float32")
    puzzle = fresh_puzzle(6, 20, seed=4)
    answer = model.generate(puzzle.clues.text(), seed=1)
    assert check(puzzle.clues, Grid.parse(answer.text)) == []
    assert answer.finish_reason == "stop"
    assert answer.statistics.new_tokens == 37
    rows = "\n".join(puzzle.clues.text()[row : row + 6] for row in range(0, 36, 6))
    assert model.generate(rows, seed=1).tokens == answer.tokens, "a grid typed in rows reads as another"


@pytest.mark.parametrize("name", BOXED)
def test_size(name: str) -> None:
    folder = local_folder(name)
    assert folder is not None
    nbytes = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: {nbytes / 1e6:.2f} MB")
    assert nbytes < 4e6


def test_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bare name always means the package's model. A path is always a path."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        local_folder("./sudoku")
    (tmp_path / "sudoku").mkdir()
    assert local_folder("./sudoku") == Path("sudoku")
    boxed = local_folder("sudoku")
    assert boxed is not None
    assert (boxed / "model.safetensors").exists()


def test_a_stream_that_several_threads_read(backend_name: str) -> None:
    """A server may take each event of a stream in another thread of a pool."""
    model = load("sudoku", backend=backend_name, device="cpu", dtype="float32")
    clues, found = fresh_puzzle(6, 12, seed=3).clues.text(), list[Any]()
    stream = model.stream(clues, seed=1)
    while not found or found[-1] is not None:
        reader = threading.Thread(target=lambda: found.append(next(stream, None)))
        reader.start()
        reader.join()
        assert len(found) < 200
    assert found[-2].tokens == model.generate(clues, seed=1).tokens
