"""Training of the demo model: gradients against `transformers`, repeatable runs, and the written files."""

import importlib
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlx_diffgemma.backends import Piece, Row, load_backend
from mlx_diffgemma.backends.torch.cache import Cache, TrainingCache
from mlx_diffgemma.backends.torch.model import Segment, TextModel
from mlx_diffgemma.checkpoint import Checkpoint, graph_name
from mlx_diffgemma.errors import InputError
from support.comparing import assert_close
from support.reference import SHAPES, Reference

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "sudoku"))
objective = importlib.import_module("objective")
solving = importlib.import_module("solving")
training = importlib.import_module("train")

TINY = {"size": 4, "steps": 6, "batch_size": 8, "warmup": 2, "pool": 64, "held_out": 4, "log_every": 1, "evaluate_every": 3}


def random_batch(shape: str, *, self_conditioned: bool) -> Any:
    """Random tokens without padding, because `transformers` does not train the embedding of padding where it is read."""
    vocab_size, length = SHAPES[shape]["text_config"]["vocab_size"], SHAPES[shape]["canvas_length"]
    generator = torch.Generator().manual_seed(3)

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(1, vocab_size, (3, count), generator=generator)

    return objective.Batch(tokens(11), tokens(length), tokens(length), self_conditioned)


def reference_losses(reference: Reference, batch: Any) -> Any:
    """The two losses defined by :func:`objective.losses`, computed with the graph of `transformers`."""
    model, cap = reference.model, reference.model.final_logit_softcapping

    def cross_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return -logits.log_softmax(dim=-1).gather(-1, tokens[..., None]).mean()

    cache, prompt = reference.encode([batch.prompt.numpy()])
    after = {reference.cache_name: cache}
    signal = None
    if batch.self_conditioned:
        with torch.no_grad():
            signal = model(decoder_input_ids=batch.noisy, **after).logits
    canvas = model(decoder_input_ids=batch.noisy, self_conditioning_logits=signal, **after).logits
    solution = model.model.encoder(input_ids=batch.target, **after).last_hidden_state
    causal = cap * torch.tanh(model.lm_head(torch.cat([prompt, solution], dim=1)[:, :-1]) / cap)
    following = torch.cat([batch.prompt, batch.target], dim=1)[:, 1:]
    return objective.Losses(cross_entropy(canvas, batch.target), cross_entropy(causal, following))


@pytest.mark.parametrize("self_conditioned", [False, True])
@pytest.mark.parametrize("shape", ["base", "window_below_canvas"])
def test_gradients(
    shape: str, self_conditioned: bool, checkpoint: Callable[..., Path], reference: Callable[..., Reference]
) -> None:
    oracle = reference(shape)
    model: TextModel = load_backend(Checkpoint.open(checkpoint(shape)), "torch", device="cpu", dtype="float32").model  # type: ignore[attr-defined]
    model.requires_grad_(True)
    oracle.model.zero_grad()
    batch = random_batch(shape, self_conditioned=self_conditioned)
    ours, theirs = objective.losses(model, batch), reference_losses(oracle, batch)
    for name in ("diffusion", "causal"):
        assert_close(getattr(ours, name).item(), getattr(theirs, name).item(), 1e-5, f"{shape}, {name} loss")
    sum(ours).backward()
    sum(theirs).backward()
    parameters = oracle.model.named_parameters(remove_duplicate=False)  # the encoder's are the same tensors
    gradients = {graph_name(name): weight.grad for name, weight in parameters if name.startswith("model.decoder.")}
    compared, worst = 0, 0.0
    for name, weight in model.named_parameters():
        if name.endswith("layer_scalar"):
            continue  # not trained there
        assert weight.grad is not None, f"{name} has no gradient"
        expected = gradients[name]
        norm = expected.norm().item()
        difference = (weight.grad - expected).norm().item()
        if name.startswith("self_conditioning.") and not self_conditioned:
            assert norm == weight.grad.norm().item() == 0, f"{name} has a gradient without a signal"
            continue
        assert norm > 0, f"{name}: its gradient in transformers is 0, so that nothing is compared"
        compared, worst = compared + 1, max(worst, difference / norm)
        assert difference < 1e-4 * norm, f"{name}: gradients differ by {difference / norm:.2e} of their norm"
    print(f"{shape}: {compared} gradients differ by {worst:.2e} of their norm at most")
    assert compared > 20


@torch.no_grad()
@pytest.mark.parametrize("shape", ["base", "window_below_canvas"])
def test_rows_in_training_see_what_a_text_alone_sees(shape: str, checkpoint: Callable[..., Path]) -> None:
    """Two texts, encoded in three pieces each, so that the sliding layers slide."""
    model: TextModel = load_backend(Checkpoint.open(checkpoint(shape)), "torch", device="cpu", dtype="float32").model  # type: ignore[attr-defined]
    texts = torch.randint(1, model.config.vocab_size, (2, 30), generator=torch.Generator().manual_seed(3))
    trained, alone = TrainingCache(model.config, 2), [Cache(model.config) for _ in texts]
    for start, stop in pairwise((0, 7, 20, 30)):
        pieces = texts[:, start:stop]
        ours = model.encode(pieces.flatten(), [Segment(0, pieces.numel(), trained)]).unflatten(0, (2, -1))
        each = [model.encode(piece, [Segment(0, len(piece), cache)]) for piece, cache in zip(pieces, alone, strict=True)]
        assert_close(ours, torch.stack(each), 1e-5, f"{shape}, from token {start} on")


def test_the_canvas_does_not_see_the_solution() -> None:
    """Other solutions change the causal pass's result for the solution, but no input of the canvas."""
    trainer = training.Trainer(training.Options(**TINY))
    batch = objective.make_batch(*trainer.pool, 8, np.random.default_rng(0), "cpu")
    passes = []
    for target in (batch.target, batch.target.flip(0)):
        states: list[torch.Tensor] = []
        hook = trainer.model.norm.register_forward_hook(lambda _, __, out, states=states: states.append(out.detach()))
        objective.losses(trainer.model, objective.Batch(batch.prompt, target, batch.noisy, False))
        hook.remove()
        passes.append(states)
    same = [torch.equal(*states) for states in zip(*passes, strict=True)]
    assert same == [True, True, False], f"prompt, canvas and solution are the same: {same}"


def test_noise_of_a_batch() -> None:
    """Replaced tokens are uniform. t is uniform, so on average half of the canvas is replaced."""
    trainer = training.Trainer(training.Options(**TINY))
    batches = [objective.make_batch(*trainer.pool, 64, np.random.default_rng(seed), "cpu") for seed in range(40)]
    changed = torch.cat([batch.noisy != batch.target for batch in batches]).double()
    share = changed.mean().item() * 16 / 15  # one in 16 is replaced with itself
    spread = changed.mean(dim=1).std().item()
    halves = np.mean([batch.self_conditioned for batch in batches])
    print(f"{share:.3f} of all tokens replaced, {spread:.3f} standard deviation over the rows, {halves:.2f} self-conditioned")
    assert abs(share - 0.5) < 0.02
    assert 0.25 < spread < 0.33, "a uniform t has a standard deviation of 0.29"
    assert 0.25 < halves < 0.75
    for batch in batches:
        answer = batch.target[:, :16].numpy()
        clues = batch.prompt[:, 2:18].numpy()
        assert ((clues == 6) | (clues == answer)).all(), "a puzzle parted from its solution"
        assert (batch.target[:, 16:] == torch.tensor([5, 0, 0, 0])).all()


def curve(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    return lines


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    training.train(folder, training.Trainer(training.Options(**TINY)))
    return folder


def test_the_same_curve_twice(trained: Path, tmp_path: Path) -> None:
    training.train(tmp_path, training.Trainer(training.Options(**TINY)))
    first = curve(trained)
    assert [line["step"] for line in first] == list(range(1, 7))
    assert len({line["diffusion_loss"] for line in first}) == 6, "nothing is learned"
    assert curve(tmp_path) == first
    other = training.Trainer(training.Options(**{**TINY, "seed": 1}))
    assert other.train_step() != (first[0]["diffusion_loss"], first[0]["causal_loss"]), "the seed changes nothing"


def test_resumed_equals_uninterrupted(trained: Path, tmp_path: Path) -> None:
    interrupted = training.Trainer(training.Options(**TINY))
    lines = []
    for line in interrupted.run():
        lines.append(json.dumps(line) + "\n")
        if line["step"] == 3:
            interrupted.save(tmp_path)
        if line["step"] == 5:
            break
    (tmp_path / "curve.jsonl").write_text("".join(lines))
    training.train(tmp_path, training.Trainer.resumed(tmp_path))
    assert curve(tmp_path) == curve(trained)
    for file in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "checkpoint" / file).read_bytes() == (trained / "checkpoint" / file).read_bytes(), file


def test_it_learns() -> None:
    trainer = training.Trainer(training.Options(**{**TINY, "steps": 30, "warmup": 5}))
    losses = np.array([trainer.train_step() for _ in range(30)])
    print(f"diffusion and causal loss: {losses[:3].mean(axis=0)} at first, {losses[-3:].mean(axis=0)} after 30 steps")
    assert (losses[-3:].mean(axis=0) < 0.75 * losses[:3].mean(axis=0)).all()


def test_written_checkpoint(trained: Path, backend_name: str) -> None:
    """Our backends and `transformers` read it and compute the same logits."""
    folder = trained / "checkpoint"
    prompts, canvases = np.random.default_rng(5).integers(0, 16, (2, 2, 20), dtype=np.int32)
    backend = load_backend(Checkpoint.open(folder), backend_name, dtype="float32")
    rows = [Row(canvas, backend.new_cache(), 1.0) for canvas in canvases]
    backend.encode([Piece(prompt, row.cache) for prompt, row in zip(prompts, rows, strict=True)])
    expected = Reference(folder).canvas_logits([prompts], canvases)
    assert_close(np.stack(backend.logits(rows)), expected, 1e-4, f"{backend_name} and transformers")
    assert Checkpoint.open(folder).generation.max_new_tokens == 20


@pytest.mark.parametrize(("wrong", "words"), [({"size": 5}, "4, 6 or 9"), ({"log_every": 2}, "multiple")])
def test_wrong_options(wrong: dict[str, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        training.Options(**{**TINY, **wrong})
