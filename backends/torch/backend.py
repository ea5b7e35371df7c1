"""The PyTorch implementation of the :class:`~mlx_diffgemma.backends.Backend` protocol: loading, and NumPy in and out."""

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from mlx_diffgemma.backends import (
    Denoised,
    Features,
    Pending,
    Piece,
    Place,
    Progress,
    Row,
    check_images,
    check_patches,
    check_process,
    check_rows,
    check_tokens,
)
from mlx_diffgemma.backends.memory import main_memory
from mlx_diffgemma.backends.stream import Canvases, Signal, SoftEmbeddings, answers, spans
from mlx_diffgemma.backends.torch.cache import Cache
from mlx_diffgemma.backends.torch.model import Segment, TextModel
from mlx_diffgemma.backends.torch.quantized import quantize_modules
from mlx_diffgemma.backends.torch.step import Inputs, logprobs, score, step
from mlx_diffgemma.backends.torch.vision import VisionModel
from mlx_diffgemma.checkpoint import E8M0_LARGEST, LARGEST, Checkpoint, Numbers, is_vision
from mlx_diffgemma.errors import BackendError, InputError
from mlx_diffgemma.vision.patches import Patches
from mlx_diffgemma.weights import reading

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def place(device: str | None = None, dtype: str | None = None) -> Place:
    """The place that the arguments of :func:`mlx_diffgemma.backends.load_backend` name."""
    where = _device(device)
    dtype = dtype or ("float32" if where.type == "cpu" else "bfloat16")
    free = main_memory() if where.type == "cpu" else torch.cuda.mem_get_info(where)[0]
    return Place("torch", str(where), dtype, tuple(_DTYPES), free)


def load(checkpoint: Checkpoint, place: Place, progress: Progress) -> "TorchBackend":
    """Load ``checkpoint``; see :func:`mlx_diffgemma.backends.load_backend`.

    Tensors are memory-mapped. On a CPU, tensors that already have the wanted type stay mapped and are never copied.
    """
    device, dtype = torch.device(place.device), _DTYPES[place.dtype]
    with torch.device("meta"):
        model = TextModel(checkpoint.config)
        vision = VisionModel(checkpoint.config) if checkpoint.config.vision else None
        parts = [model] if vision is None else [model, vision]
        for part in parts:
            table = {path: each for path, each in checkpoint.quantization.items() if is_vision(path) == (part is vision)}
            quantize_modules(part, table, dtype)
    checkpoint.check({name: tuple(tensor.shape) for part in parts for name, tensor in part.state_dict().items()})
    checkpoint.fetch_weights()
    tensors = _tensors(checkpoint, device, dtype, progress)
    for part in parts:
        part.load_state_dict({name: tensors[name] for name in part.state_dict()}, assign=True)
        part.eval().requires_grad_(False)
    if device.type == "cuda":
        model.join()
    return TorchBackend(model, vision, device, place.dtype)


def _device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError:
        raise InputError(f"unknown torch device {device!r}; try cpu or cuda") from None
    if where.type not in ("cpu", "cuda"):
        raise InputError(f"the torch backend runs on cpu or cuda, not on {device!r}")
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise BackendError(f"device {device!r} is not available: this machine has {torch.cuda.device_count()} CUDA devices")
    return where


def _tensors(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, progress: Progress) -> Mapping[str, Tensor]:
    tensors, done = {}, 0
    for name, stored in checkpoint.stored.items():
        # The pages of a file count as ours until it is closed. Opening it for each tensor holds only one tensor in two types.
        with safe_open(stored.file, framework="pt", device=str(device)) as shard:
            with reading(stored):
                tensor = shard.get_tensor(stored.name)
            checkpoint.refuse_numbers(name, _unusable(tensor, checkpoint.numbers(name)))
            packed = name.rpartition(".")[0] in checkpoint.quantization  # kept as stored, to the bit
            tensors[name] = tensor if packed else tensor.to(dtype)
        done += stored.nbytes
        progress(done, checkpoint.nbytes)
    return tensors


def _unusable(tensor: Tensor, numbers: Numbers) -> int:
    """How many numbers of a stored tensor are NaN, infinite, or larger than ``LARGEST``. Reads a sound tensor once, or twice."""
    if numbers == "words":
        return 0
    if numbers == "e8m0":  # the exponent of a power of two, plus 127; 255 is NaN
        return int((tensor > E8M0_LARGEST).sum())
    if numbers in ("e4m3", "e4m3 words"):  # NaN is 0x7F with either sign
        codes = tensor.view(torch.uint8)
        if codes.max() < 0xFF and codes.view(torch.int8).max() < 0x7F:
            return 0
        return int(((codes == 0x7F) | (codes == 0xFF)).sum())
    low, high = (bound.item() for bound in tensor.aminmax())  # NaN if a number is NaN
    if low >= -LARGEST and high <= LARGEST:
        return 0
    return int((~(tensor.float().abs() <= LARGEST)).sum())


class TorchBackend:
    name = "torch"
    exact_rows = False  # the libraries choose the order of sums by the number of rows

    def __init__(self, model: TextModel, vision: VisionModel | None, device: torch.device, dtype: str) -> None:
        self.model, self.vision, self.config = model, vision, model.config
        self.device, self.dtype = str(device), dtype
        self._last: weakref.ref[SoftEmbeddings[Tensor]] | None = None  # of the last pass; gone when no canvas goes on with it

    def new_cache(self) -> Cache:
        return Cache(self.config)

    @torch.inference_mode()
    def see(self, images: Sequence[Patches]) -> list[Features]:
        check_process()
        for image in images:
            check_patches(image, self.config.vision)
        features: list[Features] = [self._see(image) for image in images]
        self._finish()
        return features

    def _see(self, image: Patches, trace: list[Tensor] | None = None) -> Tensor:
        assert self.vision is not None
        pixels, places = self._to_device(image.values), self._to_device(image.positions)
        return self.vision(pixels[None], places.long(), image.rows, trace)[0]

    @torch.inference_mode()
    def encode(self, pieces: Sequence[Piece]) -> None:
        self.model.encode(*self._stream(pieces))
        self._finish()

    @torch.inference_mode()
    def next_logits(self, caches: Sequence[Cache]) -> NDArray[np.float32]:
        check_process()
        return self._to_numpy(self.model.head(torch.cat([cache.last for cache in caches if cache.last is not None])))

    @torch.inference_mode()
    def score(self, pieces: Sequence[Piece]) -> list[NDArray[np.float32]]:
        tokens, segments = self._stream(pieces)
        unconditioned = [segment.start for segment in segments if not len(segment.cache)]
        logprobs = self._to_numpy(score(self.model, tokens, segments))
        logprobs[unconditioned] = np.nan
        return [logprobs[segment.start : segment.stop] for segment in segments]

    def launch(self, rows: Sequence[Row]) -> Pending:
        return self._queued(rows) if self.device.startswith("cuda") else partial(self.denoise, rows)

    def denoise(self, rows: Sequence[Row]) -> list[Denoised]:
        return self._queued(rows)()

    @torch.inference_mode()
    def _queued(self, rows: Sequence[Row]) -> Pending:
        """Queue a pass on a GPU, or compute it on a CPU. The function returned copies the results."""
        check_rows(rows, self.config)
        given = Canvases.of(rows)
        if self._last is not None and (whole := self._last()) is not None:
            whole.array()  # so that only one pass holds its logits
        tokens, segments = self._stream(rows)
        *statistics, soft_embeddings = step(
            self.model,
            segments,
            Inputs(
                canvases=tokens,
                temperature=self._to_device(given.temperature),
                noise=None if given.noise is None else self._to_device(given.noise.view(np.int32)),
                drawn=self._to_device(given.drawn),
                soft_embeddings=self._soft_embeddings(rows),
                frozen=None if given.frozen is None else self._to_device(given.frozen),
            ),
        )
        self._last = weakref.ref(soft_embeddings)
        signals = [Signal(soft_embeddings, slice(start, stop)) for start, stop, *_ in segments]
        return lambda: answers([self._to_numpy(each) for each in statistics], signals)

    @torch.inference_mode()
    def score_canvas(self, rows: Sequence[Row]) -> list[NDArray[np.float32]]:
        check_rows(rows, self.config)
        tokens, segments = self._stream(rows)
        hidden = self.model.denoise(tokens, segments, self._soft_embeddings(rows))
        temperature = self._to_device(Canvases.of(rows).temperature)
        scores = self._to_numpy(logprobs(self.model, hidden, tokens, temperature))
        return [scores[segment.start : segment.stop] for segment in segments]

    @torch.inference_mode()
    def logits(
        self, parts: Sequence[Piece | Row], trace: list[list[NDArray[np.float32]]] | None = None
    ) -> list[NDArray[np.float32]]:
        tokens, segments = self._stream(parts)
        states: list[Tensor] = []
        rows = [part for part in parts if isinstance(part, Row)]
        if rows:
            hidden = self.model.denoise(tokens, segments, self._soft_embeddings(rows), states)
        else:
            hidden = self.model.encode(tokens, segments, states)
        if trace is not None:
            trace += [[self._to_numpy(state[start:stop].float()) for state in states] for start, stop, *_ in segments]
        return [self._to_numpy(self.model.head(hidden[start:stop])) for start, stop, *_ in segments]

    @torch.inference_mode()
    def vision_states(self, image: Patches) -> tuple[Features, list[NDArray[np.float32]]]:
        check_process()
        check_patches(image, self.config.vision)
        states: list[Tensor] = []
        features = self._see(image, states)
        return features, [self._to_numpy(state.float()) for state in (*(state[0] for state in states), features)]

    def peak_memory(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.device.startswith("cuda") else None

    def _stream(self, parts: Sequence[Piece | Row]) -> tuple[Tensor, list[Segment]]:
        """Tokens int64 [T], and the segment of each part."""
        check_process()
        tokens = [part.tokens if isinstance(part, Piece) else part.canvas for part in parts]
        for each in tokens:
            check_tokens(each, self.config)
        segments = []
        for part, span in zip(parts, spans([len(each) for each in tokens]), strict=True):
            images: list[tuple[int, Tensor]] = []
            if isinstance(part, Piece):
                check_images(part)
                images = [(image.start, cast(Tensor, image.features)) for image in part.images]
            segments.append(Segment(span.start, span.stop, cast(Cache, part.cache), images))
        return self._to_device(np.concatenate(tokens)).long(), segments

    def _soft_embeddings(self, rows: Sequence[Row]) -> Tensor | None:
        """The rows' self-conditioning [T, H], with zeros for rows without it; None if no row has it."""
        signals = [None if row.self_conditioning is None else row.self_conditioning.array() for row in rows]
        known = [signal for signal in signals if signal is not None]
        if not known:
            return None
        nothing = known[0].new_zeros(1, known[0].shape[1])
        filled = [
            nothing.expand(len(row.canvas), -1) if signal is None else signal for row, signal in zip(rows, signals, strict=True)
        ]
        return torch.cat(filled) if len(filled) > 1 else filled[0]

    def _finish(self) -> None:
        """Wait for the device."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    @staticmethod
    def _to_numpy(tensor: Tensor) -> NDArray[Any]:
        array: NDArray[Any] = tensor.cpu().numpy()
        return array
