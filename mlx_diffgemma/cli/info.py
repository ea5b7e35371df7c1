"""``mlx-diffgemma info``: shows a checkpoint's parts, shape, memory and sampling defaults without reading its weights."""

import dataclasses
import json
from typing import Any

import click

from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.cli.options import source_options
from mlx_diffgemma.cli.table import table
from mlx_diffgemma.reports.summary import Summary, summarize


@click.command(short_help="Show a checkpoint's shape, formats and memory.")
@source_options
@click.option(
    "--context",
    type=int,
    metavar="N",
    help="Length of the text, in tokens, for which to compute memory.  [default: 8192, or the model's context if shorter]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the tables.")
def info(model: str, revision: str | None, context: int | None, as_json: bool) -> None:
    """Show the shape of MODEL, its parts and their formats, whether it reads images, the memory it needs, and its sampling
    defaults.

    Only the headers of the weight files are read. If MODEL is a hub id that is not in the local cache, only small files and these
    headers are downloaded.
    """
    summary = summarize(Checkpoint.open(model, revision), context)
    click.echo(json.dumps(_as_json(summary)) if as_json else _as_text(model, summary))


def _as_json(summary: Summary) -> dict[str, Any]:
    content = dataclasses.asdict(summary)
    for part, entry in zip(summary.parts, content["parts"], strict=True):
        entry["bits_per_weight"] = part.bits_per_weight
    for dtype, memory in summary.memory.items():
        content["memory"][dtype]["total"] = memory.total
    totals = {name: getattr(summary, name) for name in ("parameters", "nbytes", "bits_per_weight")}
    return {**totals, **content}


def _as_text(model: str, summary: Summary) -> str:
    config, generation = summary.config, summary.generation
    sliding = sum(layer.is_sliding for layer in config.layers)
    full = len(config.layers) - sliding
    shape = [
        ("parameters", f"{summary.parameters:,}; active for each token: {summary.active_parameters:,}"),
        (
            "layers",
            f"{len(config.layers)}: {sliding} with a window of {config.sliding_window:,}, {full} full",
        ),
        ("experts", f"{config.num_experts}, {config.top_k_experts} of them for each token"),
        ("context", f"{config.max_position_embeddings:,} tokens"),
        ("canvas", f"{config.canvas_length} tokens"),
        ("vocabulary", f"{config.vocab_size:,} tokens"),
        *_images(summary),
    ]
    parts: list[tuple[str, ...]] = [("part", "format", "parameters", "bytes", "bits per weight")]
    parts += [_part_row(part.name, part.format, part) for part in summary.parts]
    parts += [_part_row("total", "", summary)]
    memory = [("bytes to run with dtype", *summary.memory)]
    for label, name in (
        ("weights", "weights"),
        (f"cache of {summary.context:,} tokens, with room", "cache"),
        ("  each token, full layers", "cache_per_token"),
        ("  all windows, once full", "cache_windows"),
        ("workspace of a step", "workspace"),
        ("total", "total"),
    ):
        memory.append((label, *(f"{getattr(entry, name):,}" for entry in summary.memory.values())))
    if summary.images:
        label = f"features of an image of {summary.images.soft_tokens:,} tokens"
        memory.append((label, *(f"{summary.images.nbytes[dtype]:,}" for dtype in summary.memory)))
    defaults = [(field.name, _value(getattr(generation, field.name))) for field in dataclasses.fields(generation)]
    sections = [
        f"{model}\n{table(shape, left=2)}",
        table(parts, left=2),
        table(memory),
        "generation defaults\n" + table(defaults, left=2),
    ]
    return "\n\n".join(sections)


def _images(summary: Summary) -> list[tuple[str, str]]:
    images = summary.images
    if images is None:
        return [("images", "not read, because there is no vision tower")]
    *others, largest = (f"{each:,}" for each in images.budgets)
    return [
        ("images", f"up to {images.soft_tokens:,} tokens each; with --image-tokens {', '.join(others)} or {largest}"),
        ("vision tower", f"{images.layers} layers; projection {images.projection}"),
    ]


def _part_row(name: str, form: str, numbers: Any) -> tuple[str, ...]:
    return name, form, f"{numbers.parameters:,}", f"{numbers.nbytes:,}", f"{numbers.bits_per_weight:.2f}"


def _value(value: Any) -> str:
    """A default in the form that the option takes."""
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "the model's own" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
