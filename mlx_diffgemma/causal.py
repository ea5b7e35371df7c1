"""One token at a time: the encoder pass is a causal language model, and this samples from it.

The cache, the end tokens and the padding are those of the diffusion, which may go on where this stops, and the other way round.

The logits of one position cross the backend's line, once a token and row: 1 MiB at the released model's vocabulary of 262,144.
The choice is then made here, once for all backends.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma import noise
from mlx_diffgemma.backends import Backend, Cache, check_tokens
from mlx_diffgemma.config import CausalConfig, ModelConfig
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.sampler import row_seeds


@dataclass(frozen=True)
class Token:
    """A new token of each row.

    Attributes:
        index: from 0.
        tokens: int32 [B, 1]; padding in rows that had ended before.
        ended: bool [B], rows whose text has ended.
        seconds: wall time of its pass (the first one is that of the prompt) and of the choice.
        logprobs: float32 [B, 1], the natural-log probability of each token after all before it, at temperature 1; None where
            not asked for.
    """

    index: int
    tokens: NDArray[np.int32]
    ended: NDArray[np.bool_]
    seconds: float
    logprobs: NDArray[np.float32] | None = None


def causal(
    backend: Backend,
    prompt: NDArray[np.int32],
    config: CausalConfig,
    *,
    seed: int | Sequence[int],
    cache: Cache | None = None,
    logprobs: bool = False,
) -> Iterator[Token]:
    """Write up to ``config.max_new_tokens`` tokens after ``prompt``, each by a pass of its own.

    A token is argmax(logits / temperature + Gumbel noise) over the tokens that ``top_k`` and ``top_p`` leave. The noise is stream
    3 of :mod:`mlx_diffgemma.noise`; it counts the tokens of this call from 0, so a text that changes modes needs a seed for each
    part.

    What follows may be written from the same cache, here again or by :func:`~mlx_diffgemma.sampler.block_diffusion`: the last
    token is not in it yet, and is the prompt of what follows.

    Args:
        prompt: int32 [B, N], N at least 1, or 0 after a cache that holds it all; rows are independent.
        seed: one for all rows, or one a row; 0 to 2^64 - 1. Same seed, same tokens, in any batch and on any backend.
        cache: of B rows, already holding what comes before ``prompt``; it is filled in place. By default a new one.
        logprobs: tell the probability of each token.

    Yields:
        A :class:`Token` after each pass, up to the one in which the last row ends.

    Raises:
        InputError: before anything is computed.
    """
    cache = backend.new_cache(len(prompt)) if cache is None else cache
    check_context(backend.config, config, prompt, len(cache))
    return _tokens(backend, prompt, config, row_seeds(seed, len(prompt)), cache, logprobs)


def check_context(model: ModelConfig, config: CausalConfig, prompt: NDArray[np.int32], cached: int) -> None:
    """Raise InputError unless ``prompt`` after ``cached`` positions, and the new tokens after it, fit the model."""
    check_tokens(prompt, model, cached=cached)
    before = cached + prompt.shape[1]
    if before + config.max_new_tokens > model.max_position_embeddings:
        raise InputError(
            f"{before} prompt tokens and {config.max_new_tokens} new ones exceed the model's context of "
            f"{model.max_position_embeddings} tokens; shorten either"
        )


def _tokens(
    backend: Backend, prompt: NDArray[np.int32], config: CausalConfig, seeds: list[int], cache: Cache, with_logprobs: bool
) -> Iterator[Token]:
    context, ended = prompt, np.zeros(len(prompt), bool)
    for index in range(config.max_new_tokens):
        started = time.perf_counter()
        logits = backend.encode(context, cache, logits=True)
        assert logits is not None
        keys = noise.causal_keys(seeds, index)
        chosen = np.array([choose(row, config, key) for row, key in zip(logits, keys, strict=True)])
        context = np.where(ended, config.pad_token_id, chosen).astype(np.int32)[:, None]
        ended = ended | np.isin(context[:, 0], config.eos_token_ids)
        logprobs = _logprobs(logits, context) if with_logprobs else None
        yield Token(index, context, ended, time.perf_counter() - started, logprobs)
        if ended.all():
            return


def choose(logits: NDArray[np.float32], config: CausalConfig, key: np.uint32) -> int:
    """A token id under logits [V] and the noise of ``key``."""
    if config.greedy:
        return int(logits.argmax())
    with np.errstate(over="ignore"):  # at the lowest temperatures all but the best become -inf
        scores = ((logits - logits.max()) / np.float64(config.temperature)).astype(np.float32)
    best = scores.argmax()
    # Noise costs more than the logits: only tokens that can win get it.
    least = scores[best] + _gumbel(key, best) - noise.MAX_GUMBEL
    able = np.flatnonzero(scores >= max(least, floor(scores, config.top_k, config.top_p)))
    return int(able[(scores[able] + _gumbel(key, able)).argmax()])


def floor(scores: NDArray[np.float32], top_k: int | None, top_p: float | None) -> float:
    """The lowest of the tempered logits [V] that ``top_k`` and then ``top_p`` leave; tokens that are as likely stay together."""
    lowest = -np.inf
    if top_k is not None and top_k < len(scores):
        lowest = np.partition(scores, -top_k)[-top_k]
    if top_p is not None and top_p < 1:
        left = scores[scores >= lowest]
        weights = np.exp(left.astype(np.float64) - left.max())
        total = weights.sum()
        # Sorting costs more than all else; tokens as unlikely as these would not fill what top_p leaves out.
        likely = weights >= (1 - top_p) * total / len(left)
        falling = np.sort(left[likely])[::-1]
        sums = np.sort(weights[likely])[::-1].cumsum()
        lowest = falling[min(np.searchsorted(sums, top_p * total), len(falling) - 1)]
    return float(lowest)


def _gumbel(key: np.uint32, tokens: NDArray[np.int64] | np.int64) -> NDArray[np.float32]:
    return noise.gumbel(np.asarray(key), np.zeros((), np.uint32), np.asarray(tokens, np.uint32))


def _logprobs(logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """Log-probabilities [B, 1] of tokens [B, 1] under logits [B, V]."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    normed = np.take_along_axis(shifted, tokens, axis=-1) - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return np.asarray(normed, np.float32)
