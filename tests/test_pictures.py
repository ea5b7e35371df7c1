"""The example that reads Sudokus from pictures: its pictures, its training, and the model in the package on both backends."""

import importlib
import importlib.util
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mlx_diffgemma import load
from mlx_diffgemma.backends import ImageSpan, Piece, load_backend
from mlx_diffgemma.backends.torch.backend import TorchBackend
from mlx_diffgemma.backends.torch.cache import TrainingCache
from mlx_diffgemma.backends.torch.model import Segment
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.demo.sudoku import Grid, check, count_solutions, is_held_out
from mlx_diffgemma.pipeline import DiffusionGemma
from mlx_diffgemma.vision.patches import Patches
from support.comparing import BACKENDS, assert_close

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES / "sudoku"), str(EXAMPLES / "pictures")]
drawing = importlib.import_module("drawing")
reading = importlib.import_module("reading")


def script(name: str) -> ModuleType:
    """A script of the example. The Sudoku's scripts have the same names, so these get others."""
    spec = importlib.util.spec_from_file_location(f"pictures_{name}", EXAMPLES / "pictures" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


training, evaluation = script("train"), script("evaluate")

TINY = {
    "steps": 4,
    "batch_size": 2,
    "warmup": 1,
    "pool": 32,
    "held_out": 2,
    "log_every": 1,
    "evaluate_every": 2,
    "well": 9.0,
    "growth": 0.5,
}

COUNT, LEAST = 12, 10


def test_pictures_follow_their_seed() -> None:
    first, again, other = (reading.fresh_pictures(6, seed) for seed in (5, 5, 6))
    for one, same, different in zip(first.pictures, again.pictures, other.pictures, strict=True):
        assert one.dtype == np.uint8
        assert np.array_equal(one, same)
        assert not np.array_equal(one, different)
    longer = reading.fresh_pictures(7, 5)
    assert all(np.array_equal(*pair) for pair in zip(first.pictures, longer.pictures, strict=False))
    for picture in (*longer.pictures, *other.pictures):
        side, other, channels = picture.shape
        assert (other, channels) == (side, 3)
        assert drawing.SIDES[0] <= side <= drawing.SIDES[1]


def test_fonts_are_legible_and_differ() -> None:
    """No two digits of any two fonts look alike, and every digit has some ink and leaves some paper."""
    glyphs = {
        (font, digit): np.asarray(drawing.glyph(font, digit, 1), np.float64) / 255
        for font in drawing.FONTS
        for digit in range(1, 5)
    }
    shares = {key: mask.mean() for key, mask in glyphs.items()}
    assert min(shares.values()) > 0.04, shares
    assert max(shares.values()) < 0.5, shares
    distances = {(one, two): np.abs(glyphs[one] - glyphs[two]).mean() for one in glyphs for two in glyphs if one < two}
    nearest = min(distances, key=lambda pair: distances[pair])
    print(f"nearest: {nearest}, {distances[nearest]:.3f} of the area differs")
    assert distances[nearest] > 0.01


@pytest.mark.parametrize("variety", [0.0, 1.0])
def test_digits_stand_in_their_cells(variety: float) -> None:
    """Without lines and noise, ink is in the cells with clues and nowhere else, and it stands out."""
    clues = np.array([1, 0, 0, 4, 0, 2, 0, 0, 0, 0, 3, 0, 4, 0, 0, 1], np.int8)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        look = drawing.random_look(rng, variety=variety)
        plain = replace(look, rules=look.paper, noise=0.0, angle=0.0)
        contrast = np.abs(drawing.draw(clues, plain, rng).astype(np.float64) - look.paper).mean(axis=-1)
        cell = look.grid / drawing.SIZE
        found = []
        for index in range(16):
            row, column = divmod(index, drawing.SIZE)
            top, left = look.top + row * cell, look.left + column * cell
            found.append(
                contrast[int(top + 0.1 * cell) : int(top + 0.9 * cell), int(left + 0.1 * cell) : int(left + 0.9 * cell)].max()
            )
        assert ((np.array(found) > 0.6 * drawing.CONTRAST) == (clues > 0)).all(), f"seed {seed}: {np.round(found)}"


def test_without_variety_pictures_are_alike() -> None:
    clues = np.eye(4, dtype=np.int8).ravel()
    looks = [drawing.random_look(np.random.default_rng(seed), variety=0.0) for seed in range(3)]
    sizes = {drawing.draw(clues, look, np.random.default_rng(9)).tobytes() for look in looks}
    assert len(sizes) == 1


def test_puzzles_have_one_solution_and_are_new() -> None:
    fresh = reading.fresh_pictures(40, 3)
    assert is_held_out(fresh.clues).all()
    for clues, solution in zip(fresh.clues, fresh.solutions, strict=True):
        assert count_solutions(Grid.from_array(clues)) == 1
        assert check(Grid.from_array(clues), Grid.from_array(solution)) == []
    pool, _ = training.Trainer(training.Options(**TINY)).pool
    assert not is_held_out(pool).any()


def test_right_and_wrong_canvases() -> None:
    fresh = reading.fresh_pictures(4, 3)
    tokens = reading.canvas_tokens(fresh.clues, fresh.solutions)
    assert np.concatenate(reading.is_right(tokens, fresh)).all()
    wrong = tokens.copy()
    wrong[0, 3] += 1  # a clue
    wrong[1, 20] += 1  # a cell of the solution
    wrong[2, 35] += 1  # padding
    read, solved = reading.is_right(wrong, fresh)
    assert read.tolist() == [False, True, True, True]
    assert solved.tolist() == [True, False, True, True]


def test_variety_grows_when_the_model_reads_well() -> None:
    trainer = training.Trainer(training.Options(**{**TINY, "well": 0.5, "growth": 0.3}))
    seen = []
    for causal in (*[2.0] * 5, *[0.1] * 100):
        trainer.follow(1.0, causal)
        seen.append(trainer.pace["variety"])
    grown = np.diff([0.0, *seen]) > 0
    first = int(grown.argmax())
    print(f"first grown after {first - 4} good steps")
    assert 5 < first < 100
    assert np.allclose(seen[first : first + 4], [0.3, 0.6, 0.9, 1.0])
    assert set(seen[first + 4 :]) == {1.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    training.train(folder, training.Trainer(training.Options(**TINY)))
    return folder


def test_training_lowers_the_loss_and_reaches_the_tower() -> None:
    trainer = training.Trainer(training.Options(**{**TINY, "steps": 24, "batch_size": 4, "warmup": 3}))
    before = {name: weight.detach().clone() for name, weight in trainer.vision.named_parameters()}
    losses = np.array([trainer.train_step() for _ in range(24)])
    print(f"diffusion and causal loss: {losses[:3].mean(axis=0)} at first, {losses[-3:].mean(axis=0)} after 24 steps")
    assert (losses[-3:].mean(axis=0) < 0.85 * losses[:3].mean(axis=0)).all()
    still = [name for name, weight in trainer.vision.named_parameters() if torch.equal(weight, before[name])]
    assert not still, f"not trained: {still}"


def test_resumed_equals_uninterrupted(trained: Path, tmp_path: Path) -> None:
    interrupted = training.Trainer(training.Options(**TINY))
    for line in interrupted.run():
        if line["step"] == 2:
            break
    interrupted.save(tmp_path)
    training.train(tmp_path, training.Trainer.resumed(tmp_path))
    for file in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "checkpoint" / file).read_bytes() == (trained / "checkpoint" / file).read_bytes(), file


@torch.no_grad()
def test_rows_in_training_see_what_a_text_alone_sees(trained: Path) -> None:
    """Prompts with an image each, in one pass of the trainer and one by one through the backend."""
    trainer = training.Trainer.resumed(trained)
    batch = trainer.make_batch(np.random.default_rng(4))
    model, count = trainer.model, len(batch.prompt)
    features = trainer.vision(batch.images.pixels, batch.images.places, batch.images.rows)
    cache = TrainingCache(model.config, count)
    segment = Segment(0, batch.prompt.numel(), cache, [(reading.IMAGE_START, features)])
    model.encode(batch.prompt.flatten(), [segment])
    together = model.head(cache.last)
    backend = TorchBackend(model, trainer.vision, torch.device("cpu"), "float32")
    for index in range(count):
        pixels = (batch.images.pixels[index].numpy() * 255).round().astype(np.uint8)
        rows, columns = batch.images.rows, len(pixels) // batch.images.rows
        [seen] = backend.see([Patches(pixels, rows, columns, features.shape[1])])
        alone = backend.new_cache()
        backend.encode([Piece(batch.prompt[index].numpy().astype(np.int32), alone, (ImageSpan(reading.IMAGE_START, seen),))])
        assert_close(together[index], backend.next_logits([alone])[0], 1e-4, f"row {index}")


def test_the_prompt_of_training_is_that_of_the_package(trained: Path) -> None:
    checkpoint = Checkpoint.open(trained / "checkpoint")
    model = DiffusionGemma(checkpoint, loader=lambda: load_backend(checkpoint, "torch"))
    for picture in reading.fresh_pictures(4, 8).pictures:
        soft = reading.patches_of(picture, checkpoint.config.vision).soft_tokens
        for prompt in (reading.PROMPT, "What is in this grid?"):
            ids = model.prompt_ids(prompt, images=[Image.fromarray(picture)])
            assert ids.tolist() == reading.prompt_tokens(soft).tolist()
    text = "1..4.3.......2.1=1234341243212143"
    assert model.tokenizer.decode([*model.tokenizer.encode(text), model.tokenizer.end_of_turn_id]) == text


@cache
def answers(backend_name: str) -> Any:
    model = load("pictures", backend=backend_name, device="cpu", dtype="float32")
    return evaluation.answer(model, reading.fresh_pictures(COUNT, 77))


def test_it_reads_and_solves_fresh_pictures(backend_name: str) -> None:
    found = answers(backend_name)
    print(f"{backend_name}: {found.read.sum()} of {COUNT} read, {found.solved.sum()} solved, {found.steps.mean():.1f} steps")
    assert found.read.sum() >= LEAST
    assert found.solved.sum() >= LEAST


def test_the_same_tokens_on_all_backends() -> None:
    share = evaluation.agreement({name: answers(name) for name in BACKENDS})
    print(f"{share:.0%} of the pictures have the same tokens in the same number of steps")
    assert share == 1


def test_in_four_bits(tmp_path: Path, backend_name: str) -> None:
    model = load(evaluation.converted("pictures", "4bit", tmp_path), backend=backend_name, device="cpu", dtype="float32")
    found = evaluation.answer(model, reading.fresh_pictures(COUNT, 77))
    print(f"{backend_name}: {found.read.sum()} of {COUNT} read right, {found.solved.sum()} solved in 4 bits")
    assert found.read.sum() >= LEAST
