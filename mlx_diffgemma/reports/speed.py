"""Speed: measures one backend on one checkpoint: the causal pass over a prompt, a denoising step, a causal token, a whole text.

All tokens are random, from one seed, so a run can be repeated. A canvas after a random prompt settles late or never. The prompt
and the step take as long as with real text, but real text gives more tokens per second.
"""

import importlib.metadata
import math
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

from mlx_diffgemma import noise, sampler
from mlx_diffgemma.backends import Backend, Cache, Features, ImageSpan, Piece, Row
from mlx_diffgemma.causal import causal
from mlx_diffgemma.config import CausalConfig, GenerationConfig, ModelConfig
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.prompts import chunks
from mlx_diffgemma.reports.pictures import random_picture
from mlx_diffgemma.sampler import Block, Text, block_diffusion, check_seed
from mlx_diffgemma.vision.patches import Patches
from mlx_diffgemma.vision_config import BUDGETS
from mlx_diffgemma.writing import Statistics, statistics

#: Defaults: random prompt tokens, measured runs of each thing, and runs before the measured ones.
PROMPT_LENGTH, REPEATS, WARMUP = 512, 5, 1

#: The numbers of tokens per denoising step at which the two modes are compared.
TOKENS_PER_FORWARD = (1, 4, 16, 64)

_PACKAGES = ("mlx-diffgemma", "mlx", "torch", "triton", "numpy")


@dataclass(frozen=True)
class Machine:
    """The machine and the software of a measurement. ``gpu`` is the first NVIDIA GPU; ``date`` is in UTC."""

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
    """The processor's name. On Apple silicon it also identifies the GPU."""
    if sys.platform == "darwin":
        return _first_line("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _first_line(*command: str) -> str | None:
    """The first line of a program's output. None if the program does not exist or fails."""
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
    """Tokens per second of each mode, if a denoising step settles ``tokens_per_forward`` tokens."""

    tokens_per_forward: int
    diffusion: float
    causal: float

    @property
    def mode(self) -> str:
        """The faster mode."""
        return "diffusion" if self.diffusion > self.causal else "causal"


@dataclass(frozen=True)
class ImageSpeed:
    """Seconds that reading one image takes, from its patches.

    Attributes:
        soft_tokens: how many tokens the image takes.
        patches: how many patches go through the vision tower.
        tower: seconds of the vision tower.
        encode: seconds of the causal pass over the soft tokens, at the start of a text.
    """

    soft_tokens: int
    patches: int
    tower: Spread
    encode: Spread


@dataclass(frozen=True)
class Benchmark:
    """The result of :func:`bench`.

    Attributes:
        prefill: prompt tokens per second of the causal pass.
        step: seconds of one denoising step of a whole canvas after that prompt, without the sampler's decisions.
        commit: seconds of the causal pass that puts a canvas after that prompt into the cache.
        token: seconds of one token of the causal mode after that prompt, including its choice.
        text: statistics of a text of ``text.new_tokens`` tokens after that prompt.
        images: images of the checkpoint's own budget and of the largest one that fits. Empty if images were not measured, the
            checkpoint reads text only, or none fits.
        peak_rss: the process's largest resident memory in bytes, including loading and without images. None if the system does
            not report it.
        peak_device_memory: the most bytes that the framework held on its device, without images. None if it does not count them.
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
    images: tuple[ImageSpeed, ...]
    peak_rss: int | None
    peak_device_memory: int | None

    def choices(self) -> list[Choice]:
        """Which mode is faster here, by the number of tokens that a denoising step settles. Computed from the medians.

        That number depends on the text and on the model. A canvas of L tokens takes L / tokens_per_forward steps and one commit.
        """
        length = self.canvas_length
        return [
            Choice(count, length / (length / count * self.step.median + self.commit.median), 1 / self.token.median)
            for count in TOKENS_PER_FORWARD
            if count <= length
        ]


def check_runs(*, prompt_length: int, repeats: int, warmup: int, seed: int) -> None:
    """Raise InputError if an argument of :func:`bench` is wrong for every model."""
    for name, value, least in (("prompt_length", prompt_length, 1), ("repeats", repeats, 1), ("warmup", warmup, 0)):
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    check_seed(seed)


def check_lengths(model: ModelConfig, config: GenerationConfig, *, prompt_length: int, repeats: int, warmup: int) -> None:
    """Raise InputError if the text or the causal tokens of :func:`bench` do not fit into the model's context."""
    sampler.check_lengths(model, config, prompt_length)
    needed = prompt_length + 1 + warmup + repeats
    if needed > model.max_position_embeddings:
        raise InputError(
            f"the prompt and the causal tokens need {needed} positions, but the model's context is "
            f"{model.max_position_embeddings}; use a shorter prompt or fewer repeats"
        )


def bench(
    backend: Backend,
    config: GenerationConfig,
    *,
    prompt_length: int = PROMPT_LENGTH,
    repeats: int = REPEATS,
    warmup: int = WARMUP,
    seed: int = 0,
    images: bool = True,
) -> Benchmark:
    """Measure a loaded model.

    Args:
        config: how to sample the text. No token ends the text, so ``config.max_new_tokens`` tokens are written.
        prompt_length: random tokens before the canvas.
        repeats: measured runs of the prompt, the step, the commit, the causal token and the images. The text is written once.
        warmup: runs of each before the measured ones.
        seed: the seed of the random tokens and pixels, and of the sampler.
        images: also measure images, if the checkpoint reads them.

    Raises InputError before anything is computed.
    """
    model = backend.config
    check_runs(prompt_length=prompt_length, repeats=repeats, warmup=warmup, seed=seed)
    check_lengths(model, config, prompt_length=prompt_length, repeats=repeats, warmup=warmup)
    length = config.canvas_length or model.canvas_length
    prompt = noise.canvas_tokens(seed, 0, 0, prompt_length, model.vocab_size)
    canvas = noise.canvas_tokens(seed, 1, 0, length, model.vocab_size)
    text = block_diffusion(backend, Text(prompt, seed), config.replace(eos_token_ids=()))
    alone = CausalConfig.from_generation(config).replace(max_new_tokens=1 + warmup + repeats, eos_token_ids=())
    tokens = causal(backend, Text(prompt, seed), alone)

    prefill, commit = _encode_seconds(backend, prompt, canvas, repeats, warmup)
    steps = _step_seconds(backend, prompt, canvas, config, seed, repeats, warmup)
    each_token = [token.seconds for token in tokens][1 + warmup :]  # the first token's pass is that of the prompt
    blocks = [event for event in text if isinstance(event, Block)]
    peak_rss, peak_device_memory = _peak_rss(), backend.peak_memory()
    patches = _random_images(model, seed) if images else []
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
        images=tuple(_image_speed(backend, each, repeats, warmup) for each in patches),
        peak_rss=peak_rss,
        peak_device_memory=peak_device_memory,
    )


def _random_images(model: ModelConfig, seed: int) -> list[Patches]:
    """Images that fill the checkpoint's own budget, and the largest one with which a canvas still fits into the context."""
    if model.vision is None:
        return []
    room = model.max_position_embeddings - model.canvas_length
    side = model.vision.position_embedding_size // model.vision.pooling_kernel_size
    sizes = {budget: _sides(budget) for budget in BUDGETS if budget <= room and max(_sides(budget)) <= side}
    chosen = [budget for budget in sizes if budget in (model.vision.soft_tokens, max(sizes))]
    return [random_picture(model.vision, *sizes[budget], seed, budget) for budget in chosen]


def _sides(budget: int) -> tuple[int, int]:
    """Rows and columns of an image of ``budget`` soft tokens that is nearly a square."""
    rows = max(each for each in range(1, math.isqrt(budget) + 1) if budget % each == 0)
    return rows, budget // rows


def _image_speed(backend: Backend, image: Patches, repeats: int, warmup: int) -> ImageSpeed:
    tokens, seen, encoded = np.zeros(image.soft_tokens, np.int32), [], []
    features: list[Features] = []

    def see() -> None:
        features[:] = backend.see([image])

    for _ in range(warmup + repeats):
        seen.append(_seconds(see))
        piece = Piece(tokens, backend.new_cache(), (ImageSpan(0, features[0]),))
        encoded.append(_seconds(partial(backend.encode, [piece])))
    return ImageSpeed(
        soft_tokens=image.soft_tokens,
        patches=len(image.pixels),
        tower=Spread.of(seen[warmup:]),
        encode=Spread.of(encoded[warmup:]),
    )


def _encode_seconds(
    backend: Backend, prompt: NDArray[np.int32], canvas: NDArray[np.int32], repeats: int, warmup: int
) -> tuple[list[float], list[float]]:
    """Seconds of the causal pass over the prompt, and of that over a canvas after it."""
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
    """Seconds of denoising steps of one canvas. Each step gets the self-conditioning of the step before."""
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
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere
