"""The torch wing's side of the :class:`~mlx_diffgemma.backends.Backend` protocol: loading, and NumPy in and out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from mlx_diffgemma.backends import PREFILL_CHUNK, Denoised, check_tokens
from mlx_diffgemma.backends.torch.cache import Cache
from mlx_diffgemma.backends.torch.model import TextModel
from mlx_diffgemma.backends.torch.quantized import quantize_modules
from mlx_diffgemma.backends.torch.step import logprobs, score, step
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.errors import BackendError, InputError
from mlx_diffgemma.noise import bits

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(checkpoint: Checkpoint, *, device: str | None = None, dtype: str | None = None) -> "TorchBackend":
    """Load ``checkpoint``; see :func:`mlx_diffgemma.backends.load_backend`.

    Tensors are memory-mapped. On a CPU those already of the wanted type stay so, and are never copied.
    """
    place = _device(device)
    dtype = dtype or ("float32" if place.type == "cpu" else "bfloat16")
    with torch.device("meta"):
        model = TextModel(checkpoint.config)
    quantize_modules(model, checkpoint.quantization, _DTYPES[dtype])
    checkpoint.check({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    model.load_state_dict(_tensors(checkpoint, place, _DTYPES[dtype]), assign=True)
    return TorchBackend(model.eval().requires_grad_(False), place, dtype)


def _device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise InputError(f"unknown torch device {device!r}; try cpu or cuda") from None
    if place.type not in ("cpu", "cuda"):
        raise InputError(f"the torch backend runs on cpu or cuda, not on {device!r}")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise BackendError(f"device {device!r} was asked for, but this machine has {torch.cuda.device_count()} CUDA devices")
    return place


def _tensors(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Mapping[str, Tensor]:
    tensors = {}
    for name, stored in checkpoint.tensors.items():
        # A file's pages count as ours until it is closed: opened a tensor at a time, no more than one is held in two types.
        with safe_open(stored.file, framework="pt", device=str(device)) as shard:
            tensor = shard.get_tensor(stored.name)
            packed = name.rpartition(".")[0] in checkpoint.quantization  # kept as stored, to the bit
            tensors[name] = tensor if packed else tensor.to(dtype)
    return tensors


class TorchBackend:
    name = "torch"
    exact_rows = False  # the libraries choose how to sum by the number of rows

    def __init__(self, model: TextModel, device: torch.device, dtype: str) -> None:
        self.model, self.config = model, model.config
        self.device, self.dtype = str(device), dtype

    def new_cache(self, batch_size: int = 1) -> Cache:
        return Cache(self.config, batch_size)

    @torch.inference_mode()
    def encode(self, tokens: NDArray[np.int32], cache: Cache, *, logits: bool = False) -> NDArray[np.float32] | None:
        check_tokens(tokens, self.config, cached=len(cache))
        for start in range(0, tokens.shape[1], PREFILL_CHUNK):
            self.model.encode(self._to_device(tokens[:, start : start + PREFILL_CHUNK]), cache)
        assert cache.last is not None
        if logits:
            return self._to_numpy(self.model.head(cache.last))
        if cache.last.is_cuda:
            torch.cuda.synchronize(cache.last.device)
        return None

    @torch.inference_mode()
    def score(self, tokens: NDArray[np.int32], cache: Cache) -> NDArray[np.float32]:
        check_tokens(tokens, self.config)
        unconditioned = not len(cache)
        chunks = self._to_device(tokens).split(PREFILL_CHUNK, dim=1)
        logprobs = self._to_numpy(torch.cat([score(self.model, chunk, cache) for chunk in chunks], dim=1))
        logprobs[:, :unconditioned] = np.nan
        return logprobs

    @torch.inference_mode()
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
            positions = np.arange(canvas.shape[1], dtype=np.uint32)
            noise = torch.from_numpy(bits(noise_keys[:, None], positions).view(np.int32)).to(self.device)
        if isinstance(self_conditioning, Sequence):
            self_conditioning = torch.cat(list(self_conditioning))
        argmax, sampled, entropy, soft_embeddings = step(
            self.model,
            self._to_device(canvas),
            cache,
            temperature=temperature,
            noise=noise,
            soft_embeddings=self_conditioning,
            frozen=None if frozen is None else self._to_device(frozen),
        )
        arrays = self._to_numpy(argmax.int()), self._to_numpy(sampled.int()), self._to_numpy(entropy)
        return Denoised(*arrays, soft_embeddings)

    @torch.inference_mode()
    def score_canvas(self, canvas: NDArray[np.int32], cache: Cache) -> NDArray[np.float32]:
        check_tokens(canvas, self.config)
        tokens = self._to_device(canvas)
        return self._to_numpy(logprobs(self.model, self.model.denoise(tokens, cache), tokens))

    @torch.inference_mode()
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
        states: list[Tensor] = []
        if causal:
            hidden = self.model.encode(self._to_device(tokens), cache, states)
        else:
            hidden = self.model.denoise(self._to_device(tokens), cache, self_conditioning, states)
        if trace is not None:
            trace.extend(self._to_numpy(state.float()) for state in states)
        return self._to_numpy(self.model.head(hidden))

    def peak_memory(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.device.startswith("cuda") else None

    def _to_device(self, tokens: NDArray[np.int32]) -> Tensor:
        return torch.from_numpy(tokens.astype(np.int64)).to(self.device)

    @staticmethod
    def _to_numpy(tensor: Tensor) -> NDArray[Any]:
        array: NDArray[Any] = tensor.cpu().numpy()
        return array
