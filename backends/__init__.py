"""The :class:`Backend` protocol, which separates deciding from computing, and the functions that choose and load a backend.

A backend is one loaded checkpoint on one framework and device. It does two kinds of work, and each call takes one or more items
of one kind. A :class:`Piece` is a stretch of one text that the causal pass appends to its cache. A :class:`Row` is one canvas in
one denoising step. Texts are independent: each has its own length, temperature and template.

Only small NumPy arrays go in and out: token ids in, three arrays of a canvas's length out. Logits (256 x 262,144 at the real
size) and hidden states stay on the device, except in :meth:`Backend.logits`, which exists to compare backends.
"""

import importlib
import importlib.util
import math
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.backends.memory import require_memory
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import BackendError, ComputationError, InputError
from mlx_diffgemma.vision.patches import Patches
from mlx_diffgemma.vision_config import VisionConfig

NAMES = ("mlx", "torch")
DTYPES = ("float32", "bfloat16")
BATCHES = ("exact", "fast")

#: Default for the most rows of different texts in one pass.
MAX_BATCH = 8

#: Positions whose logits are held at once, in a denoising step and in scoring: one canvas of the released model.
SCORE_TILE = 256

#: Queries of a causal pass that attend at once. This bounds the mask and the scores, whatever the prompt's length.
QUERY_TILE = 256

#: Keys that are scored at once where a framework has no fused attention.
KEY_TILE = 4096


#: Receives the bytes of weights that are loaded, and of all weights.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Place:
    """Where and how a model can run. :func:`find_place` makes it.

    Attributes:
        backend: ``mlx`` or ``torch``.
        device, dtype: as in :func:`load_backend`.
        dtypes: the number types that the backend can compute in on the device.
        memory: free bytes on the device, or None if the system does not say.
    """

    backend: str
    device: str
    dtype: str
    dtypes: tuple[str, ...]
    memory: int | None


class Cache(Protocol):
    """Keys and values of one text's committed positions. Made by :meth:`Backend.new_cache`, filled by :meth:`Backend.encode`.

    Buffers have room after the committed positions. Canvases and new positions are written there.
    """

    def __len__(self) -> int:
        """Committed positions."""
        ...

    def fork(self) -> Self:
        """A cache that starts with this one's positions and grows on its own. They are shared, and copied only when necessary."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, including those shared with forks."""
        ...

    def buffers(self) -> Mapping[int, int]:
        """Bytes of each buffer, keyed by the buffer's identity. Forks that share a buffer have the same key."""
        ...


class Features(Protocol):
    """The soft tokens of one image, on the device. Made by :meth:`Backend.see`."""

    def __len__(self) -> int:
        """How many soft tokens."""
        ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True, eq=False)
class ImageSpan:
    """An image in a :class:`Piece`.

    Attributes:
        start: the place in the piece where its soft tokens begin.
        features: take the places of the embeddings of len(features) tokens.
    """

    start: int
    features: Features


@dataclass(frozen=True, eq=False)
class Piece:
    """A stretch of one text. The causal pass reads it at once and appends it to the text's cache.

    Attributes:
        tokens: int32 [N], N at least 1.
        cache: holds everything before the piece; filled in place.
        images: the images in it, in order. None is cut by the piece's ends. Who sees whom within an image is
            ``config.image_mask``.
    """

    tokens: NDArray[np.int32]
    cache: Cache
    images: tuple[ImageSpan, ...] = ()


@dataclass(frozen=True, eq=False)
class Row:
    """One canvas, in one denoising step.

    Attributes:
        canvas: int32 [L], L from 1 to ``config.canvas_length``.
        cache: holds everything before the canvas; read, not changed.
        temperature: above 0. The logits are divided by it before every statistic.
        noise_key: the key of this step (:func:`mlx_diffgemma.noise.sampling_key`), or None to draw nothing.
        self_conditioning: from the :class:`Denoised` of the canvas's previous step; None in its first step.
        frozen: int32 [L], token ids, -1 where the model may write; None if it may write everywhere. A frozen position returns
            its own token with entropy 0 and passes it, one-hot, to the next step.
    """

    canvas: NDArray[np.int32]
    cache: Cache
    temperature: float
    noise_key: int | None = None
    self_conditioning: Any = None
    frozen: NDArray[np.int32] | None = None


class Denoised(NamedTuple):
    """The result of one denoising step for one row.

    Attributes:
        argmax: int32 [L], the most likely tokens.
        sampled: int32 [L], tokens drawn from softmax(logits / temperature); equals ``argmax`` if the row has no noise key.
        entropy: float32 [L], nats, of softmax(logits / temperature).
        self_conditioning: opaque; stays on the device; goes into the next step's :class:`Row`.
    """

    argmax: NDArray[np.int32]
    sampled: NDArray[np.int32]
    entropy: NDArray[np.float32]
    self_conditioning: Any


#: Waits for a pass that was launched, and returns one result per row. To be called once.
Pending = Callable[[], list[Denoised]]


class Backend(Protocol):
    """One loaded checkpoint on one framework and device.

    Attributes:
        exact_rows: True if a row, or a piece, has the same bits in a pass of several as in a pass of its own. If False, sums
            run in another order and differ by about 1e-6 in float32. A canvas that does not settle can turn that into other
            tokens.
    """

    name: str
    device: str
    dtype: str
    config: ModelConfig
    exact_rows: bool

    def new_cache(self) -> Cache:
        """An empty cache."""
        ...

    def see(self, images: Sequence[Patches]) -> list[Features]:
        """Run the patches of images through the vision tower, one image after another. Returns when the work is done.

        Raises InputError if the checkpoint has no vision tower (``config.vision`` is None).
        """
        ...

    def encode(self, pieces: Sequence[Piece]) -> None:
        """Run pieces of different texts through the causal pass, and append their keys and values to their caches.

        Returns when the work is done.
        """
        ...

    def next_logits(self, caches: Sequence[Cache]) -> NDArray[np.float32]:
        """Logits float32 [B, V] after the last position of each cache. The same weights also form a causal language model."""
        ...

    def score(self, pieces: Sequence[Piece]) -> list[NDArray[np.float32]]:
        """Encode as :meth:`encode` does, and return float32 [N] per piece: each token's natural-log probability given all before.

        The distribution is the softmax of the logits after the softcap, at temperature 1. A text's first token has nothing
        before it and scores NaN.
        """
        ...

    def launch(self, rows: Sequence[Row]) -> Pending:
        """Begin one denoising step of each row, in one pass over the model.

        A device that works beside the host begins at once. A backend that computes on the host does so in the wait. What is
        wrong with the rows is raised here or by the wait. Nobody has to wait: a pass writes only into room behind the caches'
        committed positions, so one that is dropped leaves nothing behind.
        """
        ...

    def denoise(self, rows: Sequence[Row]) -> list[Denoised]:
        """:meth:`launch`, and the wait for its results."""
        ...

    def score_canvas(self, rows: Sequence[Row]) -> list[NDArray[np.float32]]:
        """Natural-log probability float32 [L] of each token of a canvas. The model sees the whole canvas, including the token.

        The distribution is the same softmax(logits / temperature) as in :meth:`launch`. Noise keys and frozen positions are
        ignored.
        """
        ...

    def logits(
        self, parts: Sequence[Piece | Row], trace: list[list[NDArray[np.float32]]] | None = None
    ) -> list[NDArray[np.float32]]:
        """Logits float32 [N, V] after the softcap at every position of each part, for comparing backends.

        All parts are of one kind. Pieces are appended to their caches, as in :meth:`encode`. ``trace`` receives one list per
        part: its hidden states float32 [N, H] after the embedding (for a canvas, with the self-conditioning), after each layer
        and after the final norm.
        """
        ...

    def vision_states(self, image: Patches) -> tuple[Features, list[NDArray[np.float32]]]:
        """The features of an image as from :meth:`see`, and its states in the vision tower, for comparing backends.

        The states are float32 [P, H] after the patch embedding and after each layer, [n, H] after the pooling, and last the
        features [n, hidden size of the text model].
        """
        ...

    def peak_memory(self) -> int | None:
        """The most bytes that the framework has held on the device at once, or None if it does not count them."""
        ...


def check_tokens(tokens: NDArray[np.int32], config: ModelConfig) -> None:
    """Raise InputError unless ``tokens`` is [N], N at least 1, with every id in the vocabulary."""
    if tokens.ndim != 1 or not tokens.size:
        raise InputError(f"token ids must be a list of at least one id, got shape {list(tokens.shape)}")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        wrong = tokens[(tokens < 0) | (tokens >= config.vocab_size)][0]
        raise InputError(f"token id {wrong} is outside the vocabulary of {config.vocab_size} tokens")


def check_images(piece: Piece) -> None:
    """Raise InputError unless the images of a piece lie in it, in order, and do not overlap."""
    end = 0
    for image in piece.images:
        start, stop = image.start, image.start + len(image.features)
        if start < end or stop > len(piece.tokens):
            raise InputError(
                f"an image takes tokens {start} to {stop - 1} of a piece of {len(piece.tokens)}; images must lie in the piece, "
                f"in order, and must not overlap"
            )
        end = stop


def check_patches(image: Patches, vision: VisionConfig | None) -> None:
    """Raise InputError if there is no vision tower, or unless the patches are such as it takes."""
    if vision is None:
        raise InputError("this checkpoint has no vision tower and reads no images; leave them out, or use one that has")
    rows, columns, side = image.rows, image.columns, vision.pooling_kernel_size
    size = 3 * vision.patch_size**2
    if image.pixels.shape != (rows * columns, size) or min(rows, columns) < 1 or rows % side or columns % side:
        raise InputError(
            f"patches {list(image.pixels.shape)} of {rows} x {columns} do not fit the model, which takes patches of {size} "
            f"numbers and sides in multiples of {side}; make them with read_picture"
        )
    if max(rows, columns) > vision.position_embedding_size:
        raise InputError(
            f"an image of {rows} x {columns} patches is larger than the model's {vision.position_embedding_size} along a side; "
            f"use a smaller budget"
        )
    if image.soft_tokens * side**2 != rows * columns:
        raise InputError(f"{rows} x {columns} patches make {rows * columns // side**2} soft tokens, not {image.soft_tokens}")


def check_rows(rows: Sequence[Row], config: ModelConfig) -> None:
    """Raise InputError unless each row's length, template and temperature are what :class:`Row` says."""
    for row in rows:
        if len(row.canvas) > config.canvas_length:
            raise InputError(f"a canvas of {len(row.canvas)} tokens exceeds the model's {config.canvas_length}; shorten it")
        if row.frozen is not None and row.frozen.shape != row.canvas.shape:
            raise InputError(f"frozen has shape {list(row.frozen.shape)}, but must have the canvas's, {list(row.canvas.shape)}")
        if not row.temperature > 0:
            raise InputError(f"temperature must be above 0, got {row.temperature}")


def check_computed(values: NDArray[np.float32], doing: str) -> None:
    """Raise ComputationError if a pass computed NaN or infinity for one row. Each text's own loop calls this, so only it ends.

    Args:
        values: entropies, logits or log-probabilities. A mask may make some of them -inf, but not all.
        doing: the pass, such as "a denoising step".
    """
    if values.size and not math.isfinite(most := values.max()):  # the maximum is NaN if there is one
        raise ComputationError(
            f"the model computed {'NaN' if math.isnan(most) else 'infinity'} in {doing}; the weights or the device are damaged: "
            "try `mlx-diffgemma verify MODEL`"
        )


def scored(backend: "Backend", piece: Piece) -> NDArray[np.float32]:
    """:meth:`Backend.score` of one piece. Raises ComputationError unless all tokens that have a probability have a number."""
    first = 0 if len(piece.cache) else 1
    [logprobs] = backend.score([piece])
    check_computed(logprobs[first:], "the causal pass")
    return logprobs


def scored_canvas(backend: "Backend", row: Row) -> NDArray[np.float32]:
    """:meth:`Backend.score_canvas` of one row. Raises ComputationError unless all are numbers."""
    [logprobs] = backend.score_canvas([row])
    check_computed(logprobs, "scoring a canvas")
    return logprobs


def check_process() -> None:
    """Raise BackendError in a process that was forked from one that had loaded a model. The frameworks' threads are not in it."""
    if _loaded and os.getpid() not in _loaded:
        raise BackendError(
            "this process was forked from one that had loaded a model, and lacks that one's threads; start it with "
            'multiprocessing\'s "spawn" method instead, and load the model in the new process'
        )


# The process that has loaded a model, if any.
_loaded: set[int] = set()


def rows_in_pass(backend: Backend, batch: str, max_batch: int = MAX_BATCH) -> int:
    """How many rows, or pieces, of different texts one pass may take.

    Args:
        batch: ``exact`` puts several into one pass only if that changes no bit (:attr:`Backend.exact_rows`). ``fast`` always
            does; rounding may then give other tokens than the same text gets alone.
        max_batch: most rows in a pass; bounds the memory of the pass.

    Raises InputError for any other ``batch``.
    """
    if batch not in BATCHES:
        raise InputError(f"unknown batch {batch!r}; known are {' and '.join(BATCHES)}")
    return max_batch if batch == "fast" or backend.exact_rows else 1


def default_backend() -> str:
    """mlx on Apple silicon, else torch if it is installed, else mlx. Raises BackendError if neither is installed."""
    installed = [name for name in NAMES if importlib.util.find_spec(name)]
    if not installed:
        raise BackendError(
            'neither mlx nor torch is installed; try: pip install "mlx-diffgemma[cpu]" (any Linux machine) or [cuda] (NVIDIA)'
        )
    if sys.platform == "darwin" and platform.machine() == "arm64" and "mlx" in installed:
        return "mlx"
    return "torch" if "torch" in installed else "mlx"


def chosen_backend(name: str | None = None, dtype: str | None = None) -> str:
    """Return ``name``, or the default backend.

    Raises InputError if ``name`` or ``dtype`` is unknown, and BackendError if the backend's package is not installed.
    """
    name = name or default_backend()
    if name not in NAMES:
        raise InputError(f"unknown backend {name!r}; known are {', '.join(NAMES)}")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
    if not importlib.util.find_spec(name):
        raise BackendError(f"backend {name!r} needs the package {name}, which is not installed; install it or choose another")
    return name


def find_place(name: str | None = None, *, device: str | None = None, dtype: str | None = None) -> Place:
    """The place that arguments of :func:`load_backend` name. Raises its errors, except those about a checkpoint.

    This imports the framework.
    """
    place: Place = _wing(chosen_backend(name, dtype)).place(device, dtype)
    return place


def load_backend(
    checkpoint: Checkpoint,
    name: str | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    image_mask: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Backend:
    """Load a checkpoint's weights. Those that are not in the hub's cache are downloaded, when everything else is checked.

    Args:
        name: ``mlx`` or ``torch``; default: see :func:`default_backend`.
        device: ``cpu`` or ``gpu`` for mlx, ``cpu`` or ``cuda[:N]`` for torch; default: the accelerator, if there is one.
        dtype: ``float32`` or ``bfloat16``; default: bfloat16 on an accelerator and float32 on a CPU. float16 would overflow in
            this model (activations beyond 65,504).
        force: load the checkpoint even if it needs more memory than is free.
        image_mask: one of :data:`mlx_diffgemma.config.IMAGE_MASKS`; default: as ``config.json`` says.
        progress: called after each tensor.

    Raises:
        BackendError: the framework, the device or the memory is not available.
        CheckpointError: the weights do not fit the configuration, are damaged, or cannot be downloaded.
    """
    check_process()
    checkpoint = checkpoint.with_image_mask(image_mask)
    place = find_place(name, device=device, dtype=dtype)
    if not force:
        require_memory(checkpoint, place)
    _loaded.add(os.getpid())
    backend: Backend = _wing(place.backend).load(checkpoint, place, progress)
    return backend


def _wing(name: str) -> Any:
    try:
        return importlib.import_module(f"mlx_diffgemma.backends.{name}.backend")
    except ImportError as broken:
        raise BackendError(f"backend {name!r} cannot be imported: {str(broken).partition(chr(10))[0]}") from broken
