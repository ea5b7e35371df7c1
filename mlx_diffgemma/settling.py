"""Settling: which part of a canvas may be shown before its block is done.

A canvas is committed as a whole, but its front is often certain long before its end. The rule: a position has settled when its
most likely token was the same in each of the last few steps, each time at an entropy below a limit, and all positions before it
have settled too. A settled position stays settled, because its token may already have been shown.

The rule can be wrong: the model may still change any token until its block ends. Code that shows settled text compares it with
the finished block and counts the differences. If there are many, the rule is too loose for the model. On the boxed model, whose
cells all depend on each other, the default was wrong for 3 tokens in 2,000 blocks of 40 (benchmarks/settled.py), in canvases that
were sure of a contradiction for 30 steps and then gave it up.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.arguments import checked
from mlx_diffgemma.errors import InputError


@checked
@dataclass(frozen=True)
class Settled:
    """The rule for when a position has settled.

    Attributes:
        steps: how many denoising steps in a row, including the current one, must agree on the most likely token; at least 1.
        entropy: nats. The position's entropy must be below this in each of these steps.
    """

    steps: int = 3
    entropy: float = 0.01

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps must be an integer of at least 1, got {self.steps!r}")
        if not self.entropy > 0:
            raise InputError(f"entropy must be above 0 nats, got {self.entropy!r}")


class Front:
    """The settled front of one canvas, updated from step to step.

    Attributes:
        tokens: int32 [N], the settled tokens. This array only grows.
    """

    def __init__(self, rule: Settled) -> None:
        self.rule = rule
        self.tokens: NDArray[np.int32] = np.empty(0, np.int32)
        self._argmax: NDArray[np.int32] | None = None
        self._sure: NDArray[np.int64] | None = None  # for each position, steps in a row that were sure of its token

    def update(self, argmax: NDArray[np.int32], entropy: NDArray[np.float32]) -> NDArray[np.int32]:
        """Take one step's argmax [L] and entropy [L], and return the tokens that settled in this step."""
        if self._argmax is None or self._sure is None:
            self._argmax, self._sure = argmax, np.zeros(len(argmax), np.int64)
        kept = np.where(argmax == self._argmax, self._sure, 0)
        self._argmax, self._sure = argmax, np.where(entropy < self.rule.entropy, kept + 1, 0)
        unsettled = np.flatnonzero(self._sure < self.rule.steps)
        end = unsettled[0] if unsettled.size else len(argmax)
        new = argmax[len(self.tokens) : end]
        self.tokens = np.concatenate([self.tokens, new])
        return new
