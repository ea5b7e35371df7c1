"""The benchmark: what it counts, what it leaves out, and what it refuses. How long a thing takes is not tested."""

import dataclasses
import json
import platform
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mlx_diffgemma import noise
from mlx_diffgemma.backends import Backend, Denoised
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.cli import main
from mlx_diffgemma.config import GenerationConfig, ModelConfig
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.reports.speed import Spread, bench
from mlx_diffgemma.sampler import Block, block_diffusion

Folder = Callable[..., Path]


class Clocked:
    """A backend that takes known times on a clock of its own: the first of either call is slow."""

    name, device, dtype = "clocked", "cpu", "float32"

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.now = 0.0
        self.calls: list[str] = []

    def new_cache(self, batch_size: int = 1) -> list[Any]:
        return []

    def _take(self, call: str, seconds: float) -> None:
        self.now += seconds if call in self.calls else 100.0
        self.calls.append(call)

    def encode(self, tokens: Any, cache: list[Any], *, logits: bool = False) -> Any:
        cache.extend(tokens[0])
        call = {30: "prompt", 8: "canvas", 1: "token"}[tokens.shape[1]]
        self._take(call, {"prompt": 2.0 + self.calls.count(call) % 2, "canvas": 1.5, "token": 0.25}[call])
        return np.zeros((1, self.config.vocab_size), np.float32) if logits else None

    def denoise(self, canvas: Any, cache: list[Any], *, self_conditioning: Any = None, **options: Any) -> Denoised:
        self._take("denoise", 0.5)
        return Denoised(canvas, canvas, np.ones(canvas.shape, np.float32), (self_conditioning or 0) + 1)

    def peak_memory(self) -> int:
        return 12345


@pytest.fixture
def clocked(checkpoint: Folder, monkeypatch: pytest.MonkeyPatch) -> Clocked:
    backend = Clocked(Checkpoint.open(checkpoint("base")).config)
    monkeypatch.setattr("time.perf_counter", lambda: backend.now)
    return backend


def test_warmup_does_not_count(clocked: Clocked) -> None:
    config = GenerationConfig(max_new_tokens=12, max_denoising_steps=3, eos_token_ids=tuple(range(128)))
    result = bench(clocked, config, prompt_length=30, repeats=4, warmup=1)  # type: ignore[arg-type]
    # 1 + 4 prompts with a canvas behind them; 1 fills the cache, then 1 + 4 steps; a prompt and then 1 + 4 tokens; and the two
    # blocks of the text, each encodes what comes before it and takes 3 steps
    steps, text = ["prompt"] + ["denoise"] * 5, ["prompt"] + ["denoise"] * 3 + ["canvas"] + ["denoise"] * 3
    assert clocked.calls == ["prompt", "canvas"] * 5 + steps + ["prompt"] + ["token"] * 5 + text
    assert result.prefill == Spread(median=(30 / 2 + 30 / 3) / 2, least=30 / 3, most=30 / 2)
    assert result.step == Spread(0.5, 0.5, 0.5)
    assert result.commit == Spread(1.5, 1.5, 1.5)
    assert result.token == Spread(0.25, 0.25, 0.25)
    assert (result.text.new_tokens, result.text.denoising_steps) == (12, (3, 3)), "an end token ended the text"
    assert result.text.denoise_seconds == 6 * 0.5
    assert (result.peak_device_memory, result.canvas_length, result.prompt_length) == (12345, 8, 30)


def test_without_warmup_the_first_run_counts(clocked: Clocked) -> None:
    result = bench(clocked, GenerationConfig(max_new_tokens=1), prompt_length=30, repeats=1, warmup=0)  # type: ignore[arg-type]
    assert result.prefill == Spread(0.3, 0.3, 0.3)
    assert result.step.median == 100


def test_choices(clocked: Clocked) -> None:
    result = bench(clocked, GenerationConfig(max_new_tokens=1), prompt_length=30, repeats=1)  # type: ignore[arg-type]
    # 8 tokens: 8 or 2 steps of 0.5 s and a commit of 1.5 s, against 8 tokens of 0.25 s. 16 do not fit into the canvas.
    assert result.choices() == [(1, 8 / 5.5, 4.0), (4, 8 / 2.5, 4.0)]
    assert [choice.mode for choice in result.choices()] == ["causal", "causal"]
    faster = dataclasses.replace(result, token=Spread(0.5, 0.5, 0.5))
    assert [choice.mode for choice in faster.choices()] == ["causal", "diffusion"]


def test_spread() -> None:
    assert Spread.of([5.0, 1.0, 2.0]) == Spread(2.0, 1.0, 5.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_length": 0}, "prompt_length must be at least 1, got 0"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"warmup": -1}, "warmup must be at least 0, got -1"),
        ({"seed": 2**64}, "a seed must lie between 0 and"),
        ({"prompt_length": 510}, "exceed the model's context of 512 tokens"),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(clocked: Clocked, options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench(clocked, GenerationConfig(max_new_tokens=8), **options)  # type: ignore[arg-type]
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
    prompt = noise.canvas_tokens([5], 0, 0, 20, ours.config.vocab_size)
    steps = [int(event.steps[0]) for event in block_diffusion(ours, prompt, config, seed=5) if isinstance(event, Block)]
    assert result["text"]["denoising_steps"] == steps
    assert (result["text"]["new_tokens"], result["text"]["prompt_tokens"]) == (12, 20)
    assert result["text"]["tokens_per_forward"] == pytest.approx(12 / sum(steps))
    seconds = result["text"]["encode_seconds"] + result["text"]["denoise_seconds"]
    assert result["text"]["tokens_per_second"] == pytest.approx(12 / seconds)
    for spread in (result["prefill"], result["step"], result["commit"], result["token"]):
        assert 0 < spread["least"] <= spread["median"] <= spread["most"]
    assert [choice["tokens_per_forward"] for choice in result["choices"]] == [1, 4]
    for choice in result["choices"]:
        assert choice["causal"] == pytest.approx(1 / result["token"]["median"])
        assert choice["mode"] == ("diffusion" if choice["diffusion"] > choice["causal"] else "causal")
    assert {name: result[name] for name in ("model", "backend", "device", "dtype", "canvas_length", "repeats", "seed")} == {
        "model": str(folder),
        "backend": backend_name,
        "device": "cpu",
        "dtype": "float32",
        "canvas_length": 8,
        "repeats": 3,
        "seed": 5,
    }
    weights = (folder / "model.safetensors").stat().st_size
    assert result["peak_rss"] > weights
    held = result["peak_device_memory"]
    assert held is None or held > weights / 2  # the vision tower is not loaded
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
    assert run.stdout.splitlines()[-3].split("  ")[0] == "tokens per forward"
    assert [line.split()[0] for line in run.stdout.splitlines()[-2:]] == ["1", "4"]


def test_command_exits_2_for_bad_input(checkpoint: Folder) -> None:
    run = CliRunner().invoke(main, ["bench", str(checkpoint("base")), "--prompt-length", "600"])
    assert run.exit_code == 2
    assert "exceed the model's context of 512 tokens; shorten either" in run.stderr
