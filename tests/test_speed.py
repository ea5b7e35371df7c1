"""The benchmark: what it counts, what it leaves out, and its errors. Real times are not tested."""

import dataclasses
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mlx_diffgemma import noise
from mlx_diffgemma.backends import Backend, check_patches
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.cli import main
from mlx_diffgemma.config import GenerationConfig, ModelConfig
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.reports import speed
from mlx_diffgemma.reports.speed import CanvasSpeed, ImageSpeed, Spread, bench
from mlx_diffgemma.sampler import Block, Text, block_diffusion
from support.fake import FakeBackend, full

Folder = Callable[..., Path]


#: What the causal pass reads, by its tokens.
KINDS = {30: "prompt", 8: "canvas", 4: "half", 2: "quarter", 1: "token", 140: "read 140", 280: "read 280", 1120: "read 1120"}


@dataclass
class Clock:
    """A clock for passes with known times. Each kind of pass has its own tokens, and the first pass of a kind is slow.

    Attributes:
        passes: the kinds of all passes, in order.
    """

    now: float = 0.0
    passes: list[str] = field(default_factory=list)

    def during(self, method: str, parts: Sequence[Any]) -> None:
        if method == "next_logits":
            return
        if method == "see":
            kind = f"see {parts[0].soft_tokens}"
        else:
            reads = method != "denoise"
            kind = KINDS[len(parts[0].tokens if reads else parts[0].canvas)]
            kind = kind if reads else f"step {kind}"
        known = {"prompt": 2.0 + self.passes.count(kind) % 2, "canvas": 1.5, "half": 1.0, "quarter": 0.75, "token": 0.25}
        known |= {"step canvas": 0.5, "step half": 0.375, "step quarter": 0.25}
        known |= {"see 280": 3.0, "read 280": 4.0, "see 1120": 5.0, "read 1120": 6.0, "see 140": 7.0, "read 140": 8.0}
        self.now += known[kind] if kind in self.passes else 100.0
        self.passes.append(kind)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("time.perf_counter", lambda: made.now)
    return made


def timed(config: ModelConfig, clock: Clock) -> FakeBackend:
    """A backend that takes known times on that clock, and whose canvases never settle."""
    return FakeBackend(lambda asked: full(asked.canvas, 1.0, width=len(asked.canvas)), config, during=clock.during, peak=12345)


@pytest.fixture
def clocked(checkpoint: Folder, clock: Clock) -> FakeBackend:
    """That backend for a checkpoint that reads text only."""
    return timed(dataclasses.replace(Checkpoint.open(checkpoint("base")).config, vision=None), clock)


def test_warmup_does_not_count(clocked: FakeBackend, clock: Clock) -> None:
    config = GenerationConfig(max_new_tokens=12, max_denoising_steps=3, eos_token_ids=tuple(range(128)))
    result = bench(clocked, config, prompt_length=30, repeats=4, warmup=1)
    # 1 + 4 prompts with a canvas after each; 1 fills the cache, then 1 + 4 steps; those and 1 + 4 commits of shorter canvases; a
    # prompt, then 1 + 4 tokens; and the two blocks of the text, each of which encodes the tokens before it and takes 3 steps
    steps, text = ["prompt"] + ["step canvas"] * 5, ["prompt"] + ["step canvas"] * 3 + ["canvas"] + ["step canvas"] * 3
    shorter = ["step half"] * 5 + ["half"] * 5 + ["step quarter"] * 5 + ["quarter"] * 5
    assert clock.passes == ["prompt", "canvas"] * 5 + steps + shorter + ["prompt"] + ["token"] * 5 + text
    signals = [asked.row.self_conditioning for asked in clocked.asked[:5]]
    assert signals == [None, (0, 1), (0, 2), (0, 3), (0, 4)], "each step is fed what the one before believed"
    assert result.prefill == Spread(median=(30 / 2 + 30 / 3) / 2, least=30 / 3, most=30 / 2)
    assert result.step == Spread(0.5, 0.5, 0.5)
    assert result.commit == Spread(1.5, 1.5, 1.5)
    assert result.shorter == (
        CanvasSpeed(4, Spread(0.375, 0.375, 0.375), Spread(1.0, 1.0, 1.0)),
        CanvasSpeed(2, Spread(0.25, 0.25, 0.25), Spread(0.75, 0.75, 0.75)),
    )
    assert result.token == Spread(0.25, 0.25, 0.25)
    assert (result.text.new_tokens, result.text.denoising_steps) == (12, (3, 3)), "an end token ended the text"
    assert result.text.denoise_seconds == 6 * 0.5
    assert (result.peak_device_memory, result.canvas_length, result.prompt_length) == (12345, 8, 30)
    assert result.images == ()


def test_images(checkpoint: Folder, clock: Clock) -> None:
    """Two budgets, each in its own passes after all others, and each warmed up."""
    config = Checkpoint.open(checkpoint("pictures")).config
    seeing, text = timed(config, clock), GenerationConfig(max_new_tokens=1, max_denoising_steps=1)
    result = bench(seeing, text, prompt_length=30, repeats=2, warmup=1)
    assert clock.passes[-12:] == ["see 280", "read 280"] * 3 + ["see 1120", "read 1120"] * 3
    assert result.images == (
        ImageSpeed(280, 280 * 9, Spread(3.0, 3.0, 3.0), Spread(4.0, 4.0, 4.0)),
        ImageSpeed(1120, 1120 * 9, Spread(5.0, 5.0, 5.0), Spread(6.0, 6.0, 6.0)),
    )
    seen = len(clock.passes)
    assert bench(seeing, text, prompt_length=30, repeats=2, warmup=1, images=False).images == ()
    assert not any("see" in each for each in clock.passes[seen:])


@pytest.mark.parametrize(
    ("context", "side", "own", "budgets"),
    [
        (4096, 200, 280, [280, 1120]),
        (4096, 200, 1120, [1120]),
        (1127, 200, 140, [140, 560]),  # one less than 1,120 and a canvas of 8
        (1128, 200, 140, [140, 1120]),
        (4096, 62, 280, [280]),  # 28 columns of 3 patches would be 84
        (150, 200, 280, [140]),
        (60, 200, 280, []),
    ],
)
def test_budgets_of_images(checkpoint: Folder, clock: Clock, context: int, side: int, own: int, budgets: list[int]) -> None:
    """The checkpoint's own and the largest that fits its context and the sides of its tower."""
    config = Checkpoint.open(checkpoint("pictures")).config
    assert config.vision is not None
    vision = dataclasses.replace(config.vision, position_embedding_size=side, soft_tokens=own)
    seeing = timed(dataclasses.replace(config, max_position_embeddings=context, vision=vision), clock)
    images = speed._random_images(seeing.config, 0)
    assert [image.soft_tokens for image in images] == budgets
    for image in images:
        check_patches(image, vision)


def test_without_warmup_the_first_run_counts(clocked: FakeBackend) -> None:
    result = bench(clocked, GenerationConfig(max_new_tokens=1), prompt_length=30, repeats=1, warmup=0)
    assert result.prefill == Spread(0.3, 0.3, 0.3)
    assert result.step.median == 100


def test_choices(clocked: FakeBackend) -> None:
    result = bench(clocked, GenerationConfig(max_new_tokens=1), prompt_length=30, repeats=1)
    # 8 tokens: 8 or 2 steps of 0.5 s and a commit of 1.5 s, against 8 tokens of 0.25 s. 16 do not fit into the canvas. Shorter
    # canvases: 4 or 1 steps of 0.375 s and a commit of 1 s for 4 tokens; 2 or 1 steps of 0.25 s and 0.75 s for 2 tokens.
    one, four = result.choices()
    assert one == (1, 8 / 5.5, 4.0, 8, ((4, 4 / 2.5, pytest.approx(1.5 / 1.75)), (2, 2 / 1.25, pytest.approx(0.5 / 0.625))))
    assert four == (4, 8 / 2.5, 4.0, 8, ((4, 4 / 1.375, None), (2, 2 / 1.0, None)))  # 8 / 2.5 leaves 0.25 s for 4 tokens
    assert [choice.options for choice in (one, four)] == ["--mode causal", "--mode causal"]
    slower = dataclasses.replace(result, token=Spread(1.0, 1.0, 1.0))
    assert [choice.options for choice in slower.choices()] == ["--canvas-length 4", "--canvas-length 8"]
    assert [choice.mode for choice in slower.choices()] == ["diffusion", "diffusion"]


def test_what_a_shorter_canvas_needs(clocked: FakeBackend) -> None:
    """At the number of tokens that it needs, a canvas is as fast as the whole one. With any other number it is not."""
    result = bench(clocked, GenerationConfig(max_new_tokens=1), prompt_length=30, repeats=1)
    for choice in result.choices():
        for canvas, shorter in zip(result.shorter, choice.shorter, strict=True):
            if shorter.needed is None:
                assert canvas.tokens_per_second(canvas.length) < choice.diffusion
            else:
                assert canvas.tokens_per_second(shorter.needed) == pytest.approx(choice.diffusion)
                assert canvas.tokens_per_second(0.9 * shorter.needed) < choice.diffusion


def test_spread() -> None:
    assert Spread.of([5.0, 1.0, 2.0]) == Spread(2.0, 1.0, 5.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_length": 0}, "prompt_length must be at least 1, got 0"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"warmup": -1}, "warmup must be at least 0, got -1"),
        ({"seed": 2**64}, r"a seed must be an integer between 0 and 2\^64 - 1"),
        ({"prompt_length": 510}, "exceed the model's context of 512 tokens"),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(clocked: FakeBackend, options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench(clocked, GenerationConfig(max_new_tokens=8), **options)
    assert clocked.calls == []


def test_json_of_the_command(checkpoint: Folder, backend: Callable[..., Backend], backend_name: str) -> None:
    folder = checkpoint("base")
    arguments = [
        "--backend",
        backend_name,
        "--device",
        "cpu",
        "--prompt-length",
        "20",
        "--max-new-tokens",
        "12",
        "--repeats",
        "3",
    ]
    settings = ["--max-denoising-steps", "7", "--entropy-bound", "2", "--confidence-threshold", "1", "--seed", "5"]
    run = CliRunner().invoke(main, ["bench", str(folder), *arguments, *settings, "--json"])
    assert run.exit_code == 0, run.output
    result = json.loads(run.stdout)
    print(result)

    ours = backend(backend_name, "base")
    config = GenerationConfig(
        max_new_tokens=12, max_denoising_steps=7, entropy_bound=2.0, confidence_threshold=1.0, eos_token_ids=()
    )
    prompt = noise.canvas_tokens(5, 0, 0, 20, ours.config.vocab_size)
    steps = [event.steps for event in block_diffusion(ours, Text(prompt, 5), config) if isinstance(event, Block)]
    assert result["text"]["denoising_steps"] == steps
    assert (result["text"]["new_tokens"], result["text"]["prompt_tokens"]) == (12, 20)
    assert result["text"]["tokens_per_forward"] == pytest.approx(12 / sum(steps))
    seconds = result["text"]["encode_seconds"] + result["text"]["denoise_seconds"]
    assert result["text"]["tokens_per_second"] == pytest.approx(12 / seconds)
    [image] = result["images"]  # 560 do not fit the context of 512
    assert (image["soft_tokens"], image["patches"]) == (280, 280)
    for spread in (*(result[name] for name in ("prefill", "step", "commit", "token")), image["tower"], image["encode"]):
        assert 0 < spread["least"] <= spread["median"] <= spread["most"]
    assert [choice["tokens_per_forward"] for choice in result["choices"]] == [1, 4]
    assert [each["length"] for each in result["shorter"]] == [4, 2]
    for choice in result["choices"]:
        speeds = {8: choice["diffusion"], **{each["length"]: each["diffusion"] for each in choice["shorter"]}}
        assert choice["canvas_length"] == max(speeds, key=lambda length: speeds[length])
        assert choice["options"] == (
            "--mode causal" if choice["mode"] == "causal" else f"--canvas-length {choice['canvas_length']}"
        )
        assert choice["causal"] == pytest.approx(1 / result["token"]["median"])
        assert choice["mode"] == ("diffusion" if max(speeds.values()) > choice["causal"] else "causal")
    assert {name: result[name] for name in ("model", "backend", "device", "dtype", "canvas_length", "repeats", "seed")} == {
        "model": str(folder),
        "backend": backend_name,
        "device": "cpu",
        "dtype": "float32",
        "canvas_length": 8,
        "repeats": 3,
        "seed": 5,
    }
    weights = Checkpoint.open(folder).nbytes
    assert result["peak_rss"] > weights
    held = result["peak_device_memory"]
    assert held is None or held > weights
    machine = result["machine"]
    assert machine["cpu"]
    assert machine["python"] == platform.python_version()
    assert machine["versions"]["numpy"] == np.__version__
    assert machine["versions"]["mlx-diffgemma"] == version("mlx-diffgemma")
    assert datetime.fromisoformat(machine["date"]).utcoffset() is not None


def test_text_of_the_command(checkpoint: Folder, backend_name: str) -> None:
    arguments = ["--prompt-length", "9", "--max-new-tokens", "8", "--repeats", "1", "--max-denoising-steps", "2"]
    run = CliRunner().invoke(main, ["bench", str(checkpoint("base")), "--backend", backend_name, *arguments])
    print(run.output)
    assert run.exit_code == 0
    rows = {line.split("  ")[0]: line.split()[-1] for line in run.stdout.splitlines() if line}
    assert rows["tokens per denoising step"] == "4.00"
    assert rows["denoising steps per block"] == "2.0"
    assert float(rows["prompt of 9, tokens/s"]) > 0
    assert float(rows["causal token, s"]) > 0
    assert float(rows["image of 280 tokens, vision tower, s"]) > 0
    assert float(rows["image of 280 tokens, causal pass, s"]) > 0
    without = CliRunner().invoke(main, ["bench", str(checkpoint("base")), "--backend", backend_name, *arguments, "--no-images"])
    assert without.exit_code == 0
    assert "image" not in without.stdout
    assert run.stdout.splitlines()[-3].split("  ")[0] == "tokens per step"
    assert [line.split()[0] for line in run.stdout.splitlines()[-2:]] == ["1", "4"]


def test_command_exits_2_for_bad_input(checkpoint: Folder) -> None:
    run = CliRunner().invoke(main, ["bench", str(checkpoint("base")), "--prompt-length", "600"])
    assert run.exit_code == 2
    assert "exceed the model's context of 512 tokens; use a shorter prompt or fewer new tokens" in run.stderr
