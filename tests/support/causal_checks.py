"""What the tests of the causal mode and of scoring share."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma import Draft


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def picked(logprobs: NDArray[Any], tokens: NDArray[np.int32]) -> NDArray[Any]:
    return np.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]


def written(events: Any) -> NDArray[np.int32]:
    """The new tokens [B, N] of either sampler."""
    return np.concatenate([event.tokens for event in events if not isinstance(event, Draft)], axis=1)
