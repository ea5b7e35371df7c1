"""The line between deciding and computing: the :class:`Backend` protocol, and the choice of one.

A backend is one loaded checkpoint on one framework and device. What crosses the line is NumPy and small: token ids in, three
[B, L] arrays out. Logits (256 x 262,144 at the real size) and hidden states stay on the device, except in
:meth:`Backend.logits`, which exists to compare backends.
"""

import importlib
import importlib.util
import platform
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import BackendError, InputError

if TYPE_CHECKING:
    from mlx_diffgemma.checkpoint import Checkpoint

NAMES = ("mlx", "torch")
DTYPES = ("float32", "bfloat16")

#: Positions that a causal pass takes at a time: bounds the memory of a long prompt, and keeps every product large.
PREFILL_CHUNK = 2048

#: Positions whose logits are held at once in scoring: as many as a denoising step holds of the released model.
SCORE_TILE = 256


class Denoised(NamedTuple):
    """What one denoising step says of each canvas position.

    Attributes:
        argmax: int32 [B, L], the most likely token.
        sampled: int32 [B, L], a token drawn from softmax(logits / temperature); equals ``argmax`` where no noise keys were given.
        entropy: float32 [B, L], nats, of softmax(logits / temperature).
        self_conditioning: opaque but for [a:b], which is that of these rows; stays on the device; give it to the next step.
    """

    argmax: NDArray[np.int32]
    sampled: NDArray[np.int32]
    entropy: NDArray[np.float32]
    self_conditioning: Any


class Cache(Protocol):
    """Keys and values of the committed positions. Made by :meth:`Backend.new_cache`, filled by :meth:`Backend.encode`."""

    def __len__(self) -> int:
        """Committed positions."""
        ...

    def repeated(self, rows: int) -> Self:
        """A cache of ``rows`` rows that begins as this one of one row and goes on for itself; what is kept is shared."""
        ...

    def joined(self, others: Sequence[Self]) -> Self:
        """A cache whose rows are those of this one and then those of ``others``, of the same length; it goes on for itself."""
        ...

    def windows(self) -> Any:
        """What the sliding layers hold now, and lose as more is appended; it has a ``len``, the positions now, and ``nbytes``."""
        ...

    def cut(self, windows: Any) -> Self:
        """A cache of the positions that this one held at an earlier :meth:`windows`, which goes on for itself.

        Full layers are cut back; a sliding window cannot be rewound, and is put back as it was.
        """
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, those shared with other caches included."""
        ...


class Backend(Protocol):
    """One loaded checkpoint on one framework and device.

    Attributes:
        exact_rows: a row of a batch comes out bit for bit as it would alone. Elsewhere it is rounded by another order of sums, by
            about 1e-6 in float32, which a canvas that does not settle can blow up into other tokens.
    """

    name: str
    device: str
    dtype: str
    config: ModelConfig
    exact_rows: bool

    def new_cache(self, batch_size: int = 1) -> Cache:
        """An empty cache for ``batch_size`` rows."""
        ...

    def encode(self, tokens: NDArray[np.int32], cache: Cache, *, logits: bool = False) -> NDArray[np.float32] | None:
        """Run tokens [B, N] through the causal pass and append their keys and values to ``cache``; returns when that is done.

        With ``logits``, the logits after the last of them, float32 [B, V]: the same weights are a causal language model. N may
        be 0 where the cache holds something; the logits are then those after its last position.
        """
        ...

    def score(self, tokens: NDArray[np.int32], cache: Cache) -> NDArray[np.float32]:
        """As :meth:`encode`, and the natural-log probability of each token given all before it, float32 [B, N].

        Of the softmax of the logits after the softcap, at temperature 1. The first token's condition is what is in the cache;
        where that is empty it has none, and is NaN.
        """
        ...

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
        """One denoising step of ``canvas`` [B, L], L at most ``config.canvas_length``; ``cache`` is read and left as it is.

        Args:
            temperature: above 0; divides the logits before every statistic.
            noise_keys: one key a row (:func:`mlx_diffgemma.noise.sampling_keys`), or None to draw nothing.
            self_conditioning: that of the previous step's result, or None in a block's first step. Rows of one ([a:b]) stand for
                those rows; a sequence of several, whose rows follow one another, for rows that earlier were steps of their own.
            frozen: [L] for all rows, or [B, L]: token ids, -1 where the model may write. A frozen position answers its own
                token with entropy 0 and feeds it, one-hot, to the next step.
        """
        ...

    def score_canvas(self, canvas: NDArray[np.int32], cache: Cache) -> NDArray[np.float32]:
        """Natural-log probability [B, L] of each token of ``canvas`` [B, L] where the model sees all of it, the token included.

        One denoising pass at temperature 1, without self-conditioning; ``cache`` is read and left as it is.
        """
        ...

    def logits(
        self,
        tokens: NDArray[np.int32],
        cache: Cache,
        *,
        causal: bool = False,
        self_conditioning: Any = None,
        trace: list[NDArray[np.float32]] | None = None,
    ) -> NDArray[np.float32]:
        """Logits float32 [B, L, V] after the softcap, for comparing backends.

        Of a canvas, or, with ``causal``, of tokens that are appended to the cache as by :meth:`encode`. ``trace`` receives the
        hidden states float32 [B, L, H] after the embedding, after each layer and after the final norm.
        """
        ...

    def peak_memory(self) -> int | None:
        """The most bytes that the framework has held on the device at once, or None where it keeps no count."""
        ...


def check_tokens(tokens: NDArray[np.int32], config: ModelConfig, *, cached: int = 0) -> None:
    """Raise InputError unless ``tokens`` is [B, N], N at least 1 after an empty cache, with every id in the vocabulary."""
    if tokens.ndim == 2 and len(tokens) and not tokens.size and cached:
        return
    if tokens.ndim != 2 or not tokens.size:
        raise InputError(f"token ids must be of shape [rows, positions] with at least one position, got {list(tokens.shape)}")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        wrong = tokens[(tokens < 0) | (tokens >= config.vocab_size)][0]
        raise InputError(f"token id {wrong} is outside the vocabulary of {config.vocab_size} tokens")


def default_backend() -> str:
    """mlx on Apple silicon, torch where CUDA is, else torch on the CPU if it is installed, else mlx on the CPU."""
    installed = [name for name in NAMES if importlib.util.find_spec(name)]
    if not installed:
        raise BackendError(
            'neither mlx nor torch is installed; try: pip install "mlx-diffgemma[cpu]" (any Linux machine) or [cuda] (NVIDIA)'
        )
    if sys.platform == "darwin" and platform.machine() == "arm64" and "mlx" in installed:
        return "mlx"
    return "torch" if "torch" in installed else "mlx"


def chosen_backend(name: str | None = None, dtype: str | None = None) -> str:
    """``name``, or the default; raises InputError or BackendError where it, or ``dtype``, cannot be had here."""
    name = name or default_backend()
    if name not in NAMES:
        raise InputError(f"unknown backend {name!r}; known are {', '.join(NAMES)}")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
    if not importlib.util.find_spec(name):
        raise BackendError(f"backend {name!r} was asked for, but the package {name} is not installed")
    return name


def load_backend(
    checkpoint: "Checkpoint", name: str | None = None, *, device: str | None = None, dtype: str | None = None
) -> Backend:
    """Load a checkpoint's weights.

    Args:
        name: ``mlx`` or ``torch``; by default see :func:`default_backend`.
        device: ``cpu`` or ``gpu`` for mlx, ``cpu`` or ``cuda[:N]`` for torch; by default the accelerator where there is one.
        dtype: ``float32`` or ``bfloat16``; by default bfloat16 on an accelerator and float32 on a CPU. float16 overflows in
            this model (activations beyond 65,504).

    Raises:
        BackendError: the framework or the device is not there. CheckpointError: the weights do not fit the configuration.
    """
    name = chosen_backend(name, dtype)
    try:
        wing = importlib.import_module(f"mlx_diffgemma.backends.{name}.backend")
    except ImportError as broken:
        raise BackendError(f"backend {name!r} cannot be imported: {str(broken).partition(chr(10))[0]}") from broken
    backend: Backend = wing.load(checkpoint, device=device, dtype=dtype)
    return backend
