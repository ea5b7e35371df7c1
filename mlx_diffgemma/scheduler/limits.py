"""What an operator decides of one device's requests."""

from dataclasses import dataclass

from mlx_diffgemma.backends import MAX_BATCH


@dataclass(frozen=True)
class Limits:
    """How many requests there may be, and what goes into one pass.

    Attributes:
        parallel: requests in progress at a time; each holds its keys and values.
        queue: further requests that may wait.
        batch, max_batch: see :func:`~mlx_diffgemma.backends.rows_in_pass`.
    """

    parallel: int = 8
    queue: int = 64
    batch: str = "exact"
    max_batch: int = MAX_BATCH
