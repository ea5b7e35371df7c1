"""Which backends are tested, an assertion that two arrays are close, and the values in JSON."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

#: Both backends, or those that the environment variable names.
BACKENDS = tuple(os.environ.get("MLX_DIFFGEMMA_TEST_BACKENDS", "mlx,torch").split(","))


def assert_close(actual: ArrayLike, expected: ArrayLike, atol: float, what: str) -> None:
    """Assert that two arrays have one shape and differ nowhere by more than ``atol``. Prints the largest and mean difference."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    difference = np.abs(actual - expected)
    worst = np.unravel_index(difference.argmax(), difference.shape)
    report = f"{what}: differs by {difference.max():.3e} at most, {difference.mean():.3e} in the mean (allowed {atol:.0e})"
    print(report)
    # written so that NaN fails
    assert difference.max() <= atol, f"{report}; worst at {tuple(map(int, worst))}: {actual[worst]} for {expected[worst]}"


def within(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in JSON, with its path."""
    yield path, content
    if isinstance(content, dict | list):
        for key, entry in content.items() if isinstance(content, dict) else enumerate(content):
            yield from within(entry, f"{path}/{key}")
