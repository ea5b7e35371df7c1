"""Which backends are tested, on which checkpoints, and how closeness is asserted.

``MLX_DIFFGEMMA_TEST_BACKENDS`` names the backends, separated by commas; both by default. One that is named and missing fails
every test that asks for it.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import ArrayLike
from reference import SHAPES, Reference, make_checkpoint
from scheduling import bench, clock  # noqa: F401 (fixtures)

from mlx_diffgemma.backends import NAMES, Backend, load_backend
from mlx_diffgemma.checkpoint import Checkpoint

BACKENDS = tuple(os.environ.get("MLX_DIFFGEMMA_TEST_BACKENDS", "mlx,torch").split(","))

torch.set_num_threads(1)  # small models: threads cost more than they give
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False
transformers.utils.logging.disable_progress_bar()


def assert_close(actual: ArrayLike, expected: ArrayLike, atol: float, what: str) -> None:
    """Assert that two arrays of one shape differ nowhere by more than ``atol``; prints the maximum and the mean difference."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    difference = np.abs(actual - expected)
    worst = np.unravel_index(difference.argmax(), difference.shape)
    report = f"{what}: differs by {difference.max():.3e} at most, {difference.mean():.3e} in the mean (allowed {atol:.0e})"
    print(report)
    # written so that NaN fails
    assert difference.max() <= atol, f"{report}; worst at {tuple(map(int, worst))}: {actual[worst]} for {expected[worst]}"


@pytest.fixture(params=BACKENDS, scope="session")
def backend_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name not in NAMES or not importlib.util.find_spec(name):
        pytest.fail(f"backend {name!r} was asked for by MLX_DIFFGEMMA_TEST_BACKENDS, and is not there")
    return name


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``checkpoint(shape, **tuning)``: the folder of a checkpoint of that name in SHAPES, made once; see make_checkpoint."""

    @functools.cache
    def make(shape: str, **tuning: Any) -> Path:
        return make_checkpoint(tmp_path_factory.mktemp(shape), SHAPES[shape], **tuning)

    return make


@pytest.fixture(scope="session")
def reference(checkpoint: Callable[..., Path]) -> Callable[..., Reference]:
    """``reference(shape, **tuning)``: that checkpoint in `transformers`."""

    @functools.cache
    def load(shape: str, **tuning: Any) -> Reference:
        return Reference(checkpoint(shape, **tuning))

    return load


@pytest.fixture(scope="session")
def backend(checkpoint: Callable[..., Path]) -> Callable[..., Backend]:
    """``backend(name, shape, dtype="float32", **tuning)``: that checkpoint in one of our backends."""

    @functools.cache
    def load(name: str, shape: str, dtype: str = "float32", **tuning: Any) -> Backend:
        return load_backend(Checkpoint.open(checkpoint(shape, **tuning)), name, dtype=dtype)

    return load
