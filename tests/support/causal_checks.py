"""Helpers for the tests of the causal mode and of scoring."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma import Block, Token


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def picked(logprobs: NDArray[Any], tokens: NDArray[np.int32]) -> NDArray[Any]:
    """The log-probabilities of tokens [..], from log-probabilities [.., V]."""
    return np.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]


def written(events: Iterable[Any]) -> NDArray[np.int32]:
    """The new tokens [N], from the events of either sampler."""
    tokens: list[int] = []
    for event in events:
        if isinstance(event, Block):
            tokens += event.tokens.tolist()
        elif isinstance(event, Token):
            tokens.append(event.token)
    return np.array(tokens, np.int32)
