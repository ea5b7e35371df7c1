"""How fast one backend runs one checkpoint: the causal pass over a prompt, a denoising step, a causal token, a text as a whole.

All is random tokens from one seed, so that a run can be repeated. A trained model is not at its best on them: a canvas after a
random prompt settles late or never. The prompt and the step take as long as on real text, whose tokens per second are higher.
"""

import importlib.metadata
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma import noise
from mlx_diffgemma.backends import Backend, Cache, Piece, Row
from mlx_diffgemma.causal import causal
from mlx_diffgemma.config import CausalConfig, GenerationConfig
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.prompts import chunks
from mlx_diffgemma.sampler import Block, Text, block_diffusion, check_seed
from mlx_diffgemma.writing import Statistics, statistics

#: Random prompt tokens, measurements of each thing, and runs before those that count, unless other numbers are asked for.
PROMPT_LENGTH, REPEATS, WARMUP = 512, 5, 1

#: Tokens per denoising step that the two modes are compared at.
TOKENS_PER_FORWARD = (1, 4, 16, 64)

_PACKAGES = ("mlx-diffgemma", "mlx", "torch", "triton", "numpy")


@dataclass(frozen=True)
class Machine:
    """Where and with what a figure was measured. ``gpu`` is the first one by NVIDIA; ``date`` is in UTC."""

    cpu: str
    gpu: str | None
    system: str
    python: str
    versions: dict[str, str]
    date: str

    @classmethod
    def this(cls) -> Self:
        versions = {}
        for package in _PACKAGES:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        return cls(
            cpu=_cpu(),
            gpu=_first_line("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
            system=f"{platform.system()} {platform.release()} {platform.machine()}",
            python=platform.python_version(),
            versions=versions,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def _cpu() -> str:
    """The processor's name; on Apple silicon it names the GPU too."""
    if sys.platform == "darwin":
        return _first_line("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _first_line(*command: str) -> str | None:
    """What a program says first, None where there is no such program or it fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip().partition("\n")[0] or None


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one thing."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        return cls(median(values), min(values), max(values))


class Choice(NamedTuple):
    """Tokens per second of either mode where a denoising step settles ``tokens_per_forward`` tokens."""

    tokens_per_forward: int
    diffusion: float
    causal: float

    @property
    def mode(self) -> str:
        """The faster one."""
        return "diffusion" if self.diffusion > self.causal else "causal"


@dataclass(frozen=True)
class Benchmark:
    """What :func:`bench` measured.

    Attributes:
        prefill: prompt tokens per second of the causal pass.
        step: seconds of one denoising step of a whole canvas after that prompt, the sampler's decisions left out.
        commit: seconds of the causal pass that puts a canvas behind that prompt into the cache.
        token: seconds of one token of the causal mode behind that prompt, its choice included.
        text: a text of ``text.new_tokens`` tokens after that prompt.
        peak_rss: the process's largest resident memory in bytes, the loading included; None where the system does not tell.
        peak_device_memory: the most that the framework held on its device, in bytes; None where it keeps no count.
    """

    machine: Machine
    backend: str
    device: str
    dtype: str
    prompt_length: int
    canvas_length: int
    repeats: int
    seed: int
    prefill: Spread
    step: Spread
    commit: Spread
    token: Spread
    text: Statistics
    peak_rss: int | None
    peak_device_memory: int | None

    def choices(self) -> list[Choice]:
        """Which mode is faster here, by the tokens that a denoising step settles; from the medians.

        How many it settles is a matter of the text, and of the model. A canvas of L tokens takes L / tokens_per_forward steps and
        one commit.
        """
        length = self.canvas_length
        return [
            Choice(count, length / (length / count * self.step.median + self.commit.median), 1 / self.token.median)
            for count in TOKENS_PER_FORWARD
            if count <= length
        ]


def bench(
    backend: Backend,
    config: GenerationConfig,
    *,
    prompt_length: int = PROMPT_LENGTH,
    repeats: int = REPEATS,
    warmup: int = WARMUP,
    seed: int = 0,
) -> Benchmark:
    """Measure a loaded model.

    Args:
        config: how the text is sampled. No token ends it: ``config.max_new_tokens`` are written.
        prompt_length: random tokens before the canvas.
        repeats: of the prompt, the step, the commit and the causal token; the text is written once.
        warmup: runs of each before those that count.
        seed: of the random tokens and of the sampler.

    Raises InputError before anything is computed.
    """
    model = backend.config
    for name, value, least in (("prompt_length", prompt_length, 1), ("repeats", repeats, 1), ("warmup", warmup, 0)):
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    check_seed(seed)
    length = config.canvas_length or model.canvas_length
    prompt = noise.canvas_tokens(seed, 0, 0, prompt_length, model.vocab_size)
    canvas = noise.canvas_tokens(seed, 1, 0, length, model.vocab_size)
    # These two check the lengths, and compute nothing before they are read.
    text = block_diffusion(backend, Text(prompt, seed), config.replace(eos_token_ids=()))
    alone = CausalConfig.from_generation(config).replace(max_new_tokens=1 + warmup + repeats, eos_token_ids=())
    tokens = causal(backend, Text(prompt, seed), alone)

    prefill, commit = _encode_seconds(backend, prompt, canvas, repeats, warmup)
    steps = _step_seconds(backend, prompt, canvas, config, seed, repeats, warmup)
    each_token = [token.seconds for token in tokens][1 + warmup :]  # the first one's pass is the prompt's
    blocks = [event for event in text if isinstance(event, Block)]
    return Benchmark(
        machine=Machine.this(),
        backend=backend.name,
        device=backend.device,
        dtype=backend.dtype,
        prompt_length=prompt_length,
        canvas_length=length,
        repeats=repeats,
        seed=seed,
        prefill=Spread.of([prompt_length / seconds for seconds in prefill]),
        step=Spread.of(steps),
        commit=Spread.of(commit),
        token=Spread.of(each_token),
        text=statistics(prompt_length, config.max_new_tokens, blocks),
        peak_rss=_peak_rss(),
        peak_device_memory=backend.peak_memory(),
    )


def _encode_seconds(
    backend: Backend, prompt: NDArray[np.int32], canvas: NDArray[np.int32], repeats: int, warmup: int
) -> tuple[list[float], list[float]]:
    """The causal pass over the prompt, and that over a canvas behind it."""
    both = []
    for _ in range(warmup + repeats):
        cache = backend.new_cache()
        both.append([_seconds(partial(_encode, backend, part, cache)) for part in (prompt, canvas)])
    prefill, commit = zip(*both[warmup:], strict=True)
    return list(prefill), list(commit)


def _encode(backend: Backend, tokens: NDArray[np.int32], cache: Cache) -> None:
    for piece in chunks(tokens):
        backend.encode([Piece(piece, cache)])


def _step_seconds(
    backend: Backend,
    prompt: NDArray[np.int32],
    canvas: NDArray[np.int32],
    config: GenerationConfig,
    seed: int,
    repeats: int,
    warmup: int,
) -> list[float]:
    """Denoising steps of one canvas, each fed the self-conditioning of the one before."""
    cache = backend.new_cache()
    _encode(backend, prompt, cache)
    row = Row(canvas, cache, config.t_max, None if config.greedy else noise.sampling_key(seed, 1, 1))

    def step() -> None:
        nonlocal row
        row = replace(row, self_conditioning=backend.denoise([row])[0].self_conditioning)

    return [_seconds(step) for _ in range(warmup + repeats)][warmup:]


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _peak_rss() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere
