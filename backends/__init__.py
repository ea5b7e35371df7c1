"""The line between deciding and computing: the :class:`Backend` protocol, and the choice of one.

A backend is one loaded checkpoint on one framework and device. Two kinds of work cross the line, and each call takes one or more
of one kind: a :class:`Piece` is a stretch of one text that the causal pass appends to its cache; a :class:`Row` is one canvas in
one denoising step. Texts know nothing of each other: their lengths, temperatures and templates are their own.

What crosses is NumPy and small: token ids in, three arrays of a canvas's length out. Logits (256 x 262,144 at the real size)
and hidden states stay on the device, except in :meth:`Backend.logits`, which exists to compare backends.
"""

import importlib
import importlib.util
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import BackendError, InputError

if TYPE_CHECKING:
    from mlx_diffgemma.checkpoint import Checkpoint

NAMES = ("mlx", "torch")
DTYPES = ("float32", "bfloat16")
BATCHES = ("exact", "fast")

#: Rows of different texts in one pass, unless another number is asked for.
MAX_BATCH = 8

#: Positions whose logits are held at once in scoring: as many as a denoising step holds of the released model.
SCORE_TILE = 256

#: Queries of a causal pass that look at the keys at once: bounds the mask and the scores, whatever the prompt's length.
QUERY_TILE = 256

#: Keys whose scores are made at once where a wing has no fused attention.
KEY_TILE = 4096


class Cache(Protocol):
    """Keys and values of one text's committed positions. Made by :meth:`Backend.new_cache`, filled by :meth:`Backend.encode`.

    Buffers have room behind the committed positions: a canvas is written there, and what is appended too.
    """

    def __len__(self) -> int:
        """Committed positions."""
        ...

    def fork(self) -> Self:
        """A cache that begins as this one and goes on for itself. What is committed is shared, and copied when it must be."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, those shared with forks included."""
        ...

    def buffers(self) -> Mapping[int, int]:
        """Bytes of each buffer, by the buffer's identity: forks that share one name the same."""
        ...


@dataclass(frozen=True, eq=False)
class Piece:
    """A stretch of one text: what the causal pass reads at once, and appends to the text's cache.

    Attributes:
        tokens: int32 [N], N at least 1.
        cache: holds all that comes before; filled in place.
    """

    tokens: NDArray[np.int32]
    cache: Cache


@dataclass(frozen=True, eq=False)
class Row:
    """One canvas, in one denoising step.

    Attributes:
        canvas: int32 [L], L from 1 to ``config.canvas_length``.
        cache: what comes before the canvas; read, and left as it is.
        temperature: above 0; divides the logits before every statistic.
        noise_key: of this step (:func:`mlx_diffgemma.noise.sampling_key`), or None to draw nothing.
        self_conditioning: that of the :class:`Denoised` of the canvas's previous step; None in its first step.
        frozen: int32 [L], token ids, -1 where the model may write; None where it may everywhere. A frozen position answers its
            own token with entropy 0 and feeds it, one-hot, to the next step.
    """

    canvas: NDArray[np.int32]
    cache: Cache
    temperature: float
    noise_key: int | None = None
    self_conditioning: Any = None
    frozen: NDArray[np.int32] | None = None


class Denoised(NamedTuple):
    """What one denoising step says of a row.

    Attributes:
        argmax: int32 [L], the most likely tokens.
        sampled: int32 [L], tokens drawn from softmax(logits / temperature); equals ``argmax`` where no noise key was given.
        entropy: float32 [L], nats, of softmax(logits / temperature).
        self_conditioning: opaque; stays on the device; goes into the next step's :class:`Row`.
    """

    argmax: NDArray[np.int32]
    sampled: NDArray[np.int32]
    entropy: NDArray[np.float32]
    self_conditioning: Any


class Backend(Protocol):
    """One loaded checkpoint on one framework and device.

    Attributes:
        exact_rows: a row, or a piece, comes out of a pass of several bit for bit as it would alone. Elsewhere it is rounded by
            another order of sums, by about 1e-6 in float32, which a canvas that does not settle can blow up into other tokens.
    """

    name: str
    device: str
    dtype: str
    config: ModelConfig
    exact_rows: bool

    def new_cache(self) -> Cache:
        """An empty cache."""
        ...

    def encode(self, pieces: Sequence[Piece]) -> None:
        """Run pieces of different texts through the causal pass, and append their keys and values to their caches.

        Returns when that is done.
        """
        ...

    def next_logits(self, caches: Sequence[Cache]) -> NDArray[np.float32]:
        """Logits float32 [B, V] after the last position of each cache: the same weights are a causal language model."""
        ...

    def score(self, pieces: Sequence[Piece]) -> list[NDArray[np.float32]]:
        """As :meth:`encode`, and the natural-log probability of each token given all before it, float32 [N] a piece.

        Of the softmax of the logits after the softcap, at temperature 1. A text's first token has nothing before it: NaN.
        """
        ...

    def denoise(self, rows: Sequence[Row]) -> list[Denoised]:
        """One denoising step of each row, in one pass over the model."""
        ...

    def score_canvas(self, rows: Sequence[Row]) -> list[NDArray[np.float32]]:
        """Natural-log probability float32 [L] of each token of a canvas where the model sees all of it, the token included.

        Of the same softmax(logits / temperature) as :meth:`denoise`; noise keys and frozen positions say nothing here.
        """
        ...

    def logits(
        self, parts: Sequence[Piece | Row], trace: list[list[NDArray[np.float32]]] | None = None
    ) -> list[NDArray[np.float32]]:
        """Logits float32 [N, V] after the softcap at every position of each part, for comparing backends.

        All parts are of one kind. Pieces are appended to their caches, as by :meth:`encode`. ``trace`` receives a list a part:
        its hidden states float32 [N, H] after the embedding (of a canvas with the self-conditioning), after each layer and
        after the final norm.
        """
        ...

    def peak_memory(self) -> int | None:
        """The most bytes that the framework has held on the device at once, or None where it keeps no count."""
        ...


def check_tokens(tokens: NDArray[np.int32], config: ModelConfig) -> None:
    """Raise InputError unless ``tokens`` is [N], N at least 1, with every id in the vocabulary."""
    if tokens.ndim != 1 or not tokens.size:
        raise InputError(f"token ids must be a list of at least one, got shape {list(tokens.shape)}")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        wrong = tokens[(tokens < 0) | (tokens >= config.vocab_size)][0]
        raise InputError(f"token id {wrong} is outside the vocabulary of {config.vocab_size} tokens")


def check_rows(rows: Sequence[Row], config: ModelConfig) -> None:
    """Raise InputError unless each row's length, template and temperature are what :class:`Row` says."""
    for row in rows:
        if len(row.canvas) > config.canvas_length:
            raise InputError(f"a canvas of {len(row.canvas)} tokens is longer than the model's, {config.canvas_length}")
        if row.frozen is not None and row.frozen.shape != row.canvas.shape:
            raise InputError(f"frozen has shape {list(row.frozen.shape)}, and its canvas {list(row.canvas.shape)}")
        if not row.temperature > 0:
            raise InputError(f"temperature must be above 0, got {row.temperature}")


def rows_in_pass(backend: Backend, batch: str, max_batch: int = MAX_BATCH) -> int:
    """How many rows, or pieces, of different texts one pass may take.

    Args:
        batch: ``exact`` puts several into one pass only where that changes no bit (:attr:`Backend.exact_rows`); ``fast`` does so
            everywhere, and tokens may then differ in rounding from those of a text that is written alone.
        max_batch: rows in a pass at most; bounds its memory.

    Raises InputError for another ``batch``.
    """
    if batch not in BATCHES:
        raise InputError(f"unknown batch {batch!r}; known are {' and '.join(BATCHES)}")
    return max_batch if batch == "fast" or backend.exact_rows else 1


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
