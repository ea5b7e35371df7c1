"""``mlx-diffgemma infill``: a text with holes in, the same text without them out."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from mlx_diffgemma.backends import load_backend
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.cli.generate import print_text, read_text
from mlx_diffgemma.cli.options import backend_options, denoising_options, prompt_options, source_options
from mlx_diffgemma.editing import infilling
from mlx_diffgemma.editing.infilling import MARKER, Infill, parse_template
from mlx_diffgemma.pipeline import DiffusionGemma


@click.command(short_help="Fill in the holes of a text.")
@source_options
@click.argument("template", required=False)
@click.option("--file", type=click.Path(path_type=Path), help="Read the template from this file.")
@click.option("--marker", default=MARKER, show_default=True, metavar="TEXT", help="What stands for a hole in the template.")
@click.option("--prompt", metavar="TEXT", help="What the text answers, instead of an instruction to fill it in.")
@prompt_options
@denoising_options
@backend_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: text, holes, and all candidates with their scores.")
@click.option("-q", "--quiet", is_flag=True, help="Leave out the summary on standard error.")
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
    backend: str | None,
    device: str | None,
    dtype: str | None,
    as_json: bool,
    quiet: bool,
    **sampler: Any,
) -> None:
    """Fill in the holes of TEMPLATE, which is read from standard input if it is - or left out.

    <hole:5> is a hole of 5 tokens, <hole:2-8> one of 2 to 8, and <hole> one of 1 to 8. Lengths that are not known are tried, and
    the likeliest text is printed. Everything outside the holes comes out as it went in.

    Without --raw and --prompt, MODEL is asked in a chat to write the text with its gaps filled in. With either, what is behind
    the last hole must fit into its canvas.
    """
    text, ending = read_text(template, file, "template")
    parts = parse_template(text, marker)  # a mistake is told before the weights are read
    checkpoint = Checkpoint.open(model, revision)
    checkpoint.generation.replace(**sampler)
    loaded = DiffusionGemma(checkpoint, load_backend(checkpoint, backend, device=device, dtype=dtype))
    result = infilling.infill(loaded, parts, prompt=prompt, system=system, raw=raw, markup=markup, seed=seed, **sampler)
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
