"""The MLX implementation of the :class:`~mlx_diffgemma.backends.Backend` protocol: loading, and NumPy in and out."""

import sys
import weakref
from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

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
from mlx_diffgemma.backends.mlx import kernels
from mlx_diffgemma.backends.mlx.cache import Cache
from mlx_diffgemma.backends.mlx.model import Segment, TextModel
from mlx_diffgemma.backends.mlx.quantized import quantize_modules
from mlx_diffgemma.backends.mlx.step import Inputs, logprobs, score, step
from mlx_diffgemma.backends.mlx.vision import VisionModel
from mlx_diffgemma.backends.stream import Canvases, Signal, SoftEmbeddings, answers, spans
from mlx_diffgemma.checkpoint import E8M0_LARGEST, LARGEST, Checkpoint, Numbers, is_vision
from mlx_diffgemma.errors import BackendError, InputError
from mlx_diffgemma.vision.patches import Patches
from mlx_diffgemma.weights import reading

_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}
_DEVICES = {"cpu": mx.cpu, "gpu": mx.gpu}
#: Unsigned and signed integers of a number type's size, and the sign bit.
_BITS = {
    mx.float32: (mx.uint32, mx.int32, 1 << 31),
    mx.bfloat16: (mx.uint16, mx.int16, 1 << 15),
    mx.float16: (mx.uint16, mx.int16, 1 << 15),
}


def place(device: str | None = None, dtype: str | None = None) -> Place:
    """The place that the arguments of :func:`mlx_diffgemma.backends.load_backend` name."""
    where = _device(device)
    dtypes = ("float32",) if where == mx.cpu else tuple(_DTYPES)
    if dtype is not None and dtype not in dtypes:
        raise BackendError(f"MLX multiplies expert weights on the CPU in float32 only, not in {dtype}; leave out the dtype")
    dtype = dtype or ("float32" if where == mx.cpu else "bfloat16")
    return Place("mlx", where.name, dtype, dtypes, main_memory() if where == mx.cpu else _gpu_memory())


def load(checkpoint: Checkpoint, place: Place, progress: Progress) -> "MlxBackend":
    """Load ``checkpoint``; see :func:`mlx_diffgemma.backends.load_backend`.

    MLX reads a tensor when it is first needed. Tensors are evaluated one at a time, so only one is held in two types.
    """
    device, dtype = _DEVICES[place.device], _DTYPES[place.dtype]
    with mx.stream(device):
        if kernels.on_metal():  # as mlx-lm does: macOS then keeps all weights in memory that the GPU can read
            mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
        kernels.check(dtype)
        model = TextModel(checkpoint.config)
        vision = VisionModel(checkpoint.config) if checkpoint.config.vision else None
        parts = [model] if vision is None else [model, vision]
        for part in parts:
            table = {path: each for path, each in checkpoint.quantization.items() if is_vision(path) == (part is vision)}
            quantize_modules(part, table, dtype)
        checkpoint.check({name: array.shape for part in parts for name, array in dict(tree_flatten(part.parameters())).items()})
        checkpoint.fetch_weights()
        tensors = _tensors(checkpoint, dtype, progress)
        for part in parts:
            part.load_weights([(name, tensors.pop(name)) for name in dict(tree_flatten(part.parameters()))])
        for weights in model.join():
            mx.eval(weights)
    return MlxBackend(model, vision, device, place.dtype)


def _device(device: str | None) -> Any:
    default = mx.default_device().type
    if device is None:
        return default
    if device not in _DEVICES:
        raise InputError(f"unknown mlx device {device!r}; try cpu or gpu")
    if device == "gpu" and default == mx.cpu:
        raise BackendError("device 'gpu' is not available: this build of MLX has only the CPU; use cpu")
    return _DEVICES[device]


def _gpu_memory() -> int | None:
    """All memory of a Mac, which its GPU shares, or what is free on another GPU."""
    known = mx.device_info()
    size = known.get("free_memory") or known.get("total_memory") or known.get("memory_size")
    return int(size) if size else None


def _tensors(checkpoint: Checkpoint, dtype: mx.Dtype, progress: Progress) -> dict[str, mx.array]:
    tensors, done = {}, 0
    for file in sorted({tensor.file for tensor in checkpoint.stored.values()}):
        shard = mx.load(str(file))
        assert isinstance(shard, dict)
        for name, stored in checkpoint.stored.items():
            if stored.file == file:
                tensor = shard.pop(stored.name)
                with reading(stored):
                    mx.eval(tensor)
                checkpoint.refuse_numbers(name, _unusable(tensor, checkpoint.numbers(name)))
                packed = name.rpartition(".")[0] in checkpoint.quantization  # kept as stored, to the bit
                tensor = tensor if packed else tensor.astype(dtype)
                mx.eval(tensor)
                tensors[name] = tensor
                done += stored.nbytes
                progress(done, checkpoint.nbytes)
    return tensors


def _unusable(tensor: mx.array, numbers: Numbers) -> int:
    """How many numbers of a stored tensor are NaN, infinite, or larger than ``LARGEST``. Reads a sound tensor once, or twice."""
    if numbers == "words":
        return 0
    if numbers == "e8m0":  # the exponent of a power of two, plus 127; 255 is NaN
        return _integer((tensor > E8M0_LARGEST).sum())
    if numbers in ("e4m3", "e4m3 words"):  # NaN is 0x7F with either sign
        codes = tensor.view(mx.uint8)
        if _integer(codes.max()) < 0xFF and _integer(codes.view(mx.int8).max()) < 0x7F:
            return 0
        return _integer(((codes == 0x7F) | (codes == 0xFF)).sum())
    # Numbers of one sign have the order of their bits, and those of NaN are the largest. On a CPU, MLX compares integers many
    # times faster than floats.
    unsigned, signed, sign = _BITS[tensor.dtype]
    largest = _integer(mx.array(min(LARGEST, mx.finfo(tensor.dtype).max)).astype(tensor.dtype).view(signed))
    if _integer(tensor.view(signed).max()) <= largest and _integer(tensor.view(unsigned).max()) <= largest + sign:
        return 0
    return _integer(mx.logical_not(mx.abs(tensor.astype(mx.float32)) <= LARGEST).sum())


def _integer(array: mx.array) -> int:
    value: Any = array.item()
    return int(value)


class MlxBackend:
    name = "mlx"

    def __init__(self, model: TextModel, vision: VisionModel | None, device: Any, dtype: str) -> None:
        self.model, self.vision, self.config = model, vision, model.config
        self.device, self.dtype = device.name, dtype
        self._place = device
        self._last: weakref.ref[SoftEmbeddings[mx.array]] | None = None  # of the last pass; gone when no canvas goes on with it
        # The BLAS in the Linux wheel sums each output separately, in order. Apple's CPU and GPU have not been measured.
        self.exact_rows = device.name == "cpu" and sys.platform == "linux"

    def new_cache(self) -> Cache:
        return Cache(self.config)

    def see(self, images: Sequence[Patches]) -> list[Features]:
        check_process()
        for image in images:
            check_patches(image, self.config.vision)
        with mx.stream(self._place):
            return [self._see(image) for image in images]

    def _see(self, image: Patches, trace: list[mx.array] | None = None) -> mx.array:
        assert self.vision is not None
        [features] = self.vision(mx.array(image.values)[None], mx.array(image.positions), image.rows, trace)
        mx.eval(features)
        return features

    def encode(self, pieces: Sequence[Piece]) -> None:
        with mx.stream(self._place):
            tokens, segments = self._stream(pieces)
            self.model.encode(tokens, segments, last=True)
            mx.eval([segment.cache.arrays() for segment in segments])
            if len(tokens) > self.config.canvas_length:
                mx.clear_cache()  # steps have no use for the buffers of a piece of a prompt

    def next_logits(self, caches: Sequence[Cache]) -> NDArray[np.float32]:
        check_process()
        with mx.stream(self._place):
            return np.array(self.model.head(mx.concatenate([cache.last for cache in caches if cache.last is not None])))

    def score(self, pieces: Sequence[Piece]) -> list[NDArray[np.float32]]:
        with mx.stream(self._place):
            tokens, segments = self._stream(pieces)
            unconditioned = [segment.start for segment in segments if not len(segment.cache)]
            scores = score(self.model, tokens, segments)
            mx.eval(scores, [segment.cache.arrays() for segment in segments])
            logprobs = np.array(scores)
        logprobs[unconditioned] = np.nan
        return [logprobs[segment.start : segment.stop] for segment in segments]

    def launch(self, rows: Sequence[Row]) -> Pending:
        check_rows(rows, self.config)
        given = Canvases.of(rows)
        with mx.stream(self._place):
            if self._last is not None and (whole := self._last()) is not None:
                mx.async_eval(whole.array())  # the device computes it while this graph is built, and its logits are gone
            tokens, segments = self._stream(rows)
            *statistics, soft_embeddings = step(
                self.model,
                segments,
                Inputs(
                    canvases=tokens,
                    temperature=mx.array(given.temperature),
                    noise=None if given.noise is None else mx.array(given.noise),
                    drawn=mx.array(given.drawn),
                    soft_embeddings=self._soft_embeddings(rows),
                    frozen=None if given.frozen is None else mx.array(given.frozen),
                ),
            )
            mx.async_eval(statistics, soft_embeddings.needs, [segment.cache.arrays() for segment in segments])
            self._last = weakref.ref(soft_embeddings)
        signals = [Signal(soft_embeddings, slice(start, stop)) for start, stop, *_ in segments]

        def wait() -> list[Denoised]:
            check_process()
            return answers([np.array(each) for each in statistics], signals)

        return wait

    def denoise(self, rows: Sequence[Row]) -> list[Denoised]:
        return self.launch(rows)()

    def score_canvas(self, rows: Sequence[Row]) -> list[NDArray[np.float32]]:
        check_rows(rows, self.config)
        with mx.stream(self._place):
            tokens, segments = self._stream(rows)
            hidden = self.model.denoise(tokens, segments, self._soft_embeddings(rows))
            temperature = mx.array(Canvases.of(rows).temperature)
            scores = np.array(logprobs(self.model, hidden, tokens, temperature))
        return [scores[segment.start : segment.stop] for segment in segments]

    def logits(
        self, parts: Sequence[Piece | Row], trace: list[list[NDArray[np.float32]]] | None = None
    ) -> list[NDArray[np.float32]]:
        states: list[mx.array] = []
        rows = [part for part in parts if isinstance(part, Row)]
        with mx.stream(self._place):
            tokens, segments = self._stream(parts)
            if rows:
                hidden = self.model.denoise(tokens, segments, self._soft_embeddings(rows), states)
            else:
                hidden = self.model.encode(tokens, segments, states)
            if trace is not None:
                wide = [np.array(state.astype(mx.float32)) for state in states]
                trace += [[state[start:stop] for state in wide] for start, stop, *_ in segments]
            return [np.array(self.model.head(hidden[start:stop])) for start, stop, *_ in segments]

    def vision_states(self, image: Patches) -> tuple[Features, list[NDArray[np.float32]]]:
        check_process()
        check_patches(image, self.config.vision)
        states: list[mx.array] = []
        with mx.stream(self._place):
            features = self._see(image, states)
            return features, [np.array(state.astype(mx.float32)) for state in (*(state[0] for state in states), features)]

    def peak_memory(self) -> int | None:
        return mx.get_peak_memory()

    def _stream(self, parts: Sequence[Piece | Row]) -> tuple[mx.array, list[Segment]]:
        """Tokens int32 [T], and the segment of each part."""
        check_process()
        tokens = [part.tokens if isinstance(part, Piece) else part.canvas for part in parts]
        for each in tokens:
            check_tokens(each, self.config)
        segments = []
        for part, span in zip(parts, spans([len(each) for each in tokens]), strict=True):
            images: list[tuple[int, mx.array]] = []
            if isinstance(part, Piece):
                check_images(part)
                images = [(image.start, cast(mx.array, image.features)) for image in part.images]
            segments.append(Segment(span.start, span.stop, cast(Cache, part.cache), images))
        return mx.array(np.concatenate(tokens)), segments

    def _soft_embeddings(self, rows: Sequence[Row]) -> mx.array | None:
        """The rows' self-conditioning [T, H], with zeros for rows without it; None if no row has it."""
        signals = [None if row.self_conditioning is None else row.self_conditioning.array() for row in rows]
        known = [signal for signal in signals if signal is not None]
        if not known:
            return None
        size, dtype = known[0].shape[1], known[0].dtype
        filled = [
            mx.zeros((len(row.canvas), size), dtype) if signal is None else signal
            for row, signal in zip(rows, signals, strict=True)
        ]
        return mx.concatenate(filled) if len(filled) > 1 else filled[0]
