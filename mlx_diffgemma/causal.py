"""One token at a time: the encoder pass is a causal language model, and this samples from it.

The cache, the end tokens and the padding are those of the diffusion, which may go on where this stops, and the other way round.

The logits of one position cross the backend's line, once a token: 1 MiB at the released model's vocabulary of 262,144.
The choice is then made here, once for all backends.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma import noise
from mlx_diffgemma.backends import Backend, Piece
from mlx_diffgemma.config import CausalConfig, ModelConfig
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.prompts import chunks
from mlx_diffgemma.sampler import Text, check_prompt


@dataclass(frozen=True, eq=False)
class Token:
    """A new token.

    Attributes:
        index: from 0.
        token: its id.
        ended: whether it ends the text.
        seconds: wall time of its pass (the first one is that of the prompt) and of the choice.
        logprob: its natural-log probability after all before it, at temperature 1; None where not asked for.
    """

    index: int
    token: int
    ended: bool
    seconds: float
    logprob: float | None = None


def causal(backend: Backend, text: Text, config: CausalConfig) -> Iterator[Token]:
    """Write up to ``config.max_new_tokens`` tokens of a text, each by a pass of its own.

    A token is argmax(logits / temperature + Gumbel noise) over the tokens that ``top_k`` and ``top_p`` leave. The noise is stream
    3 of :mod:`mlx_diffgemma.noise`; it counts the tokens of this call from 0, so a text that changes modes needs a seed for each
    part.

    What follows may be written from the same cache, here again or by :func:`~mlx_diffgemma.sampler.block_diffusion`: the last
    token is not in it yet, and is the prompt of what follows.

    Args:
        text: without ``frozen`` and ``canvas``, which belong to the diffusion.

    Yields:
        A :class:`Token` after each pass, up to the one that ends the text.

    Raises:
        InputError: before anything is computed.
    """
    check_causal(backend.config, text, config)
    return _tokens(backend, text, config)


def check_causal(model: ModelConfig, text: Text, config: CausalConfig) -> None:
    """Raise InputError unless the text can be written by the model."""
    before = check_prompt(model, text)
    if text.frozen is not None or text.canvas is not None:
        raise InputError("frozen and canvas belong to the diffusion mode; leave them out, or change the mode")
    if before + config.max_new_tokens > model.max_position_embeddings:
        raise InputError(
            f"{before} prompt tokens and {config.max_new_tokens} new ones exceed the model's context of "
            f"{model.max_position_embeddings} tokens; shorten either"
        )


def _tokens(backend: Backend, text: Text, config: CausalConfig) -> Iterator[Token]:
    cache = backend.new_cache() if text.cache is None else text.cache
    pending = chunks(text.prompt)
    for index in range(config.max_new_tokens):
        started = time.perf_counter()
        for tokens in pending:
            backend.encode([Piece(tokens, cache)])
        logits = backend.next_logits([cache])[0]
        token = choose(logits, config, noise.causal_key(text.seed, index))
        pending, ended = [np.array([token], np.int32)], token in config.eos_token_ids
        logprob = _logprob(logits, token) if text.logprobs else None
        yield Token(index, token, ended, time.perf_counter() - started, logprob)
        if ended:
            return


def choose(logits: NDArray[np.float32], config: CausalConfig, key: int) -> int:
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


def _gumbel(key: int, tokens: NDArray[np.int64] | np.int64) -> NDArray[np.float32]:
    return noise.gumbel(np.asarray(key, np.uint32), np.zeros((), np.uint32), np.asarray(tokens, np.uint32))


def _logprob(logits: NDArray[np.float32], token: int) -> float:
    """Log-probability of a token under logits [V]."""
    shifted = logits.astype(np.float64) - logits.max()
    return float(shifted[token] - np.log(np.exp(shifted).sum()))
