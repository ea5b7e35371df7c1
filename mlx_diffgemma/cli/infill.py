"""``mlx-diffgemma infill``: fills the holes of a text."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from mlx_diffgemma.cli.generate import print_text, read_text
from mlx_diffgemma.cli.loading import check_options, prepared
from mlx_diffgemma.cli.options import backend_options, denoising_options, media_options, prompt_options, source_options
from mlx_diffgemma.editing import infilling
from mlx_diffgemma.editing.infilling import MARKER, Infill, parse_template
from mlx_diffgemma.vision.sources import Image, Video


@click.command(short_help="Fill the holes of a text.")
@source_options
@click.argument("template", required=False)
@click.option("--file", type=click.Path(path_type=Path), help="Read the template from this file instead of the argument.")
@click.option("--marker", default=MARKER, show_default=True, metavar="TEXT", help="Text that marks a hole in the template.")
@click.option(
    "--prompt", metavar="TEXT", help="Prompt that the text answers, instead of the built-in instruction to fill the holes."
)
@prompt_options
@media_options
@denoising_options
@backend_options
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object with the text, the holes and all candidates with their scores."
)
@click.option("-q", "--quiet", is_flag=True, help="Do not print the summary on standard error.")
def infill(
    model: str,
    revision: str | None,
    template: str | None,
    file: Path | None,
    marker: str,
    prompt: str | None,
    system: str | None,
    raw: bool,
    markup: bool,
    seed: int | None,
    images: list[Image | Video],
    backend: str | None,
    device: str | None,
    dtype: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    **sampler: Any,
) -> None:
    """Fill the holes of TEMPLATE. If TEMPLATE is - or left out, it is read from standard input.

    <hole:5> is a hole of 5 tokens, <hole:2-8> a hole of 2 to 8 tokens, and <hole> a hole of 1 to 8 tokens. If a hole has a range
    of lengths, every length is tried and the text with the best score is printed. The text outside the holes is not changed.

    By default, a chat message asks MODEL to write the text with its gaps filled in; --prompt replaces this message and --raw
    leaves it out. With either option, the text after the last hole must fit into the canvas of that hole.
    """
    text, ending = read_text(template, file, "template")
    parts = parse_template(text, marker)  # so that a mistake fails before the weights are read
    check_options(sampler)
    loaded = prepared(model, revision, backend=backend, device=device, dtype=dtype, force=force)
    result = infilling.infill(
        loaded, parts, prompt=prompt, images=images, system=system, raw=raw, markup=markup, seed=seed, **sampler
    )
    if as_json:
        click.echo(json.dumps(_content(result), ensure_ascii=False))
        return
    print_text(result.text, ending)
    if not quiet:
        best = result.fillings[0].candidate
        lengths = ", ".join(map(str, best.lengths))
        click.echo(
            f"holes of {lengths} tokens, the best of {len(result.fillings)} candidates; score {best.score:.3f}, "
            f"{best.steps} denoising steps; seed: {result.seed}",
            err=True,
        )


def _content(result: Infill) -> dict[str, Any]:
    candidates = [
        {
            "holes": filling.holes,
            "score": filling.candidate.score,
            **{name: value for name, value in dataclasses.asdict(filling.candidate).items() if name != "holes"},
            "tokens": filling.candidate.holes,
        }
        for filling in result.fillings
    ]
    return {"text": result.text, "holes": result.holes, "candidates": candidates, "seed": result.seed}
