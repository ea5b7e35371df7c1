"""Models of the released layout with random weights, made on the device in seconds, for ``gpu.py``; and what runs on them."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from real_4bit_cpu import deviation, value
from sections import WARMUP, causal_token, random_row, released_format, spread, text_before

from mlx_diffgemma import noise
from mlx_diffgemma.backends import Denoised, Pending, Piece, Place, Progress, Row, rows_in_pass
from mlx_diffgemma.backends.torch import backend as wing
from mlx_diffgemma.backends.torch.backend import TorchBackend
from mlx_diffgemma.backends.torch.model import TextModel
from mlx_diffgemma.checkpoint import Checkpoint, Quantization
from mlx_diffgemma.config import GenerationConfig, ModelConfig
from mlx_diffgemma.prompts import chunks
from mlx_diffgemma.sampler import Draft, Text, block_diffusion


@dataclass(frozen=True)
class Extent:
    """How much is measured; the defaults are those of a GPU.

    Attributes:
        layers: of the model.
        steps: measured steps, after the warm-up.
        prompts: lengths of the causal pass.
        tokens: measured causal tokens.
        rows: canvases in one pass.
        accepted: positions that each step of the scripted acceptance accepts.
        blocks: canvases of its text.
        read_bytes: of the buffers that the bandwidth is measured with.
        matmul: side of the matrices that the arithmetic is measured with.
        peers: layers of the two models from which other programs' steps are extrapolated.
        check_rows, check_vocabulary: rows of the products whose values and bits are compared, and their vocabulary.
        formats: formats of packed weights that are checked at odd shapes.
    """

    layers: int = 30
    steps: int = 12
    prompts: tuple[int, ...] = (1_024, 4_096, 32_768, 131_072)
    tokens: int = 12
    rows: tuple[int, ...] = (1, 2, 4, 8, 16)
    accepted: int = 16
    blocks: int = 4
    read_bytes: int = 2**32
    matmul: int = 8_192
    peers: tuple[int, int] = (6, 12)
    check_rows: int = 256
    check_vocabulary: int = 262_144
    formats: int = 7


TOY_EXTENT = Extent(
    layers=6,
    steps=2,
    prompts=(24, 96),
    tokens=2,
    rows=(1, 2),
    accepted=4,
    blocks=2,
    read_bytes=2**20,
    matmul=128,
    peers=(1, 2),
    check_rows=5,
    check_vocabulary=128,
    formats=1,
)


class RandomCheckpoint:
    """What the wing's ``load`` takes of a checkpoint. Its tensors are random and made on the device, one after the other.

    With ``bits_4`` it has the form of the released 4-bit conversion, else of the released BF16 checkpoint.
    """

    def __init__(self, config: ModelConfig, *, bits_4: bool) -> None:
        self.config = config
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.quantization: dict[str, Quantization] = {}
        if bits_4:
            with torch.device("meta"):
                model = TextModel(config)
            for path, module in model.named_modules():
                if getattr(getattr(module, "weight", None), "ndim", 0) > 1:
                    self.quantization[path] = released_format(path)

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Take the names and shapes that the model has."""
        self.shapes = shapes

    def fetch_weights(self) -> None:
        """There is nothing to fetch."""

    def tensors(self, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """All tensors, on ``device``. Packed words are uniform; values are those of ``real_4bit_cpu.py``."""
        stored = {name: (shape, "") for name, shape in self.shapes.items()}
        made = {}
        for name, shape in self.shapes.items():
            module, _, kind = name.rpartition(".")
            if module in self.quantization and kind == "weight":
                made[name] = torch.empty(shape, dtype=torch.int32, device=device).random_(-(2**31), 2**31 - 1)
            elif module in self.quantization:
                made[name] = torch.full(shape, value(name, stored), dtype=torch.bfloat16, device=device)
            elif len(shape) > 1:
                made[name] = torch.empty(shape, dtype=dtype, device=device).normal_(0, deviation(module, shape[-1]))
            else:
                made[name] = torch.full(shape, value(name, stored), dtype=dtype, device=device)
        return made


def random_model(config: ModelConfig, device: str, *, bits_4: bool) -> TorchBackend:
    """A model of random weights, loaded as the wing loads a checkpoint: BF16 on a GPU, float32 on a CPU."""
    random = RandomCheckpoint(config, bits_4=bits_4)
    read = wing._tensors

    def tensors(
        checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, progress: Progress
    ) -> Mapping[str, torch.Tensor]:
        progress(0, 0)
        return random.tensors(device, dtype)

    wing._tensors = tensors
    try:
        place = Place("torch", device, "float32" if device == "cpu" else "bfloat16", (), None)
        torch.manual_seed(0)
        return wing.load(cast(Checkpoint, random), place, lambda done, total: None)
    finally:
        wing._tensors = read


def weight_bytes(config: ModelConfig) -> int:
    """Bytes of the model's weights in BF16."""
    with torch.device("meta"):
        tensors: list[torch.Tensor] = list(TextModel(config).state_dict().values())
    return 2 * sum(tensor.numel() for tensor in tensors)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def timed(device: str, run: Callable[[], object]) -> float:
    """Seconds of ``run``, until the device has done it."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    return spread([1e3 * each for each in seconds])


def conditioned(rows: Sequence[Row], answers: Sequence[Denoised]) -> list[Row]:
    """The rows of the next step: the same canvases, with self-conditioning."""
    pairs = zip(rows, answers, strict=True)
    return [replace(row, self_conditioning=answer.self_conditioning) for row, answer in pairs]


def denoising(backend: TorchBackend, rows: Sequence[Row], steps: int) -> dict[str, Any]:
    """Milliseconds of steps until their results are here, and of the host until the launch returns.

    Each step has the self-conditioning of the one before. The host's time is what Python and the driver take to queue a step.
    """
    times: dict[str, list[float]] = {"ms": [], "host_ms": []}
    for turn in range(WARMUP + steps):
        synchronize(backend.device)
        started = time.perf_counter()
        pending = backend.launch(rows)
        launched = time.perf_counter()
        rows = conditioned(rows, pending())
        done = time.perf_counter()
        if turn >= WARMUP:
            times["ms"].append(done - started)
            times["host_ms"].append(launched - started)
    return {name: milliseconds(seconds) for name, seconds in times.items()}


def prefill(backend: TorchBackend, lengths: Sequence[int], over: Callable[[], bool]) -> Iterator[tuple[str, Any]]:
    """Seconds and tokens per second of the causal pass over prompts. A prompt is given up when the time is over."""
    text_before(backend, min(lengths))
    for length in lengths:
        taken = []
        for _ in range(3 if length <= 4 * min(lengths) else 1):
            tokens = noise.canvas_tokens(0, 0, 0, length, backend.config.vocab_size)
            text, started = backend.new_cache(), time.perf_counter()
            for piece in chunks(tokens):
                backend.encode([Piece(piece, text)])
                if over():
                    seconds = time.perf_counter() - started
                    yield str(length), {"cut_at": len(text), "seconds_until_then": seconds}
                    return
            taken.append(time.perf_counter() - started)
        found = spread(taken)
        yield str(length), {"seconds": found, "tokens_per_second": length / found["median"], "cache_gb": text.nbytes / 1e9}


def causal_tokens(backend: TorchBackend, prefix: int, count: int) -> dict[str, Any]:
    """Milliseconds of a token of the causal mode, with its logits."""
    token = partial(causal_token, backend, text_before(backend, prefix))
    found = milliseconds([timed(backend.device, token) for _ in range(WARMUP + count)][WARMUP:])
    return {"ms": found, "tokens_per_second": 1e3 / found["median"]}


def batches(backend: TorchBackend, counts: Sequence[int], prefix: int, steps: int) -> Iterator[tuple[str, Any]]:
    """A step of several texts in one pass, each with its own cache, and whether the first row has the bits that it has alone."""
    rows: list[Row] = []
    alone: list[Any] = []
    for count in counts:
        rows += [random_row(backend, text_before(backend, prefix, seed), seed) for seed in range(len(rows), count)]
        given = rows[: rows_in_pass(cast(Any, backend), "fast", count)]
        answers = backend.denoise(given)
        bits = [answers[0].argmax, answers[0].sampled, answers[0].entropy.view(np.int32)]
        alone = alone or bits
        names = ("argmax", "sampled", "entropy")
        same = {name: bool(np.array_equal(*pair)) for name, *pair in zip(names, bits, alone, strict=True)}
        found = denoising(backend, given, steps)
        per_row = found["ms"]["median"] / len(given)
        yield str(count), {"rows": len(given), **found, "ms_per_row": per_row, "first_row_same_bits": same}


class Scripted:
    """A backend whose entropies follow a script, so that each step accepts ``accepted`` more positions.

    The model computes every step whole. Then the entropies of the positions that the script accepts become 0, and all others more
    than the bound. If a canvas may take ``steps`` steps at most, it takes exactly that many.
    """

    def __init__(self, backend: TorchBackend, accepted: int, steps: int) -> None:
        self.backend, self.accepted, self.steps, self.launched = backend, accepted, steps, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def launch(self, rows: Sequence[Row]) -> Pending:
        count = self.accepted * (self.launched % self.steps + 1)
        pending = self.backend.launch(rows)
        self.launched += 1
        return lambda: [answer._replace(entropy=_accepting(count, len(answer.entropy))) for answer in pending()]


def _accepting(count: int, length: int) -> NDArray[np.float32]:
    """Entropies float32 [length] with which a step accepts ``count`` positions."""
    # The first position over the bound is accepted too: what counts is the sum before it.
    return np.where(np.arange(length) < count - 1, 0.0, 1.0).astype(np.float32)


def scripted_text(backend: TorchBackend, prefix: int, extent: Extent) -> dict[str, Any]:
    """Tokens per second of a text whose steps accept a fixed number of positions, whatever the model says; encoding included."""
    length = backend.config.canvas_length
    steps = length // extent.accepted
    options: dict[str, Any] = {"max_denoising_steps": steps, "confidence_threshold": 0.0, "entropy_bound": 0.1}
    config = GenerationConfig(max_new_tokens=length * extent.blocks, eos_token_ids=(), **options)
    text = Text(noise.canvas_tokens(0, 0, 0, prefix, backend.config.vocab_size))
    accepted: list[int] = []

    def write() -> None:
        scripted: Any = Scripted(backend, extent.accepted, steps)
        accepted[:] = [int(event.accepted.sum()) for event in block_diffusion(scripted, text, config) if isinstance(event, Draft)]

    first, seconds = timed(backend.device, write), timed(backend.device, write)
    return {
        "how": f"scripted entropies: each step accepts {extent.accepted} positions more, so a canvas takes {steps} steps",
        "options": options,
        "prefix": prefix,
        "new_tokens": config.max_new_tokens,
        "forwards": len(accepted),
        "tokens_per_forward": config.max_new_tokens / len(accepted),
        "accepted_in_the_first_canvas": accepted[:steps],
        "first_seconds": first,
        "seconds": seconds,
        "tokens_per_second": config.max_new_tokens / seconds,
    }
