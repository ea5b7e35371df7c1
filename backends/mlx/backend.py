"""The MLX wing's side of the :class:`~mlx_diffgemma.backends.Backend` protocol: loading, and NumPy in and out."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from mlx_diffgemma.backends import PREFILL_CHUNK, Denoised, check_tokens
from mlx_diffgemma.backends.mlx.cache import Cache
from mlx_diffgemma.backends.mlx.model import TextModel
from mlx_diffgemma.backends.mlx.quantized import quantize_modules
from mlx_diffgemma.backends.mlx.step import logprobs, score, step
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.errors import BackendError, InputError
from mlx_diffgemma.noise import bits

_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}


def load(checkpoint: Checkpoint, *, device: str | None = None, dtype: str | None = None) -> "MlxBackend":
    """Load ``checkpoint``; see :func:`mlx_diffgemma.backends.load_backend`.

    MLX reads a tensor when it is first needed; evaluating one at a time keeps a single one in two types.
    """
    place = _device(device)
    dtype = dtype or ("float32" if place == mx.cpu else "bfloat16")
    if place == mx.cpu and dtype != "float32":
        raise BackendError(f"MLX multiplies expert weights on the CPU in float32 only, not in {dtype}; leave out the dtype")
    with mx.stream(place):
        model = TextModel(checkpoint.config)
        quantize_modules(model, checkpoint.quantization, _DTYPES[dtype])
        checkpoint.check({name: array.shape for name, array in dict(tree_flatten(model.parameters())).items()})
        model.load_weights(_tensors(checkpoint, _DTYPES[dtype]))
    return MlxBackend(model, place, dtype)


def _device(device: str | None) -> Any:
    default = mx.default_device().type
    if device is None:
        return default
    if device not in ("cpu", "gpu"):
        raise InputError(f"unknown mlx device {device!r}; try cpu or gpu")
    if device == "gpu" and default == mx.cpu:
        raise BackendError("device 'gpu' was asked for, but this build of MLX has only the CPU")
    return mx.gpu if device == "gpu" else mx.cpu


def _tensors(checkpoint: Checkpoint, dtype: mx.Dtype) -> list[tuple[str, mx.array]]:
    tensors = []
    for file in sorted({tensor.file for tensor in checkpoint.tensors.values()}):
        shard = mx.load(str(file))
        assert isinstance(shard, dict)
        for name, stored in checkpoint.tensors.items():
            if stored.file == file:
                tensor = shard.pop(stored.name)
                packed = name.rpartition(".")[0] in checkpoint.quantization  # kept as stored, to the bit
                tensor = tensor if packed else tensor.astype(dtype)
                mx.eval(tensor)
                tensors.append((name, tensor))
    return tensors


class MlxBackend:
    name = "mlx"

    def __init__(self, model: TextModel, device: Any, dtype: str) -> None:
        self.model, self.config = model, model.config
        self.device, self.dtype = device.name, dtype
        self._place = device
        self.exact_rows = device.name == "cpu"  # on Apple's GPUs it has not been measured

    def new_cache(self, batch_size: int = 1) -> Cache:
        return Cache(self.config, batch_size)

    def encode(self, tokens: NDArray[np.int32], cache: Cache, *, logits: bool = False) -> NDArray[np.float32] | None:
        check_tokens(tokens, self.config, cached=len(cache))
        with mx.stream(self._place):
            for start in range(0, tokens.shape[1], PREFILL_CHUNK):
                self.model.encode(mx.array(tokens[:, start : start + PREFILL_CHUNK]), cache)
                mx.eval(cache.arrays())  # keeps no more than one chunk's graph
            assert cache.last is not None
            return np.array(self.model.head(cache.last)) if logits else None

    def score(self, tokens: NDArray[np.int32], cache: Cache) -> NDArray[np.float32]:
        check_tokens(tokens, self.config)
        unconditioned, chunks = not len(cache), []
        with mx.stream(self._place):
            for start in range(0, tokens.shape[1], PREFILL_CHUNK):
                chunks.append(score(self.model, mx.array(tokens[:, start : start + PREFILL_CHUNK]), cache))
                mx.eval(chunks[-1], cache.arrays())
            logprobs = np.array(mx.concatenate(chunks, axis=1))
        logprobs[:, :unconditioned] = np.nan
        return logprobs

    def denoise(
        self,
        canvas: NDArray[np.int32],
        cache: Cache,
        *,
        temperature: float,
        noise_keys: NDArray[np.uint32] | None = None,
        self_conditioning: Any = None,
        frozen: NDArray[np.int32] | None = None,
    ) -> Denoised:
        check_tokens(canvas, self.config)
        noise = None
        if noise_keys is not None:
            noise = mx.array(bits(noise_keys[:, None], np.arange(canvas.shape[1], dtype=np.uint32)))
        with mx.stream(self._place):
            if isinstance(self_conditioning, Sequence):
                self_conditioning = mx.concatenate(list(self_conditioning))
            argmax, sampled, entropy, soft_embeddings = step(
                self.model,
                mx.array(canvas),
                cache,
                temperature=temperature,
                noise=noise,
                soft_embeddings=self_conditioning,
                frozen=None if frozen is None else mx.array(frozen),
            )
            mx.eval(argmax, sampled, entropy, soft_embeddings)
        return Denoised(np.array(argmax), np.array(sampled), np.array(entropy), soft_embeddings)

    def score_canvas(self, canvas: NDArray[np.int32], cache: Cache) -> NDArray[np.float32]:
        check_tokens(canvas, self.config)
        with mx.stream(self._place):
            tokens = mx.array(canvas)
            return np.array(logprobs(self.model, self.model.denoise(tokens, cache), tokens))

    def logits(
        self,
        tokens: NDArray[np.int32],
        cache: Cache,
        *,
        causal: bool = False,
        self_conditioning: Any = None,
        trace: list[NDArray[np.float32]] | None = None,
    ) -> NDArray[np.float32]:
        check_tokens(tokens, self.config)
        states: list[mx.array] = []
        with mx.stream(self._place):
            if causal:
                hidden = self.model.encode(mx.array(tokens), cache, states)
            else:
                hidden = self.model.denoise(mx.array(tokens), cache, self_conditioning, states)
            if trace is not None:
                trace.extend(np.array(state.astype(mx.float32)) for state in states)
            return np.array(self.model.head(hidden))

    def peak_memory(self) -> int | None:
        return mx.get_peak_memory()
