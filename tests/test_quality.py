"""The quality loss of a conversion: the figures against their definitions, and the command that prints them."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mlx_diffgemma.backends import Piece, Row, load_backend
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.errors import CheckpointError, InputError
from mlx_diffgemma.reports import quality as module
from mlx_diffgemma.reports.quality import Measurement, measure
from mlx_diffgemma.tokenizer import Tokenizer
from support.checkpoints import VOCAB_SIZE, edit_json
from support.comparing import assert_close
from support.converting import SHAPE, contents, converted, refused, run
from support.fake import MODEL, FakeBackend, FakeCache, full
from support.reference import make_checkpoint
from support.tiny_tokenizer import write_tokenizer

CHAT = {**SHAPE, "text_config": {**SHAPE["text_config"], "vocab_size": VOCAB_SIZE}}
LENGTH = 2000  # of the fake's canvas; long enough for shares of noise to be measurable
BOS = 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("bf16"), CHAT, bfloat16=True, logit_std=6.0)
    write_tokenizer(folder, VOCAB_SIZE)
    edit_json(folder / "generation_config.json", max_denoising_steps=6)
    return folder


# --- a backend whose answers are known ---


#: A call for a model's logits: the tokens, whether causal, and whether with self-conditioning.
Question = tuple[NDArray[np.int32], bool, bool]


def knowing(logits: NDArray[np.float32], conditioned: NDArray[np.float32], steps: int, asked: list[Question]) -> FakeBackend:
    """A backend with the same logits [V] everywhere, others with self-conditioning, and entropy 0 after ``steps`` steps."""

    def head(part: Piece | Row) -> NDArray[np.float32]:
        causal, signal = isinstance(part, Piece), getattr(part, "self_conditioning", None)
        tokens = part.tokens if isinstance(part, Piece) else part.canvas
        asked.append((tokens.copy(), causal, signal is not None))
        assert isinstance(part.cache, FakeCache)
        before = len(part.cache) + (len(tokens) if causal else 0)
        assert before == 1 + LENGTH, "the canvas comes after the prefix"
        return np.broadcast_to(conditioned if signal is not None else logits, (len(tokens), MODEL.vocab_size)).copy()

    config = replace(MODEL, canvas_length=LENGTH, max_position_embeddings=10 * LENGTH)
    return FakeBackend(lambda each: full(7, 0.0 if each.step >= steps else 1.0, width=LENGTH), config, head=head)


def known(monkeypatch: pytest.MonkeyPatch, text: NDArray[np.int32]) -> tuple[Measurement, list[list[Question]]]:
    """Measure two backends with known logits. Returns the result and the calls that each received."""
    rng = np.random.default_rng(0)
    answers = rng.normal(0, 3, (2, 2, MODEL.vocab_size)).astype(np.float32)
    asked: list[list[Question]] = []
    loaded: list[weakref.ref[FakeBackend]] = []

    def load(checkpoint: Checkpoint, *, name: str | None, device: str | None, dtype: str | None, **_: Any) -> FakeBackend:
        gc.collect()
        assert all(model() is None for model in loaded), "two models are held at once"
        assert (name, device, dtype) == ("torch", "cpu", "float32")
        asked.append([])
        backend = knowing(*answers[len(loaded)], steps=3 + 4 * len(loaded), asked=asked[-1])
        loaded.append(weakref.ref(backend))
        return backend

    monkeypatch.setattr(module, "load_backend", load)
    config = replace(MODEL, canvas_length=LENGTH, max_position_embeddings=10 * LENGTH)
    checkpoint = Checkpoint(Path("known"), config, GenerationConfig(), {}, {}, {})
    found = measure(checkpoint, checkpoint, text, backend="torch", device="cpu", dtype="float32")
    assert len(loaded) == 2

    p, q = (np.exp(logits.astype(np.float64)) for logits in answers)
    p, q = p / p.sum(axis=-1, keepdims=True), q / q.sum(axis=-1, keepdims=True)
    divergence = (p * np.log(p / q)).sum(axis=-1)
    for one in found.passes:
        assert_close(one.kl, divergence[int(one.self_conditioning)], 1e-6, f"KL at noise {one.noise}")
        expected = answers[0, int(one.self_conditioning)].argmax() == answers[1, int(one.self_conditioning)].argmax()
        assert one.same_argmax == expected
    return found, asked


def test_passes_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    text = np.random.default_rng(1).integers(0, MODEL.vocab_size, 3 * LENGTH, dtype=np.int32)
    found, (first, second) = known(monkeypatch, text)
    assert [(one.noise, one.self_conditioning) for one in found.passes] == [
        (None, False), *((share, conditioned) for share in (0.1, 0.3, 0.5, 0.7, 0.9) for conditioned in (False, True))
    ]  # fmt: skip
    for (tokens, *how), (others, *how_too), one in zip(first, second, found.passes, strict=True):
        np.testing.assert_array_equal(tokens, others, "both models are asked the same")
        assert how == how_too == [one.noise is None, one.self_conditioning]
        right = text[: 1 + LENGTH] if one.noise is None else text[1 + LENGTH : 1 + 2 * LENGTH]
        # a random token is the right one now and then
        share = (tokens != right).mean() / (1 - 1 / MODEL.vocab_size)
        assert_close(share, one.noise or 0.0, 0.04 if one.noise else 0.0, f"share of noise, {one.noise}")
        assert one.positions == len(right), "so few log-probabilities are kept whole"
    assert (found.source_steps, found.target_steps) == ((3,) * 4, (7,) * 4)
    assert (found.prefix_length, found.canvas_length, found.given) == (1 + LENGTH, LENGTH, 1 + 2 * LENGTH)
    assert found.steps() == "Denoising steps per block, mean of 4: 3.0 before, 7.0 after (+133.3%)."


@pytest.mark.parametrize(("given", "used"), [(1, 1), (LENGTH, 1), (LENGTH + 1, LENGTH + 1), (2 * LENGTH, LENGTH + 1)])
def test_the_source_writes_what_the_text_lacks(given: int, used: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = np.random.default_rng(1).integers(8, MODEL.vocab_size, given, dtype=np.int32)
    found, (asked, _) = known(monkeypatch, text)
    expected = np.concatenate([text[:used], np.full(LENGTH + 1, 7)])[: LENGTH + 1]  # the fake writes only sevens
    np.testing.assert_array_equal(asked[0][0], expected)
    assert found.given == used
    assert found.conditions() == (
        f"Text of {1 + 2 * LENGTH} tokens, {1 + 2 * LENGTH - used} of them by the source model itself; fake (none), float32."
    )


def test_what_is_kept_of_a_pass_is_bounded() -> None:
    """At the released model's vocabulary a canvas of 256 has 268 MB of log-probabilities; a quarter of them is kept."""
    length, vocab_size = 256, 262_144
    falling = -np.arange(vocab_size + length, dtype=np.float32)
    falling[:length] = 0.0
    falling[length] = 20.0
    logits = np.lib.stride_tricks.sliding_window_view(falling, vocab_size)[:length]  # the likeliest token at position p is L - p
    kept = module._log_softmax(logits)
    assert kept.shape == (64, vocab_size)
    assert kept.nbytes == module.KEPT_BYTES
    places = length - kept.argmax(axis=-1)
    assert (places[0], places[-1]) == (0, length - 1)
    assert set(np.diff(places)) == {4, 5}, "evenly spaced"


# --- models ---


def test_fewer_bits_are_further_away(source: Path, tmp_path: Path) -> None:
    """And a BF16 copy has no divergence. Both hold in both backends."""
    text = np.random.default_rng(0).integers(0, VOCAB_SIZE, 17, dtype=np.int32)
    for backend in ("mlx", "torch"):
        divergences = []
        for form in ("bf16", "8", "3"):
            settings = [f"--set={part}={form}" for part in ("experts", "embedding", "attention", "mlp", "router")]
            target = tmp_path / form
            if not target.exists():
                converted(source, target, "--recipe=bf16", *settings)
            found = measure(Checkpoint.open(source), Checkpoint.open(target), text, backend=backend)
            assert (found.backend, found.device, found.dtype) == (backend, "cpu", "float32")
            divergences.append(float(np.mean([one.kl for one in found.passes])))
            if form == "bf16":
                assert {(one.kl, one.same_argmax) for one in found.passes} == {(0.0, 1.0)}
                assert found.source_steps == found.target_steps
        print(backend, divergences)
        assert divergences == sorted(divergences)
        assert divergences[-1] > 10 * divergences[1] > 0


def test_the_causal_pass_by_definition(source: Path, tmp_path: Path) -> None:
    target = converted(source, tmp_path / "out", "--set=embedding=4")
    text = np.random.default_rng(0).integers(0, VOCAB_SIZE, 17, dtype=np.int32)
    found = measure(Checkpoint.open(source), Checkpoint.open(target), text, backend="torch").passes[0]
    p, q = (causal_probabilities(folder, text[:9]) for folder in (source, target))
    assert found.positions == 9
    assert_close(found.kl, (p * np.log(p / q)).sum(axis=-1).mean(), 1e-5, "KL of the causal pass")
    assert found.same_argmax == (p.argmax(axis=-1) == q.argmax(axis=-1)).mean()


def causal_probabilities(folder: Path, tokens: NDArray[np.int32]) -> NDArray[np.float64]:
    backend = load_backend(Checkpoint.open(folder), "torch")
    weights = np.exp(backend.logits([Piece(tokens, backend.new_cache())])[0].astype(np.float64))
    return weights / weights.sum(axis=-1, keepdims=True)


# --- the command ---


def test_convert_and_measure(source: Path, tmp_path: Path) -> None:
    plain = converted(source, tmp_path / "plain")
    target = tmp_path / "out"
    result = run(source, target, "--measure", "--backend=torch")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "Text of 17 tokens, 16 of them by the source model itself; torch (cpu), float32."
    assert lines[2].split("  ")[0] == "pass"
    assert [line.split(",")[0].split(" ")[0] for line in lines[3:14]] == ["causal", *["canvas"] * 10]
    assert lines[-1].startswith("Denoising steps per block, mean of 4: ")

    found = measure(Checkpoint.open(source), Checkpoint.open(target), np.array([BOS], np.int32), backend="torch")
    card = (target / "README.md").read_text()
    assert card.startswith((plain / "README.md").read_text())
    for row in found.rows():
        assert f"\n| {' | '.join(row)} |\n" in card
        assert all(cell in result.stdout for cell in row)
    assert found.steps() in card
    assert found.steps() == lines[-1]

    before = contents(target)
    again = run(source, target, "--measure", "--backend=torch")
    assert (again.exit_code, again.stdout) == (0, result.stdout)
    assert contents(target) == before, "a target that exists is measured, and left as it is"


def test_measure_on_a_text(source: Path, tmp_path: Path) -> None:
    target, file = converted(source, tmp_path / "out"), tmp_path / "text"
    file.write_text("The sky is blue, and so is the sea. The sand is not.", encoding="utf-8")
    result = run(source, target, "--measure", "--measure-text", str(file), "--backend=torch")
    assert result.exit_code == 0, result.output
    tokens = np.array([BOS, *Tokenizer.from_folder(source).encode(file.read_text())], np.int32)
    assert len(tokens) >= 17
    found = measure(Checkpoint.open(source), Checkpoint.open(target), tokens, backend="torch")
    assert result.stdout.startswith("Text of 17 tokens; torch (cpu), float32.\n")
    assert all(cell in result.stdout for row in found.rows() for cell in row)


def test_refusals_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"abc\xff")
    target = tmp_path / "out"
    message = f"{binary}: not UTF-8 at byte 3; --measure-text needs plain text"
    refused(run(source, target, "--measure", f"--measure-text={binary}"), InputError, message)
    for option in (f"--measure-text={binary}", "--backend=mlx", "--device=cpu", "--dtype=float32"):
        refused(run(source, target, option), InputError, "are for measuring; add --measure")
    mute = make_checkpoint(tmp_path / "mute", CHAT, bfloat16=True)
    refused(run(mute, target, "--measure"), CheckpointError, "neither tokenizer.json nor tokenizer.model is there")
    assert {path.name for path in tmp_path.iterdir()} == {"binary", "mute"}


def test_refused_pairs() -> None:
    config = replace(MODEL, max_position_embeddings=2 * MODEL.canvas_length)
    one = Checkpoint(Path("one"), config, GenerationConfig(), {}, {}, {})
    other = replace(one, folder=Path("other"), config=replace(config, vocab_size=51))
    tight = replace(one, config=replace(config, max_position_embeddings=MODEL.canvas_length))
    text = np.zeros(1, np.int32)
    with pytest.raises(InputError, match="other is not a conversion of one: the vocabulary or the canvas length differs"):
        measure(one, other, text)
    with pytest.raises(InputError, match="context is too short to measure"):
        measure(tight, tight, text)
    with pytest.raises(InputError, match="token id 50 is outside the vocabulary of 50 tokens"):
        measure(one, one, np.array([50], np.int32))
