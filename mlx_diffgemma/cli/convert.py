"""``mlx-diffgemma convert``: quantizes a BF16 checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_diffgemma.cli.options import Size, backend_options
from mlx_diffgemma.cli.table import table
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.files import replace_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mlx_diffgemma.checkpoint import Checkpoint
    from mlx_diffgemma.convert import Plan
    from mlx_diffgemma.convert.shards import Report
    from mlx_diffgemma.reports.quality import Measurement


@click.command(short_help="Quantize a BF16 checkpoint.")
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of SOURCE on the hub.  [default: main]")
@click.option(
    "--recipe",
    default="4bit",
    show_default=True,
    metavar="NAME",
    help="Recipe to use: 4bit, 6bit, 8bit, mxfp4, nvfp4 or bf16; see above.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="PART=FORMAT",
    help="Set the format of one part, such as experts=4:32 or embedding=bf16. May be repeated.",
)
@click.option(
    "--shard-size",
    type=Size(least=1),
    default="5GB",
    show_default=True,
    metavar="SIZE",
    help="Maximum size of a weight file, such as 500MB or 2GiB; a larger tensor gets its own file.",
)
@click.option("--dry-run", is_flag=True, help="Print the sizes of all parts and write nothing.")
@click.option("--restart", is_flag=True, help="Discard the work of an interrupted run instead of continuing it.")
@click.option("--upload-repo", metavar="OWNER/NAME", help="Upload the finished folder to this repository on the hub.")
@click.option("--measure", is_flag=True, help="Run SOURCE and TARGET, and print how much their outputs differ; see above.")
@click.option(
    "--measure-text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="UTF-8 text to measure on. SOURCE continues a text that is too short.  [default: SOURCE writes it all]",
)
@backend_options
def convert(
    source: str,
    target: Path,
    revision: str | None,
    recipe: str,
    settings: tuple[str, ...],
    shard_size: int,
    dry_run: bool,
    restart: bool,
    upload_repo: str | None,
    measure: bool,
    measure_text: Path | None,
    backend: str | None,
    device: str | None,
    dtype: str | None,
    force: bool,
) -> None:
    """Quantize the BF16 checkpoint SOURCE, a folder or a hub id, into the new folder TARGET.

    A recipe gives each part of the model a format. 4bit, 6bit, 8bit, mxfp4 and nvfp4 name the format of the experts, nine tenths
    of the weights; embedding, attention, mlp, router and self_conditioning then have 8 bits. bf16 packs nothing. Norms and the
    vision tower are always BF16.

    A FORMAT is BITS[:GROUP], mxfp4, mxfp8, nvfp4 or bf16. BITS is 2, 3, 4, 5, 6 or 8. GROUP is the number of weights that share
    a scale and a bias: 32, 64 (the default) or 128.

    TARGET appears only when it is complete. Until then the work is in TARGET.partial. After an interruption, the same command
    continues from there: it checks the finished files and writes damaged ones again. NaN or infinity in SOURCE is an error, and
    so is a SOURCE that changes meanwhile.

    --measure loads SOURCE and then TARGET, with --backend, --device and --dtype. It compares them in a causal pass and on
    canvases with five levels of noise (Kullback-Leibler divergence, share of equal argmax), and counts denoising steps per
    block. The table goes to standard output and into TARGET's README.md. A TARGET that already exists is measured and not
    changed.
    """
    from mlx_diffgemma.backends import find_place
    from mlx_diffgemma.checkpoint import Checkpoint
    from mlx_diffgemma.convert import Plan, check_repository, check_shapes, check_target, make_recipe, side_files, upload, write

    if not measure and (measure_text or backend or device or dtype or force):
        raise InputError("--measure-text, --backend, --device, --dtype and --force are for measuring; add --measure")
    formats = make_recipe(recipe, settings)
    if upload_repo:
        check_repository(upload_repo)
    if measure:
        find_place(backend, device=device, dtype=dtype)
    checkpoint = Checkpoint.open(source, revision)
    if dry_run:
        click.echo(_table(Plan.make(checkpoint, formats, shard_size)))
        return
    text = _text(checkpoint, measure_text) if measure else None  # so that a bad text fails before the long work
    exists = (target / "config.json").exists()
    if text is None or not exists:
        plan = Plan.make(checkpoint, formats, shard_size)
        check_target(target, plan)
        check_shapes(checkpoint)
        checkpoint.fetch_weights()  # after everything that could fail before a long download
        with _progress() as report:
            write(plan, target, side_files(checkpoint, plan), restart=restart, report=report)
        click.echo(f"{target}: {plan.nbytes:,} bytes; shards: {len(plan.shards)}", err=True)
    if text is not None:
        from mlx_diffgemma.cli.loading import loading_bar
        from mlx_diffgemma.reports import quality

        place: dict[str, Any] = {"backend": backend, "device": device, "dtype": dtype, "force": force}
        with loading_bar() as progress:
            found = quality.measure(checkpoint, Checkpoint.open(target), text, **place, progress=progress)
        click.echo(f"{found.conditions()}\n\n{table(found.rows(), left=2)}\n\n{found.steps()}")
        if not exists:
            card = target / "README.md"
            replace_text(card, card.read_text(encoding="utf-8") + _card_section(found))
    if upload_repo:
        upload(target, upload_repo)
        click.echo(f"uploaded to https://huggingface.co/{upload_repo}", err=True)


def _text(checkpoint: "Checkpoint", file: Path | None) -> "NDArray[np.int32]":
    """Tokens of the text to measure on: the beginning-of-text token and the content of the file."""
    import numpy as np

    from mlx_diffgemma.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(checkpoint.folder, checkpoint.generation.eos_token_ids, checkpoint.config.vocab_size)
    try:
        content = file.read_text(encoding="utf-8") if file else ""
    except UnicodeDecodeError as wrong:
        raise InputError(f"{file}: not UTF-8 at byte {wrong.start}; --measure-text needs plain text") from None
    return np.array([tokenizer.bos_token_id, *tokenizer.encode(content)], np.int32)


def _card_section(found: "Measurement") -> str:
    head, *rows = ("| " + " | ".join(row) + " |" for row in found.rows())
    lines = ["", "## Compared with the source", "", found.conditions(), "", head, "|---|---|---:|---:|---:|", *rows]
    return "\n".join([*lines, "", found.steps(), ""])


def _table(plan: "Plan") -> str:
    rows = [("part", "format", "tensors", "bytes", "bits per weight")]
    rows += [(row.part, row.format, str(row.tensors), f"{row.nbytes:,}", f"{row.bits_per_weight:.2f}") for row in plan.rows()]
    return table(rows, left=2)


@contextmanager
def _progress() -> Iterator["Report"]:
    """A function that shows progress on standard error: a bar, removed at the end, on a terminal, else a line per shard."""
    import rich.progress as bars
    from rich.console import Console

    from mlx_diffgemma.convert import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        last = 0

        def line(progress: Progress) -> None:
            nonlocal last
            if progress.shards_done > last:
                last = progress.shards_done
                click.echo(f"shard {last} of {progress.shards}: {progress.bytes_done:,} of {progress.nbytes:,} bytes", err=True)

        yield line
        return
    columns = (bars.BarColumn(), bars.DownloadColumn(), bars.TransferSpeedColumn(), bars.TimeRemainingColumn())
    with bars.Progress(*columns, console=console, transient=True) as bar:

        def update(progress: Progress) -> None:
            if bar.tasks:
                bar.update(bar.task_ids[0], completed=progress.bytes_done)
            else:  # created here so that bytes of an earlier run do not count as speed
                bar.add_task("", completed=progress.bytes_done, total=progress.nbytes)

        yield update
