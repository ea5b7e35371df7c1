"""A framework is imported only when it is needed and chosen. Each case runs in a separate process."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_diffgemma.cli import COMMANDS

HEAVY = ("mlx", "torch", "transformers", "tokenizers", "huggingface_hub", "av", "pillow_heif")

LOAD_AND_RUN = """
import numpy as np
from mlx_diffgemma import GenerationConfig
from mlx_diffgemma.backends import load_backend
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.sampler import Text, block_diffusion
# The sampler, and not the pipeline: transformers, which the tokenizer needs, imports torch wherever that is installed.
backend = load_backend(Checkpoint.open({folder!r}), {name!r})
events = list(block_diffusion(backend, Text(np.array([3, 4], np.int32)), GenerationConfig(max_new_tokens=3)))
assert events[-1].tokens.shape == (4,)
"""


def imported(code: str) -> set[str]:
    """The heavy packages that are imported after ``code`` ran."""
    report = f"\nimport sys\nprint('imported', *({set(HEAVY)!r} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    "module",
    ["", *(f".{name}" for name in ("cli", "config", "checkpoint", "noise", "errors", "reports.summary", "vision.media"))],
)
def test_importing_imports_nothing_heavy(module: str) -> None:
    assert imported(f"import mlx_diffgemma{module}") == set()


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS), ["generate", "nowhere", "Hi"]])
def test_help_and_errors_import_nothing_heavy(arguments: list[str]) -> None:
    code = f"from mlx_diffgemma.cli import main\ntry:\n    main({arguments!r})\nexcept SystemExit:\n    pass"
    assert imported(code) == set()


@pytest.mark.parametrize(("name", "other"), [("mlx", "torch"), ("torch", "mlx")])
def test_one_backend_does_not_import_the_other(checkpoint: Callable[..., Path], name: str, other: str) -> None:
    found = imported(LOAD_AND_RUN.format(folder=str(checkpoint("one_layer")), name=name))
    assert name in found
    assert not found & {other, "transformers"}
