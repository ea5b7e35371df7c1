"""Block-autoregressive diffusion: the sampler, one implementation for every backend.

A text is written a canvas (block) at a time. The canvas starts as random tokens. In each denoising step the backend answers,
for every position at once, the most likely token, a sampled token, and how sure it is (the entropy). The positions it is
surest of are accepted and take the sampled token, all others get fresh random tokens, and the next step looks at the result;
nothing stays accepted. When the most likely tokens have stopped changing and the mean entropy is low, they are the block.

The acceptance rule is the entropy-bounded sampler of https://arxiv.org/abs/2505.24857: in order of rising entropy, as many
positions as keep the sum of the entropies before them within ``entropy_bound``, an upper bound on their joint mutual
information.

Everything here is NumPy over [B, L] arrays: B rows that do not know of each other, L positions of the canvas.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma import noise
from mlx_diffgemma.backends import Backend, Cache, check_tokens
from mlx_diffgemma.config import GenerationConfig, ModelConfig
from mlx_diffgemma.errors import InputError

FREE = -1  # in a frozen template: the model may write here


@dataclass(frozen=True)
class Draft:
    """A canvas after one denoising step. Rows that are done keep the arrays of their last step.

    Attributes:
        block: index of the canvas, from 0.
        step: denoising steps done in this block, from 1.
        temperature: that of this step.
        canvas: int32 [B, L], what the step was given.
        argmax: int32 [B, L], the most likely tokens: what would be committed if this were the last step.
        entropy: float32 [B, L], nats.
        accepted: bool [B, L], which positions took their sampled token.
        active: bool [B], rows that took this step.
        done: bool [B], rows that need no further step.
        seconds: wall time of the step.
    """

    block: int
    step: int
    temperature: float
    canvas: NDArray[np.int32]
    argmax: NDArray[np.int32]
    entropy: NDArray[np.float32]
    accepted: NDArray[np.bool_]
    active: NDArray[np.bool_]
    done: NDArray[np.bool_]
    seconds: float


@dataclass(frozen=True)
class Block:
    """A finished canvas.

    Attributes:
        index: from 0.
        tokens: int32 [B, L], with padding after a row's first end token.
        steps: int [B], denoising steps each row took; 0 for rows that had ended before.
        ended: bool [B], rows whose text has ended.
        encode_seconds, denoise_seconds: wall time spent in either.
        logprobs: float32 [B, L], the natural-log probability of each token after all before it under the causal model, at
            temperature 1; None where not asked for. Behind a row's end it is that of the padding.
    """

    index: int
    tokens: NDArray[np.int32]
    steps: NDArray[np.int64]
    ended: NDArray[np.bool_]
    encode_seconds: float
    denoise_seconds: float
    logprobs: NDArray[np.float32] | None = None


def block_diffusion(
    backend: Backend,
    prompt: NDArray[np.int32],
    config: GenerationConfig,
    *,
    seed: int | Sequence[int],
    frozen: NDArray[np.int32] | None = None,
    canvas: NDArray[np.int32] | None = None,
    cache: Cache | None = None,
    logprobs: bool = False,
) -> Iterator[Draft | Block]:
    """Write up to ``config.max_new_tokens`` tokens after ``prompt``, in whole canvases.

    What follows may be written from the same cache, here again or one token at a time by :func:`~mlx_diffgemma.causal.causal`:
    the last block is not in it yet (but with ``logprobs`` it is), and is the prompt of what follows. Rows of a batch have gone on
    with padding where they ended before.

    Args:
        prompt: int32 [B, N], N at least 1, or 0 after a cache that holds it all; rows are independent.
        seed: one for all rows, or one a row; 0 to 2^64 - 1. Same seed, same tokens, in any batch and on any backend.
        frozen: int32 [P] for all rows, or [B, P]: the template of the new text from its first token on, a token id where it is
            given, -1 where the model may write. Given positions hold their token in every canvas, are always accepted, and
            count neither in the bound nor in the mean that stops a block. An end token that the model writes before one still
            ends the text.
        canvas: int32 [P] or [B, P], a draft of the new text from its first token on: what its canvases begin with instead of
            random tokens; -1 where they are random all the same.
        cache: of B rows, already holding what comes before ``prompt``; it is filled in place. By default a new one.
        logprobs: score each block as it is committed, at the cost of an output head; for the last one that pass is an extra.

    Yields:
        A :class:`Draft` after each denoising step, and a :class:`Block` after each canvas.

    Raises:
        InputError: before anything is computed.
    """
    cache = backend.new_cache(len(prompt)) if cache is None else cache
    length = config.canvas_length or backend.config.canvas_length
    check_lengths(backend.config, config, prompt, len(cache), length)
    for name, template in (("frozen", frozen), ("canvas", canvas)):
        _check_template(name, template, backend.config, config, len(prompt), length)
    return _Run(backend, cache, config, row_seeds(seed, len(prompt)), frozen, canvas, length, logprobs).blocks(prompt)


@dataclass(frozen=True)
class _Run:
    """What stays the same from block to block."""

    backend: Backend
    cache: Cache
    config: GenerationConfig
    seeds: list[int]
    frozen: NDArray[np.int32] | None
    canvas: NDArray[np.int32] | None
    length: int
    logprobs: bool

    def blocks(self, prompt: NDArray[np.int32]) -> Iterator[Draft | Block]:
        context, ended = prompt, np.zeros(len(prompt), bool)
        for index in range(ceil(self.config.max_new_tokens / self.length)):
            started = time.perf_counter()
            if context.size and (index == 0 or not self.logprobs):  # scored blocks are in the cache
                self.backend.encode(context, self.cache)
            encoded = time.perf_counter()
            steps = np.zeros(len(prompt), np.int64)
            for draft in self.denoise(index, ended):
                steps += draft.active
                argmax = draft.argmax
                yield draft
            context, ended = _commit(argmax, ended, self.config)
            denoised = time.perf_counter()
            logprobs = self.backend.score(context, self.cache) if self.logprobs else None
            encode_seconds = encoded - started + time.perf_counter() - denoised
            yield Block(index, context, steps, ended, encode_seconds, denoised - encoded, logprobs)
            if ended.all():
                return

    def denoise(self, block: int, ended: NDArray[np.bool_]) -> Iterator[Draft]:
        """The denoising steps of one canvas, until every row is done or the steps are."""
        config, vocab_size = self.config, self.backend.config.vocab_size
        template = _template(self.frozen, block, self.length)
        canvas = noise.canvas_tokens(self.seeds, block, 0, self.length, vocab_size)
        canvas = _pin(_pin(canvas, _template(self.canvas, block, self.length)), template)
        free = np.broadcast_to(True if template is None else template == FREE, canvas.shape)
        argmax, entropy, accepted = canvas, np.zeros(canvas.shape, np.float32), np.zeros(canvas.shape, bool)
        done, self_conditioning = ended.copy(), None
        history: list[NDArray[np.int32]] = []  # the argmax of the last stability_threshold steps
        for step in range(1, config.max_denoising_steps + 1):
            started, active = time.perf_counter(), ~done
            temperature = config.temperature(config.max_denoising_steps + 1 - step)
            result = self.backend.denoise(
                canvas,
                self.cache,
                temperature=temperature,
                noise_keys=None if config.greedy else noise.sampling_keys(self.seeds, block, step),
                self_conditioning=self_conditioning,
                frozen=template,
            )
            self_conditioning, seen = result.self_conditioning, canvas
            row = active[:, None]  # rows that are done are left as they were
            argmax, entropy = np.where(row, result.argmax, argmax), np.where(row, result.entropy, entropy)
            accepted = np.where(row, accept(result.entropy, free, config.entropy_bound), accepted)
            fresh = noise.canvas_tokens(self.seeds, block, step, self.length, vocab_size)
            canvas = np.where(row, _pin(np.where(accepted, result.sampled, fresh), template), canvas)
            done |= _stable(argmax, history, config.stability_threshold) & _confident(entropy, free, config.confidence_threshold)
            history = [*history, argmax][-config.stability_threshold :] if config.stability_threshold else []
            seconds = time.perf_counter() - started
            yield Draft(block, step, temperature, seen, argmax, entropy, accepted, active, done.copy(), seconds)
            if done.all():
                return


def accept(entropy: NDArray[np.float32], free: NDArray[np.bool_], bound: float) -> NDArray[np.bool_]:
    """Which positions [B, L] are accepted: frozen ones, and of the ``free`` ones, in order of rising entropy, those
    before which the entropies sum to at most ``bound`` nats; so always at least one."""
    ranked = np.where(free, entropy.astype(np.float64), 0.0)  # frozen ones come first and add nothing
    order = np.argsort(ranked, axis=1, kind="stable")
    rising = np.take_along_axis(ranked, order, axis=1)
    accepted = np.empty(entropy.shape, bool)
    np.put_along_axis(accepted, order, rising.cumsum(axis=1) - rising <= bound, axis=1)
    return accepted


def _stable(argmax: NDArray[np.int32], history: list[NDArray[np.int32]], threshold: int) -> NDArray[np.bool_]:
    """Rows [B] whose argmax equals that of each of the last ``threshold`` steps."""
    if len(history) < threshold:
        return np.zeros(len(argmax), bool)
    return np.array([all(np.array_equal(row, past[index]) for past in history) for index, row in enumerate(argmax)])


def _confident(entropy: NDArray[np.float32], free: NDArray[np.bool_], threshold: float) -> NDArray[np.bool_]:
    """Rows [B] whose mean entropy over the ``free`` [B, L] positions is below ``threshold`` nats (always, where none is free)."""
    count = free.sum(axis=1)
    confident: NDArray[np.bool_] = np.where(free, entropy, 0.0).sum(axis=1, dtype=np.float64) < threshold * count
    confident[count == 0] = True
    return confident


def _commit(
    argmax: NDArray[np.int32], ended: NDArray[np.bool_], config: GenerationConfig
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """The canvas as it is kept, padded behind a row's first end token; and which rows have ended now."""
    is_end = np.isin(argmax, config.eos_token_ids)
    behind = is_end.cumsum(axis=1) - is_end > 0  # an end token came before
    tokens = np.where(behind | ended[:, None], config.pad_token_id, argmax).astype(np.int32)
    return tokens, ended | is_end.any(axis=1)


def _template(whole: NDArray[np.int32] | None, block: int, length: int) -> NDArray[np.int32] | None:
    """The part of a template that falls into one canvas, [L] or [B, L], or None where it says nothing there."""
    if whole is None:
        return None
    part = whole[..., block * length : (block + 1) * length]
    template = np.full((*part.shape[:-1], length), FREE, np.int32)
    template[..., : part.shape[-1]] = part
    return template if (template != FREE).any() else None


def _pin(canvas: NDArray[np.int32], template: NDArray[np.int32] | None) -> NDArray[np.int32]:
    return canvas if template is None else np.where(template == FREE, canvas, template)


def row_seeds(seed: int | Sequence[int], rows: int) -> list[int]:
    """One seed a row, of one for all or as many as rows; raises InputError."""
    seeds = list(seed) if isinstance(seed, Sequence) and not isinstance(seed, str) else [seed] * rows
    if len(seeds) != rows:
        raise InputError(f"{len(seeds)} seeds for {rows} rows; give one for all, or one a row")
    for value in seeds:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
            raise InputError(f"a seed must be an integer between 0 and 2^64 - 1, got {value!r}")
    return seeds


def check_lengths(model: ModelConfig, config: GenerationConfig, prompt: NDArray[np.int32], cached: int, length: int) -> None:
    """Raise InputError unless ``prompt`` after ``cached`` positions, and canvases of ``length`` after it, fit the model."""
    check_tokens(prompt, model, cached=cached)
    if length > model.canvas_length:
        raise InputError(f"canvas_length {length} exceeds the model's {model.canvas_length}")
    before = cached + prompt.shape[1]
    if before + ceil(config.max_new_tokens / length) * length > model.max_position_embeddings:
        raise InputError(
            f"{before} prompt tokens and {config.max_new_tokens} new ones, in canvases of {length}, exceed the model's context "
            f"of {model.max_position_embeddings} tokens; shorten either"
        )


def _check_template(
    name: str, template: NDArray[np.int32] | None, model: ModelConfig, config: GenerationConfig, rows: int, length: int
) -> None:
    if template is None:
        return
    room = ceil(config.max_new_tokens / length) * length
    if template.shape[:-1] not in ((), (rows,)) or template.ndim == 0 or template.shape[-1] > room:
        raise InputError(
            f"{name} must be one row, or {rows}, within the {config.max_new_tokens} new tokens, got shape {list(template.shape)}"
        )
    if template.size and (template.min() < FREE or template.max() >= model.vocab_size):
        raise InputError(f"{name} holds a token id outside the vocabulary of {model.vocab_size} tokens")
