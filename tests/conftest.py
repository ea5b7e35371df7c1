"""Which backends are tested, and on which checkpoints.

``MLX_DIFFGEMMA_TEST_BACKENDS`` names the backends, separated by commas; both by default. One that is named and missing fails
every test that asks for it.
"""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mlx_diffgemma.backends import NAMES, Backend, load_backend
from mlx_diffgemma.checkpoint import Checkpoint
from support.comparing import BACKENDS
from support.reference import PICTURE_SHAPES, SHAPES, Reference, make_checkpoint
from support.scheduling import bench, clock  # noqa: F401 (fixtures)
from support.verifying import sabotage  # noqa: F401 (a fixture)

torch.set_num_threads(1)  # small models: threads cost more than they give
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(params=BACKENDS, scope="session")
def backend_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name not in NAMES or not importlib.util.find_spec(name):
        pytest.fail(f"backend {name!r} is named in MLX_DIFFGEMMA_TEST_BACKENDS, but is not installed")
    return name


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``checkpoint(shape, **tuning)``: the folder of a checkpoint of that name in SHAPES or PICTURE_SHAPES, made once.

    For ``tuning`` see make_checkpoint.
    """

    @functools.cache
    def make(shape: str, **tuning: Any) -> Path:
        return make_checkpoint(tmp_path_factory.mktemp(shape), {**SHAPES, **PICTURE_SHAPES}[shape], **tuning)

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
    """``backend(name, shape, dtype="float32", image_mask=None, **tuning)``: that checkpoint in one of our backends."""

    @functools.cache
    def load(name: str, shape: str, dtype: str = "float32", image_mask: str | None = None, **tuning: Any) -> Backend:
        return load_backend(Checkpoint.open(checkpoint(shape, **tuning)), name, dtype=dtype, image_mask=image_mask)

    return load
