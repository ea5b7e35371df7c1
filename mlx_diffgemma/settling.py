"""Which part of a canvas may be shown before its block is done.

A canvas is committed whole, but its front is often certain long before its end is. The rule: a position is settled when its most
likely token has been the same, at an entropy below a limit, in each of the last few steps, and so have all positions before it.
What has once been settled stays so, since it has been shown.

The rule can be wrong: nothing holds a denoising model to a token until its block ends. Whoever shows settled text compares it
with the block in the end, and counts; where that happens, the rule is too loose for the model. On the model in the box, whose
cells all depend on each other, the default was wrong for 3 tokens in 2,000 blocks of 40 (benchmarks/settled.py): canvases that
were sure of a contradiction for 30 steps, and then gave it up.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.errors import InputError


@dataclass(frozen=True)
class Settled:
    """When a position is settled.

    Attributes:
        steps: denoising steps in a row, this one included, that must agree on its most likely token; at least 1.
        entropy: nats; its entropy must have been below this in each of them.
    """

    steps: int = 3
    entropy: float = 0.01

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise InputError(f"steps must be an integer of at least 1, got {self.steps!r}")
        if not self.entropy > 0:
            raise InputError(f"entropy must be above 0 nats, got {self.entropy!r}")


class Front:
    """The settled front of one canvas row, from step to step.

    Attributes:
        tokens: int32 [N], the settled ones; it only ever grows.
    """

    def __init__(self, rule: Settled) -> None:
        self.rule = rule
        self.tokens: NDArray[np.int32] = np.empty(0, np.int32)
        self._argmax: NDArray[np.int32] | None = None
        self._sure: NDArray[np.int64] | None = None  # steps in a row for which a position has been sure of its token

    def update(self, argmax: NDArray[np.int32], entropy: NDArray[np.float32]) -> NDArray[np.int32]:
        """Take in one step's argmax [L] and entropy [L], and return the tokens that have settled with it."""
        if self._argmax is None or self._sure is None:
            self._argmax, self._sure = argmax, np.zeros(len(argmax), np.int64)
        kept = np.where(argmax == self._argmax, self._sure, 0)
        self._argmax, self._sure = argmax, np.where(entropy < self.rule.entropy, kept + 1, 0)
        unsettled = np.flatnonzero(self._sure < self.rule.steps)
        end = unsettled[0] if unsettled.size else len(argmax)
        new = argmax[len(self.tokens) : end]
        self.tokens = np.concatenate([self.tokens, new])
        return new
