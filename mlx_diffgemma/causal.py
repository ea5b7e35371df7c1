"""The causal mode: writes one token at a time. The encoder pass is a causal language model, and this module samples from it.

The causal mode and the diffusion mode use the same cache and the same end tokens. Each can continue where the other stopped.

For each token, the backend returns the logits of one position: 1 MiB at the released model's vocabulary of 262,144. The token is
chosen here, by the same code for all backends.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma import noise
from mlx_diffgemma.backends import Backend, Piece, check_computed
from mlx_diffgemma.config import CausalConfig, ModelConfig
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.prompts import chunks
from mlx_diffgemma.sampler import Text, check_prompt


@dataclass(frozen=True, eq=False)
class Token:
    """A new token.

    Attributes:
        index: its number in this call, from 0.
        token: its id.
        ended: whether it ends the text.
        seconds: wall time of its pass and of the choice. The first token's pass is that of the prompt.
        logprob: its natural-log probability given all tokens before it, at temperature 1; None when not requested.
    """

    index: int
    token: int
    ended: bool
    seconds: float
    logprob: float | None = None


def causal(backend: Backend, text: Text, config: CausalConfig) -> Iterator[Token]:
    """Write up to ``config.max_new_tokens`` tokens of a text, one per pass.

    A token is argmax(logits / temperature + Gumbel noise) over the tokens that ``top_k`` and ``top_p`` leave. The noise is stream
    3 of :mod:`mlx_diffgemma.noise`. It counts the tokens of this call from 0, so a text that changes modes needs a different seed
    for each part.

    To continue the text, use the same cache, here or in :func:`~mlx_diffgemma.sampler.block_diffusion`. The last token is not in
    the cache yet: pass it as the prompt.

    Args:
        text: must not have ``frozen`` or ``canvas``, which belong to the diffusion mode.

    Yields:
        A :class:`Token` after each pass, up to and including the token that ends the text.

    Raises:
        InputError: before anything is computed.
        ComputationError: the model computed NaN or infinity.
    """
    check_causal(backend.config, text, config)
    return _tokens(backend, text, config)


def check_causal(model: ModelConfig, text: Text, config: CausalConfig) -> None:
    """Raise InputError if the model cannot write the text."""
    before = check_prompt(model, text)
    if text.frozen is not None or text.canvas is not None:
        raise InputError("frozen and canvas belong to the diffusion mode; leave them out, or change the mode")
    if before + config.max_new_tokens > model.max_position_embeddings:
        raise InputError(
            f"{before} prompt tokens and {config.max_new_tokens} new tokens exceed the model's context of "
            f"{model.max_position_embeddings} tokens; use a shorter prompt or fewer new tokens"
        )


def _tokens(backend: Backend, text: Text, config: CausalConfig) -> Iterator[Token]:
    cache = backend.new_cache() if text.cache is None else text.cache
    pending = chunks(text.prompt)
    for index in range(config.max_new_tokens):
        started = time.perf_counter()
        for tokens in pending:
            backend.encode([Piece(tokens, cache)])
        logits = backend.next_logits([cache])[0]
        check_computed(logits, "the causal pass")
        token = choose(logits, config, noise.causal_key(text.seed, index))
        pending, ended = [np.array([token], np.int32)], token in config.eos_token_ids
        logprob = _logprob(logits, token) if text.logprobs else None
        yield Token(index, token, ended, time.perf_counter() - started, logprob)
        if ended:
            return


def choose(logits: NDArray[np.float32], config: CausalConfig, key: int) -> int:
    """Choose a token id from logits [V], with the noise of ``key``."""
    if config.greedy:
        return int(logits.argmax())
    with np.errstate(over="ignore"):  # at very low temperatures all scores but the best become -inf
        scores = ((logits - logits.max()) / np.float64(config.temperature)).astype(np.float32)
    best = scores.argmax()
    # Noise for all tokens would cost more than the logits, so only tokens that can win get noise.
    least = scores[best] + _gumbel(key, best) - noise.MAX_GUMBEL
    able = np.flatnonzero(scores >= max(least, floor(scores, config.top_k, config.top_p)))
    return int(able[(scores[able] + _gumbel(key, able)).argmax()])


def floor(scores: NDArray[np.float32], top_k: int | None, top_p: float | None) -> float:
    """The lowest of the tempered logits [V] that ``top_k`` and then ``top_p`` leave. Equally likely tokens stay together."""
    lowest = -np.inf
    if top_k is not None and top_k < len(scores):
        lowest = np.partition(scores, -top_k)[-top_k]
    if top_p is not None and top_p < 1:
        left = scores[scores >= lowest]
        weights = np.exp(left.astype(np.float64) - left.max())
        total = weights.sum()
        # Sorting costs the most here. All tokens below this limit together hold less than the 1 - top_p that is left out.
        likely = weights >= (1 - top_p) * total / len(left)
        falling = np.sort(left[likely])[::-1]
        sums = np.sort(weights[likely])[::-1].cumsum()
        lowest = falling[min(np.searchsorted(sums, top_p * total), len(falling) - 1)]
    return float(lowest)


def _gumbel(key: int, tokens: NDArray[np.int64] | np.int64) -> NDArray[np.float32]:
    return noise.gumbel(np.asarray(key, np.uint32), np.zeros((), np.uint32), np.asarray(tokens, np.uint32))


def _logprob(logits: NDArray[np.float32], token: int) -> float:
    """Log-probability of a token under logits [V]."""
    shifted = logits.astype(np.float64) - logits.max()
    return float(shifted[token] - np.log(np.exp(shifted).sum()))
