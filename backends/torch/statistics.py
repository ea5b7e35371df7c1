"""The statistics of a denoising step: a Triton kernel on CUDA, PyTorch's own operations where Triton is missing, tiles on a CPU.

T positions, V vocabulary.
"""

import logging
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mlx_diffgemma.backends.torch import kernels, tiling
from mlx_diffgemma.backends.torch.noise import gumbel, words

_log = logging.getLogger(__name__)


class Statistics(NamedTuple):
    """What one reading of the logits gives, for tempered logits s [T, V].

    Attributes:
        argmax, sampled: int64 [T], the first argument of the largest s, and of the largest s + noise.
        entropy: float32 [T], nats.
        probabilities: returns the softmax [T, V] in the weights' type: s rounded to that type, a float32 softmax, rounded. A
            CPU has it at hand; on CUDA it is computed when this is called, from the logits, which are held until then.
    """

    argmax: Tensor
    sampled: Tensor
    entropy: Tensor
    probabilities: Callable[[], Tensor]


def statistics(raw: Tensor, noise: Tensor | None, cap: float, temperature: Tensor) -> Statistics:
    """The statistics of cap * tanh(raw / cap) / temperature.

    Args:
        raw: [T, V], the head's output before the softcap, in the weights' type; overwritten on a CPU.
        noise: int32 [T], the noise bits of each position; None to draw nothing.
        temperature: float32 [T].
    """
    if raw.device.type == "cpu":
        argmax, sampled, entropy, probabilities = tiling.statistics(
            raw.float(), noise, raw.dtype, cap=cap, temperature=temperature
        )
        return Statistics(argmax, sampled, entropy, lambda: probabilities)
    ours = _kernels()
    if ours is None:
        return eager(raw, noise, cap, temperature)
    argmax, sampled, entropy, most, total = ours.statistics(raw, noise, cap, temperature)
    return Statistics(argmax, sampled, entropy, partial(ours.probabilities, raw, cap, temperature, most, total))


def eager(raw: Tensor, noise: Tensor | None, cap: float, temperature: Tensor) -> Statistics:
    """:func:`statistics` by PyTorch's own operations, which run on any device and leave ``raw`` as it is."""
    scores = _tempered(raw, cap, temperature)
    argmax = scores.argmax(dim=-1)
    sampled = argmax if noise is None else (scores + gumbel(words(noise, scores.shape[-1]))).argmax(dim=-1)
    shifted = scores - scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(shifted)
    total = weights.sum(dim=-1)
    entropy = torch.log(total) - (shifted * weights).sum(dim=-1) / total
    return Statistics(argmax, sampled, entropy, partial(_probabilities, raw, cap, temperature))


def _tempered(raw: Tensor, cap: float, temperature: Tensor) -> Tensor:
    return torch.tanh(raw.float() / cap) * (cap / temperature)[:, None]


def _probabilities(raw: Tensor, cap: float, temperature: Tensor) -> Tensor:
    return torch.softmax(_tempered(raw, cap, temperature).to(raw.dtype), dim=-1, dtype=torch.float32).to(raw.dtype)


@cache
def _kernels() -> ModuleType | None:
    """The Triton kernels, which are imported on CUDA only, or None without Triton."""
    try:
        return kernels.load("statistics")
    except ImportError as absent:
        _log.warning("a step's statistics take many times longer without triton (%s); try: pip install triton", absent)
        return None
