"""``mlx-diffgemma revise``: a text in, and the text as the model would rather have it out."""

import dataclasses
import difflib
import io
import json
from pathlib import Path
from typing import Any

import click

from mlx_diffgemma.backends import load_backend
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.cli.generate import print_text, read_text
from mlx_diffgemma.cli.options import backend_options, denoising_options, prompt_options, source_options
from mlx_diffgemma.editing import revising
from mlx_diffgemma.pipeline import DiffusionGemma


@click.command(short_help="Write a text again, beginning with the text itself.")
@source_options
@click.argument("text", required=False)
@click.option("--file", type=click.Path(path_type=Path), help="Read the text from this file.")
@click.option(
    "--strength", type=float, required=True, metavar="P", help="Probability with which noise replaces a token first, 0 to 1."
)
@click.option("--prompt", metavar="TEXT", help="What the text answers, instead of an instruction to revise it.")
@prompt_options
@denoising_options
@backend_options
@click.option("--diff", is_flag=True, help="Print the change as a unified diff instead of the text.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@click.option("-q", "--quiet", is_flag=True, help="Leave out the summary on standard error.")
def revise(
    model: str,
    revision: str | None,
    text: str | None,
    file: Path | None,
    strength: float,
    prompt: str | None,
    system: str | None,
    raw: bool,
    markup: bool,
    seed: int | None,
    backend: str | None,
    device: str | None,
    dtype: str | None,
    diff: bool,
    as_json: bool,
    quiet: bool,
    **sampler: Any,
) -> None:
    """Revise TEXT, which is read from standard input if it is - or left out.

    A strength of 0 gives the text back, one of 1 writes a new one; in between, denoising begins with a text of which that share
    is noise. Without --raw and --prompt, MODEL is asked in a chat to revise the text.
    """
    given, ending = read_text(text, file, "text")
    revising.check_strength(strength)  # before the weights are read
    checkpoint = Checkpoint.open(model, revision)
    checkpoint.generation.replace(**sampler)
    loaded = DiffusionGemma(checkpoint, load_backend(checkpoint, backend, device=device, dtype=dtype))
    result = revising.revise(loaded, given, strength, prompt=prompt, system=system, raw=raw, markup=markup, seed=seed, **sampler)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result), ensure_ascii=False))
    elif diff:
        print_text(unified_diff(given + ending, result.text + ending, str(file or "text")), "")
    else:
        print_text(result.text, ending)
    if not quiet and not as_json:
        steps = ", ".join(map(str, result.denoising_steps)) or "none"
        click.echo(f"{result.replaced} tokens replaced; denoising steps by block: {steps}; seed: {result.seed}", err=True)


def unified_diff(before: str, after: str, name: str) -> str:
    """The change from one text to the other as ``diff -u`` writes it, and ``patch`` reads it; empty where there is none."""
    old, new = (
        list(io.StringIO(text, newline="\n")) for text in (before, after)
    )  # splitlines() has line breaks that patch has not
    lines = difflib.unified_diff(old, new, name, f"{name} (revised)")
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)
