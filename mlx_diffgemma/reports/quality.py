"""The cost of a conversion: compares a converted model, the target, with the source that it was made from.

Both models run on the same text, which is a prefix and the canvas that follows it:

- The causal pass over the prefix.
- The canvas, with a share of its tokens replaced by random ones, as the model sees it from the middle of denoising (much noise)
  to the end (little noise). Each canvas runs twice: without self-conditioning, as in a block's first step, and with the
  self-conditioning that the model itself makes from that canvas in a first step.
- The number of denoising steps that the sampler takes for the block after the prefix. Quantized logits are less sure, so they
  take more steps.

The Kullback-Leibler divergences compare the softmax of the logits after the softcap, without temperature.

Models are loaded one after the other. The source's log-probabilities of each pass stay in memory, at as many evenly spaced
positions as fit into :data:`KEPT_BYTES`: 64 positions, and 0.74 GB in all eleven passes, with a vocabulary of 262,144.
"""

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma import noise
from mlx_diffgemma.backends import Backend, Piece, Progress, Row, check_tokens, load_backend
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.config import GenerationConfig, ModelConfig
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.sampler import Block, Text, block_diffusion

#: How many tenths of a canvas's tokens are replaced by random ones.
NOISE_TENTHS = (1, 3, 5, 7, 9)
#: The most bytes of log-probabilities that are kept of one pass.
KEPT_BYTES = 64 << 20
#: How many canvases of text are used. The text's first token and all canvases but the last one are the prefix.
CANVASES = 2
#: The seeds of the blocks in which denoising steps are counted.
SEEDS = range(4)


@dataclass(frozen=True)
class PassDivergence:
    """One pass of the target, compared with the source's.

    Attributes:
        noise: share of the canvas's tokens that were replaced, 0 to 1. None for the causal pass.
        self_conditioning: whether the pass had self-conditioning.
        positions: how many positions were compared.
        kl: the mean over these positions of KL(source || target), in nats.
        same_argmax: share of the positions with the same most likely token, 0 to 1.
    """

    noise: float | None
    self_conditioning: bool
    positions: int
    kl: float
    same_argmax: float


@dataclass(frozen=True)
class Measurement:
    """The result of :func:`measure`.

    Attributes:
        backend, device, dtype: what both models ran on.
        prefix_length, canvas_length: tokens of the prefix and of the canvas.
        given: how many of these tokens were given. The source wrote the others.
        source_steps, target_steps: denoising steps of the block after the prefix, one count per seed.
    """

    backend: str
    device: str
    dtype: str
    prefix_length: int
    canvas_length: int
    given: int
    passes: tuple[PassDivergence, ...]
    source_steps: tuple[int, ...]
    target_steps: tuple[int, ...]

    def rows(self) -> list[tuple[str, ...]]:
        """A table of the passes. The first row is its header."""
        rows: list[tuple[str, ...]] = [("pass", "self-conditioning", "positions", "KL, nats", "same argmax")]
        for one in self.passes:
            name = "causal" if one.noise is None else f"canvas, {one.noise:.0%} noise"
            conditioned = "" if one.noise is None else "yes" if one.self_conditioning else "no"
            rows.append((name, conditioned, str(one.positions), f"{one.kl:.2e}", f"{one.same_argmax:.1%}"))
        return rows

    def steps(self) -> str:
        """A sentence on the denoising steps."""
        source, target = np.mean(self.source_steps), np.mean(self.target_steps)
        return (
            f"Denoising steps per block, mean of {len(self.source_steps)}: "
            f"{source:.1f} before, {target:.1f} after ({target / source - 1:+.1%})."
        )

    def conditions(self) -> str:
        """A sentence on what was compared, and on what."""
        total = self.prefix_length + self.canvas_length
        written = f", {total - self.given} of them by the source model itself" if self.given < total else ""
        return f"Text of {total} tokens{written}; {self.backend} ({self.device}), {self.dtype}."


def measure(
    source: Checkpoint,
    target: Checkpoint,
    text: NDArray[np.int32],
    *,
    backend: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Measurement:
    """Compare ``target`` with the ``source`` it was converted from.

    Args:
        text: int32 [N], beginning with the beginning-of-text token. One token and :data:`CANVASES` canvases of it are used. A
            shorter text is cut to one token and whole canvases, and the source writes the missing ones, in which end tokens end
            nothing.
        backend, device, dtype, force, progress: as in :func:`mlx_diffgemma.backends.load_backend`, for both models.

    Raises:
        InputError: before a model is loaded. CheckpointError, BackendError: as in load_backend.
    """
    begin = _beginning(source, text)
    if (source.config.vocab_size, source.config.canvas_length) != (target.config.vocab_size, target.config.canvas_length):
        raise InputError(f"{target.folder} is not a conversion of {source.folder}: the vocabulary or the canvas length differs")
    # Without end tokens, the number of tokens written does not depend on the text.
    config = source.generation.replace(eos_token_ids=(), canvas_length=source.config.canvas_length)

    load = partial(load_backend, name=backend, device=device, dtype=dtype, force=force, progress=progress)
    model = load(source)
    inputs = _Inputs.make(model, begin, config)
    expected, source_steps = list(_answers(model, inputs, config)), _count_steps(model, inputs, config)
    del model  # before the next one is loaded
    gc.collect()
    model = load(target)
    passes = tuple(_compare(*pair) for pair in zip(expected, _answers(model, inputs, config), strict=True))
    return Measurement(
        backend=model.name,
        device=model.device,
        dtype=model.dtype,
        prefix_length=len(inputs.prefix),
        canvas_length=len(inputs.canvas),
        given=len(begin),
        passes=passes,
        source_steps=source_steps,
        target_steps=_count_steps(model, inputs, config),
    )


def _beginning(checkpoint: Checkpoint, text: NDArray[np.int32]) -> NDArray[np.int32]:
    """The part of a text [N] that is used: one token and whole canvases."""
    check_tokens(text, checkpoint.config)
    canvases = _canvases(checkpoint.config)
    if not canvases:
        raise InputError("the model's context is too short to measure: it must have room for one token and a canvas")
    length = checkpoint.config.canvas_length
    return text[: 1 + min((len(text) - 1) // length, canvases) * length]


def _canvases(config: ModelConfig) -> int:
    """How many canvases of text are used."""
    return min(CANVASES, (config.max_position_embeddings - 1) // config.canvas_length)


class _Inputs(NamedTuple):
    prefix: NDArray[np.int32]  # [P]
    canvas: NDArray[np.int32]  # [L]

    @classmethod
    def make(cls, source: Backend, begin: NDArray[np.int32], config: GenerationConfig) -> "_Inputs":
        text, length = begin, source.config.canvas_length
        missing = 1 + _canvases(source.config) * length - len(begin)
        if missing:
            events = block_diffusion(source, Text(text), config.replace(max_new_tokens=missing))
            text = np.concatenate([text, *(event.tokens for event in events if isinstance(event, Block))])
        return cls(text[:-length], text[-length:])


class _Answer(NamedTuple):
    noise: float | None
    self_conditioning: bool
    log_probabilities: NDArray[np.float32]  # [positions, V]


def _answers(backend: Backend, inputs: _Inputs, config: GenerationConfig) -> Iterator[_Answer]:
    """The passes in order. Each runs when it is requested."""
    cache = backend.new_cache()
    yield _Answer(None, False, _log_softmax(backend.logits([Piece(inputs.prefix, cache)])[0]))
    length, vocab_size = len(inputs.canvas), backend.config.vocab_size
    for tenths in NOISE_TENTHS:
        replaced = noise.canvas_tokens(0, tenths, 0, length, 10) < tenths  # uniform numbers below 10
        canvas = np.where(replaced, noise.canvas_tokens(0, tenths, 1, length, vocab_size), inputs.canvas)
        row = Row(canvas, cache, config.t_max)
        yield _Answer(tenths / 10, False, _log_softmax(backend.logits([row])[0]))
        row = replace(row, self_conditioning=backend.denoise([row])[0].self_conditioning)
        yield _Answer(tenths / 10, True, _log_softmax(backend.logits([row])[0]))


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-softmax of logits [L, V], at the kept positions [positions, V]. Sums are in float64."""
    length, vocab_size = logits.shape
    count = min(length, KEPT_BYTES // (4 * vocab_size))
    rows: NDArray[np.float32] = logits[np.linspace(0, length - 1, count).round().astype(int)]
    rows -= rows.max(axis=-1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return rows


def _compare(expected: _Answer, answer: _Answer) -> PassDivergence:
    pairs = zip(expected.log_probabilities, answer.log_probabilities, strict=True)
    divergences = [float((np.exp(p) * (p - q)).sum(dtype=np.float64)) for p, q in pairs]
    same = expected.log_probabilities.argmax(axis=-1) == answer.log_probabilities.argmax(axis=-1)
    return PassDivergence(
        expected.noise, expected.self_conditioning, len(divergences), float(np.mean(divergences)), float(same.mean())
    )


def _count_steps(backend: Backend, inputs: _Inputs, config: GenerationConfig) -> tuple[int, ...]:
    """The denoising steps of the block after the prefix, for each seed."""
    once = config.replace(max_new_tokens=config.canvas_length)
    runs = (block_diffusion(backend, Text(inputs.prefix, seed), once) for seed in SEEDS)
    return tuple(event.steps for events in runs for event in events if isinstance(event, Block))
