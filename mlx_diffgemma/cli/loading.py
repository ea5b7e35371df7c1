"""How the commands load a model: everything is checked before the weights, and a bar shows the loading on a terminal."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from mlx_diffgemma.backends import Progress
from mlx_diffgemma.config import HOTTEST, GenerationConfig
from mlx_diffgemma.pipeline import DiffusionGemma, prepare
from mlx_diffgemma.writing import sampling_config

#: Values with which each single option of the sampler can be checked, because they agree with all others.
_AGREEABLE = GenerationConfig(t_min=0.0, t_max=HOTTEST)


def check_options(sampler: Mapping[str, Any], mode: str = "diffusion") -> None:
    """Raise InputError if an option of the sampler is wrong, whatever the checkpoint's own values are."""
    sampling_config(_AGREEABLE, mode, sampler)


def prepared(model: str, revision: str | None, **place: Any) -> DiffusionGemma:
    """A model whose weights are loaded, with the bar, when they are first needed.

    ``place`` has the other arguments of :func:`~mlx_diffgemma.pipeline.prepare`.
    """
    return prepare(model, revision=revision, **place, showing=loading_bar)


@contextmanager
def loading_bar() -> Iterator[Progress]:
    """A function that shows how many bytes of weights are loaded, in a bar on standard error, which is removed at the end.

    It shows nothing if standard error is no terminal.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total: None
        return
    import rich.progress as bars

    columns = (bars.TextColumn("loading"), bars.BarColumn(), bars.DownloadColumn(), bars.TransferSpeedColumn())
    shown: bars.Progress | None = None

    def update(done: int, total: int) -> None:
        nonlocal shown
        if shown is None:
            shown = bars.Progress(*columns, console=console, transient=True)
            shown.add_task("", total=total)
            shown.start()
        shown.update(shown.task_ids[0], completed=done)
        if done >= total:
            shown.stop()
            shown = None

    try:
        yield update
    finally:
        if shown is not None:
            shown.stop()
