"""Helpers for the tests of the conformance report: the passes, wrong backends, and the command."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from mlx_diffgemma.backends import Backend, load_backend
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.cli import main
from mlx_diffgemma.reports import conformance
from mlx_diffgemma.reports.conformance import Report

Sabotage = Callable[[str, Callable[[Any], None]], None]

#: The passes, and those that a checkpoint with a vision tower has besides.
TEXT = ["causal pass", "first step", "second step", "second block"]
WITH_IMAGES = ["causal pass with images", "step after images"]


def show(report: Report) -> None:
    for each in report.comparisons:
        for image in each.images:
            print(f"{each.backend} against {report.baseline}, {image.name}: {image.max_abs:.2e} at most, {image.states[-1]:.2e}")
        for one in each.passes:
            divergence = f"KL {one.mean_kl:.2e} in the mean, {one.median_kl:.2e} in the median"
            print(f"{each.backend} against {report.baseline}, {one.name}: {one.max_abs:.2e} at most, {divergence}")
        print(f"{each.backend}: {each.different_tokens} of {each.tokens} tokens differ, entropies by {each.entropy:.2e}")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


def scaled(module: Any, factor: float) -> None:
    """Multiply a module's weight, in either framework."""
    weight = module.weight * factor
    module.weight = torch.nn.Parameter(weight, requires_grad=False) if isinstance(weight, torch.Tensor) else weight


@pytest.fixture
def sabotage(monkeypatch: pytest.MonkeyPatch) -> Sabotage:
    """``sabotage(name, change)``: from then on, ``change`` is applied to that backend after loading."""

    def patch(wrong: str, change: Callable[[Any], None]) -> None:
        def load(opened: Checkpoint, name: str, **options: Any) -> Backend:
            backend = load_backend(opened, name, **options)
            if name == wrong:
                change(backend)
            return backend

        monkeypatch.setattr(conformance, "load_backend", load)

    return patch
