"""Conformance: checks whether backends compute the same results from one checkpoint.

Each backend runs the same passes over the same random tokens. One backend is the baseline, which may be `transformers` itself
(:data:`REFERENCE`). The passes go from simple to complex, so the first pass that differs shows where to look: a causal pass over
a prompt; a canvas after the prompt; the canvas of the next step, with the self-conditioning of the first step; a canvas in the
next block, after a committed block; and a short text, written by the sampler that all backends share.

If the checkpoint has a vision tower, two small images of random pixels go through it too. Two more passes follow: a causal pass
over a text with these images, under the model's own image mask, and a canvas after it.

Models are loaded one after the other. The logits of the baseline stay in memory, for each position of the prompt and of three
canvases: 168 MB by default with the released model's vocabulary of 262,144. Images add the positions of their text and of one
canvas, another 117 MB.
"""

import gc
import importlib
import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma import noise
from mlx_diffgemma.backends import DTYPES, NAMES, Backend, ImageSpan, Piece, Place, Progress, Row, find_place, load_backend
from mlx_diffgemma.backends.memory import require_memory
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.errors import BackendError, ComputationError, InputError
from mlx_diffgemma.prompts import PromptTokens
from mlx_diffgemma.reports.pictures import random_picture
from mlx_diffgemma.sampler import Block, Draft, Text, block_diffusion, check_seed
from mlx_diffgemma.vision.patches import Patches, PlacedImage
from mlx_diffgemma.vision_config import VisionConfig

#: The name of the backend that is `transformers` on the CPU.
REFERENCE = "reference"

#: In float32: the largest absolute difference of logits, after the softcap, and the largest RMS of the difference of an image's
#: soft tokens, divided by their RMS. The size of soft tokens depends on the checkpoint, so theirs is relative.
TOLERANCE = 1e-4

#: In bfloat16: the largest RMS of the difference of an image's soft tokens, divided by their RMS.
BFLOAT16_IMAGES = 0.1

#: In bfloat16, the median over a pass's positions of the Kullback-Leibler divergence must be below this, in nats. The mean would
#: not be useful: if two experts are almost equally likely, rounding sends a token to the other one, and a few positions differ
#: far more.
BFLOAT16_KL = 1e-2

BLOCKS, STEPS = 2, 4  # blocks of the short text, and denoising steps per block

#: The images, as rows and columns of soft tokens: a wide one and a tall one. Large ones take a CPU minutes.
IMAGES = ((2, 6), (4, 1))


@dataclass(frozen=True)
class PassComparison:
    """One pass through the model, compared with the baseline's.

    Attributes:
        name: the name of the pass.
        max_abs, mean_abs: largest and mean absolute difference of the logits after the softcap, over positions and tokens.
        mean_kl, median_kl: mean and median over positions of KL(baseline || backend) of the softmax of the logits, in nats.
        same_argmax: share of the positions with the same most likely token, 0 to 1.
        states: one number per hidden state (after the embedding and the self-conditioning, after each layer, after the final
            norm): the RMS of the difference divided by the RMS of the baseline's state.
    """

    name: str
    max_abs: float
    mean_abs: float
    mean_kl: float
    median_kl: float
    same_argmax: float
    states: tuple[float, ...]


@dataclass(frozen=True)
class ImageComparison:
    """What the vision tower computes of one image, compared with the baseline's.

    Attributes:
        rows, columns: the size of the image in patches.
        max_abs, mean_abs: largest and mean absolute difference of the soft tokens.
        states: one number per hidden state (after the patch embedding, after each layer of the tower, after the pooling, and the
            soft tokens): the RMS of the difference divided by the RMS of the baseline's state.
    """

    rows: int
    columns: int
    max_abs: float
    mean_abs: float
    states: tuple[float, ...]

    @property
    def name(self) -> str:
        return f"image of {self.rows} x {self.columns} patches"


@dataclass(frozen=True)
class Comparison:
    """A backend compared with the baseline.

    Attributes:
        images: empty if the checkpoint has no vision tower.
        entropy: largest difference of a position's entropy in the text's first denoising step, in nats.
        tokens: how many tokens were written.
        different_tokens: how many of them differ from the baseline's.
        first_different: the position of the first token that differs. None if all are the same.
    """

    backend: str
    device: str
    images: tuple[ImageComparison, ...]
    passes: tuple[PassComparison, ...]
    entropy: float
    tokens: int
    different_tokens: int
    first_different: int | None


@dataclass(frozen=True)
class Report:
    """The result of :func:`verify`. ``baseline`` and :attr:`Comparison.backend` are the names that the caller gave.

    Attributes:
        image_mask: the checkpoint's own, one of :data:`~mlx_diffgemma.config.IMAGE_MASKS`; None if it has no vision tower.
    """

    checkpoint: Path
    baseline: str
    dtype: str
    prompt_length: int
    canvas_length: int
    image_mask: str | None
    seed: int
    tolerance: float
    comparisons: tuple[Comparison, ...]

    def problems(self) -> list[str]:
        """The problems that were found, at most one line per backend. Empty if all backends agree.

        In float32, the soft tokens of images and the logits of every pass must be within ``tolerance`` of the baseline's, and the
        tokens must be the same. In bfloat16, the soft tokens must be within :data:`BFLOAT16_IMAGES`, and the median divergence
        must be below :data:`BFLOAT16_KL`. Tokens may then differ and are not checked.
        """
        return [f"{each.backend}: {problem}" for each in self.comparisons if (problem := self._problem(each))]

    def _problem(self, comparison: Comparison) -> str | None:
        # The comparisons are written so that NaN is a problem.
        allowed = self.tolerance if self.dtype == "float32" else BFLOAT16_IMAGES
        for image in comparison.images:
            if not image.states[-1] <= allowed:
                named = zip(tower_state_names(len(image.states)), image.states, strict=True)
                where = next(name for name, value in named if not value <= allowed)
                return (
                    f"soft tokens of the {image.name} differ by {image.states[-1]:.1e} of their size, more than {allowed:.0e}; "
                    f"the first state of the vision tower that differs: {where}"
                )
        for one in comparison.passes:
            if self.dtype == "float32" and not one.max_abs <= self.tolerance:
                wrong = f"logits of the {one.name} differ by {one.max_abs:.1e}, more than {self.tolerance:.0e}"
                state = next((index for index, value in enumerate(one.states) if not value <= self.tolerance), None)
                if state is None:
                    return f"{wrong}; the hidden states agree, so look at the output head"
                return f"{wrong}; the first hidden state that differs: {state_names(len(one.states))[state]}"
            if self.dtype != "float32" and not one.median_kl < BFLOAT16_KL:
                return f"median KL of the {one.name} is {one.median_kl:.1e} nats, not below {BFLOAT16_KL:.0e}"
        if self.dtype == "float32" and comparison.different_tokens:
            count, first = comparison.different_tokens, comparison.first_different
            return f"{count} of {comparison.tokens} tokens differ, the first at position {first}, though the logits agree"
        return None


def state_names(count: int) -> list[str]:
    """The names of the ``count`` hidden states in :attr:`PassComparison.states`."""
    return ["embedding", *(f"layer {layer}" for layer in range(count - 2)), "final norm"]


def tower_state_names(count: int) -> list[str]:
    """The names of the ``count`` hidden states in :attr:`ImageComparison.states`."""
    return ["patch embedding", *(f"tower layer {layer}" for layer in range(count - 3)), "pooling", "soft tokens"]


def check_choices(
    backends: Sequence[str], *, against: str | None, dtype: str, seed: int = 0, tolerance: float = TOLERANCE
) -> list[str]:
    """The baseline and the other backends of :func:`verify`. Raises InputError or BackendError if one cannot run here."""
    names = list(dict.fromkeys(backends if against is None else [against, *backends]))  # without duplicates
    for name in names:
        if name.partition(":")[0] not in (*NAMES, REFERENCE):
            raise InputError(f"unknown backend {name!r}; known are {', '.join(NAMES)} and {REFERENCE}")
    if len(names) < 2:
        raise InputError(f"there is nothing to compare {names[0]} with; name another backend, or {REFERENCE}")
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
    if not tolerance >= 0:
        raise InputError(f"tolerance must be at least 0, got {tolerance}")
    check_seed(seed)
    for name in names:
        _place(name, dtype)
    return names


def verify(
    checkpoint: Checkpoint,
    backends: Sequence[str],
    *,
    against: str | None = None,
    dtype: str = "float32",
    prompt_length: int | None = None,
    canvas_length: int | None = None,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Compare backends on a checkpoint.

    Args:
        backends: ``mlx``, ``torch`` or :data:`REFERENCE`. Add ``:DEVICE`` for another device than the default (``torch:cpu``).
        against: the baseline. By default the first of ``backends``.
        dtype: float32, in which backends must agree, or bfloat16, in which they agree only approximately.
        prompt_length: tokens. By default 8 more than the sliding window, but at most 64. The text with images has as many beside
            its soft tokens.
        canvas_length: tokens. By default the model's canvas length, but at most 32.
        seed: the seed of the random tokens and of the sampler.
        tolerance: see :meth:`Report.problems`.
        force, progress: see :func:`mlx_diffgemma.backends.load_backend`.

    Raises:
        InputError: before a model is loaded. CheckpointError, BackendError: as in :func:`mlx_diffgemma.backends.load_backend`.
    """
    baseline, *others = check_choices(backends, against=against, dtype=dtype, seed=seed, tolerance=tolerance)
    inputs = _Inputs.make(checkpoint, prompt_length, canvas_length, seed)
    load = partial(_load, checkpoint, dtype=dtype, force=force, progress=progress)
    if checkpoint.quantization and REFERENCE in (baseline, *others):
        raise BackendError(f"{checkpoint.name} is quantized, but the {REFERENCE} reads only unquantized weights")

    backend = load(baseline)
    spans, towers = _see(backend, inputs)
    right = _Right(towers, list(_passes(backend, inputs, spans)), *_write(backend, inputs))
    comparisons = []
    for name in others:
        del backend  # before the next one is loaded
        gc.collect()
        backend = load(name)
        comparisons.append(_compare(name, backend, inputs, right))
    return Report(
        checkpoint=checkpoint.folder,
        baseline=baseline,
        dtype=dtype,
        prompt_length=len(inputs.prompt),
        canvas_length=len(inputs.canvases[0]),
        image_mask=checkpoint.config.image_mask if checkpoint.config.vision else None,
        seed=seed,
        tolerance=tolerance,
        comparisons=tuple(comparisons),
    )


class _Inputs(NamedTuple):
    prompt: NDArray[np.int32]
    canvases: list[NDArray[np.int32]]
    illustrated: PromptTokens | None  # a text with images
    config: GenerationConfig
    seed: int

    @property
    def images(self) -> tuple[PlacedImage, ...]:
        return self.illustrated.images if self.illustrated else ()

    @classmethod
    def make(cls, checkpoint: Checkpoint, prompt_length: int | None, canvas_length: int | None, seed: int) -> "_Inputs":
        model = checkpoint.config
        prompt_length = min(model.sliding_window + 8, 64) if prompt_length is None else prompt_length
        length = min(model.canvas_length, 32) if canvas_length is None else canvas_length
        if not 1 <= length <= model.canvas_length:
            raise InputError(f"canvas_length must be 1 to {model.canvas_length}, the model's own, got {length}")
        # No token ends the text, and no canvas is ever sure enough to stop: every backend writes the same number of tokens.
        config = checkpoint.generation.replace(
            max_new_tokens=BLOCKS * length,
            max_denoising_steps=STEPS,
            canvas_length=length,
            eos_token_ids=(),
            confidence_threshold=0.0,
        )
        images = [] if model.vision is None else _images(model.vision, seed)
        soft_tokens = sum(each.soft_tokens for each in images)
        if prompt_length < 1 or prompt_length + max(BLOCKS * length, soft_tokens + length) > model.max_position_embeddings:
            others = f"{BLOCKS} canvases of {length}" + (f", or one and {soft_tokens} tokens of images" if images else "")
            raise InputError(
                f"prompt_length must be at least 1 and, with {others}, within the model's context of "
                f"{model.max_position_embeddings} tokens, got {prompt_length}"
            )
        prompt, *canvases, text = (
            noise.canvas_tokens(seed, block, 0, size, model.vocab_size)
            for block, size in enumerate((prompt_length, length, length, length, prompt_length + soft_tokens))
        )
        return cls(prompt, canvases, _placed(text, images) if images else None, config, seed)


def _images(vision: VisionConfig, seed: int) -> list[Patches]:
    """Images of the sizes of :data:`IMAGES`, or as large as the tower can take."""
    most = max(1, vision.position_embedding_size // vision.pooling_kernel_size)
    sizes = [(min(rows, most), min(columns, most)) for rows, columns in IMAGES]
    return [random_picture(vision, *size, seed, number) for number, size in enumerate(sizes)]


def _placed(tokens: NDArray[np.int32], images: Sequence[Patches]) -> PromptTokens:
    """A text with images, and about equal stretches of text before, between and after them."""
    gap = (len(tokens) - sum(each.soft_tokens for each in images)) // (len(images) + 1)
    placed, start = [], gap
    for each in images:
        placed.append(PlacedImage(start, each))
        start += each.soft_tokens + gap
    return PromptTokens(tokens, tuple(placed))


def _place(spec: str, dtype: str) -> Place:
    """Where a backend runs: its name and, after a colon, its device."""
    name, _, device = spec.partition(":")
    if name != REFERENCE:
        return find_place(name, device=device or None, dtype=dtype)
    if device not in ("", "cpu"):
        raise InputError(f"the {REFERENCE} backend runs on the cpu only, not on {device!r}; leave out the device")
    if not importlib.util.find_spec("torch"):
        raise BackendError("the reference backend needs torch; try: pip install torch")
    return find_place("torch", device="cpu", dtype=dtype)


def _load(checkpoint: Checkpoint, spec: str, *, dtype: str, force: bool, progress: Progress) -> Backend:
    name, _, device = spec.partition(":")
    if name != REFERENCE:
        return load_backend(checkpoint, name, device=device or None, dtype=dtype, force=force, progress=progress)
    if not force:
        require_memory(checkpoint, _place(spec, dtype))
    backend: Backend = importlib.import_module("mlx_diffgemma.backends.torch.reference").load(checkpoint, dtype=dtype)
    return backend


class _Answer(NamedTuple):
    name: str
    logits: NDArray[np.float32]  # [L, V]
    states: list[NDArray[np.float32]]  # each [L, H]


class _Right(NamedTuple):
    """What the baseline computed."""

    towers: list[list[NDArray[np.float32]]]
    passes: list[_Answer]
    tokens: NDArray[np.int32]
    entropy: NDArray[np.float32]


def _see(backend: Backend, inputs: _Inputs) -> tuple[list[ImageSpan], list[list[NDArray[np.float32]]]]:
    """The images in the text, and the states of each in the vision tower."""
    spans, towers = [], []
    for image in inputs.images:
        features, states = backend.vision_states(image.patches)
        spans.append(ImageSpan(image.start, features))
        towers.append(states)
    return spans, towers


def _passes(backend: Backend, inputs: _Inputs, images: Sequence[ImageSpan]) -> Iterator[_Answer]:
    """The passes in order. Each runs when it is requested."""
    cache = backend.new_cache()
    first, second, third = inputs.canvases

    def run(name: str, part: Piece | Row) -> _Answer:
        states: list[list[NDArray[np.float32]]] = []
        [logits] = backend.logits([part], states)
        return _Answer(name, logits, states[0])

    yield run("causal pass", Piece(inputs.prompt, cache))
    temperature = inputs.config.t_max
    yield run("first step", Row(first, cache, temperature))
    signal = backend.denoise([Row(first, cache, temperature)])[0].self_conditioning
    yield run("second step", Row(second, cache, temperature, self_conditioning=signal))
    backend.encode([Piece(second, cache)])
    yield run("second block", Row(third, cache, temperature))
    if inputs.illustrated:
        cache = backend.new_cache()
        yield run("causal pass with images", Piece(inputs.illustrated.ids, cache, tuple(images)))
        yield run("step after images", Row(first, cache, temperature))


def _write(backend: Backend, inputs: _Inputs) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The tokens of a short text [N], and the entropy [L] of its first denoising step.

    The tokens are -1 and the entropies are NaN if the backend computes NaN, which the passes show in their logits.
    """
    length = len(inputs.canvases[0])
    try:
        events = list(block_diffusion(backend, Text(inputs.prompt, inputs.seed), inputs.config))
    except ComputationError:
        return np.full(BLOCKS * length, -1, np.int32), np.full(length, np.nan, np.float32)
    first = next(event for event in events if isinstance(event, Draft))
    return np.concatenate([event.tokens for event in events if isinstance(event, Block)]), first.entropy


def _compare(name: str, backend: Backend, inputs: _Inputs, right: _Right) -> Comparison:
    spans, towers = _see(backend, inputs)
    images = tuple(
        _image_difference(image.patches, theirs, ours)
        for image, theirs, ours in zip(inputs.images, right.towers, towers, strict=True)
    )
    answers = _passes(backend, inputs, spans)
    passes = tuple(_difference(theirs, ours) for theirs, ours in zip(right.passes, answers, strict=True))
    tokens, entropy = _write(backend, inputs)
    different = np.flatnonzero(tokens != right.tokens)
    return Comparison(
        backend=name,
        device=backend.device,
        images=images,
        passes=passes,
        entropy=float(np.abs(entropy - right.entropy).max()),
        tokens=len(tokens),
        different_tokens=len(different),
        first_different=int(different[0]) if len(different) else None,
    )


def _image_difference(image: Patches, right: list[NDArray[np.float32]], other: list[NDArray[np.float32]]) -> ImageComparison:
    difference = np.abs(other[-1] - right[-1])
    return ImageComparison(
        rows=image.rows,
        columns=image.columns,
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean(dtype=np.float64)),
        states=_relative(right, other),
    )


def _difference(right: _Answer, answer: _Answer) -> PassComparison:
    difference = np.abs(answer.logits - right.logits)
    divergence = [_kl(*rows) for rows in zip(right.logits, answer.logits, strict=True)]
    return PassComparison(
        name=right.name,
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean(dtype=np.float64)),
        mean_kl=float(np.mean(divergence)),
        median_kl=float(np.median(divergence)),
        same_argmax=float((answer.logits.argmax(axis=-1) == right.logits.argmax(axis=-1)).mean()),
        states=_relative(right.states, answer.states),
    )


def _relative(right: list[NDArray[np.float32]], other: list[NDArray[np.float32]]) -> tuple[float, ...]:
    """The RMS of the difference of each state, divided by the RMS of the right one. A state of zeros must be the same."""
    sizes = [(_rms(ours - theirs), _rms(theirs)) for theirs, ours in zip(right, other, strict=True)]
    return tuple(off / size if size else (math.inf if off else 0.0) for off, size in sizes)


def _kl(right: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """KL(right || other) of the softmax of two rows of logits [V], in nats. Computed in float64."""
    log_p, log_q = (_log_softmax(row.astype(np.float64)) for row in (right, other))
    return float((np.exp(log_p) * (log_p - log_q)).sum())


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max()
    normed: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return normed


def _rms(x: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.square(x, dtype=np.float64).mean()))
