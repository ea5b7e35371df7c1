"""The limits of one device's requests, which the operator chooses."""

from dataclasses import dataclass

from mlx_diffgemma.backends import MAX_BATCH


@dataclass(frozen=True)
class Limits:
    """How many requests there may be, and what goes into one pass.

    Attributes:
        parallel: requests in progress at the same time; each holds its keys and values.
        queue: further requests that may wait in the queue.
        batch, max_batch: see :func:`~mlx_diffgemma.backends.rows_in_pass`.
    """

    parallel: int = 8
    queue: int = 64
    batch: str = "exact"
    max_batch: int = MAX_BATCH
