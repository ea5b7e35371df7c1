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


@dataclass(frozen=True)
class CanvasSpeed:
    """Seconds of one denoising step, and of the commit, of a canvas of ``length`` tokens."""

    length: int
    step: Spread
    commit: Spread

    def tokens_per_second(self, tokens_per_forward: float) -> float:
        """The speed if a step settles this many tokens: a canvas then takes length / tokens_per_forward steps, at least one."""
        steps = max(1.0, self.length / tokens_per_forward)
        return self.length / (steps * self.step.median + self.commit.median)

    def needed(self, tokens_per_second: float) -> float | None:
        """How many tokens a step must settle for this speed. None if even a single step per canvas is slower."""
        seconds = self.length / tokens_per_second - self.commit.median  # for the steps of a canvas
        return self.length * self.step.median / seconds if seconds >= self.step.median else None


class Shorter(NamedTuple):
    """A shorter canvas. Whether a step settles as many tokens there as in the whole canvas depends on the text.

    Attributes:
        length: tokens of the canvas.
        diffusion: tokens per second, if a step settles as many.
        needed: how many tokens a step must settle for the speed of the whole canvas. None if that speed is out of reach.
    """

    length: int
    diffusion: float
    needed: float | None


class Choice(NamedTuple):
    """Tokens per second of each mode, if a denoising step settles ``tokens_per_forward`` tokens.

    Attributes:
        diffusion: with the whole canvas, of ``whole`` tokens.
        causal: one token at a time, whatever a step settles.
        shorter: the same for shorter canvases.
    """

    tokens_per_forward: int
    diffusion: float
    causal: float
    whole: int
    shorter: tuple[Shorter, ...] = ()

    @property
    def canvas_length(self) -> int:
        """The canvas length with the most tokens per second; of equals, the longest."""
        return max([(self.diffusion, self.whole), *((each.diffusion, each.length) for each in self.shorter)])[1]

    @property
    def mode(self) -> str:
        """The faster mode."""
        return "diffusion" if max(self.diffusion, *(each.diffusion for each in self.shorter)) > self.causal else "causal"

    @property
    def options(self) -> str:
        """The options of a command that apply this choice."""
        return "--mode causal" if self.mode == "causal" else f"--canvas-length {self.canvas_length}"


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
        shorter: the same for canvases of a half and a quarter of the length. Their commits include a copy of the prompt's keys.
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
    shorter: tuple[CanvasSpeed, ...]
    token: Spread
    text: Statistics
    images: tuple[ImageSpeed, ...]
    peak_rss: int | None
    peak_device_memory: int | None

    @property
    def canvases(self) -> tuple[CanvasSpeed, ...]:
        """The whole canvas and the shorter ones."""
        return CanvasSpeed(self.canvas_length, self.step, self.commit), *self.shorter

    def choices(self) -> list[Choice]:
        """Which mode and which canvas are faster here, by the number of tokens that a denoising step settles.

        That number depends on the text, on the model and on the canvas: a step of a shorter canvas mostly settles fewer. The
        choices assume the same number, and ``Shorter.needed`` says how many suffice. Computed from the medians.
        """
        whole, *others = self.canvases
        choices = []
        for count in TOKENS_PER_FORWARD:
            if count <= whole.length:
                speed = whole.tokens_per_second(count)
                shorter = tuple(Shorter(each.length, each.tokens_per_second(count), each.needed(speed)) for each in others)
                choices.append(Choice(count, speed, 1 / self.token.median, whole.length, shorter))
        return choices


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
        repeats: measured runs of the prompt, the step and the commit of each canvas length, the causal token and the images. The
            text is written once.
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
    after_prompt = backend.new_cache()
    _encode(backend, prompt, after_prompt)
    steps = _step_seconds(backend, after_prompt, canvas, config, seed, repeats, warmup)
    shorter = []
    for part in sorted({length // 2, length // 4} - {0, length}, reverse=True):
        seconds = _step_seconds(backend, after_prompt.fork(), canvas[:part], config, seed, repeats, warmup)
        commits = [_seconds(partial(_encode, backend, canvas[:part], after_prompt.fork())) for _ in range(warmup + repeats)]
        shorter.append(CanvasSpeed(part, Spread.of(seconds), Spread.of(commits[warmup:])))
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
        shorter=tuple(shorter),
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
    cache: Cache,
    canvas: NDArray[np.int32],
    config: GenerationConfig,
    seed: int,
    repeats: int,
    warmup: int,
) -> list[float]:
    """Seconds of denoising steps of one canvas. Each step gets the self-conditioning of the step before."""
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
