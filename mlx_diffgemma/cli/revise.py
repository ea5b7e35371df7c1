"""``mlx-diffgemma revise``: rewrites a text, starting from the text itself."""

import dataclasses
import difflib
import io
import json
from pathlib import Path
from typing import Any

import click

from mlx_diffgemma.cli.generate import print_text, read_text
from mlx_diffgemma.cli.loading import check_options, prepared
from mlx_diffgemma.cli.options import backend_options, denoising_options, media_options, prompt_options, source_options
from mlx_diffgemma.editing import revising
from mlx_diffgemma.vision.sources import Image, Video


@click.command(short_help="Rewrite a text, starting from the text itself.")
@source_options
@click.argument("text", required=False)
@click.option("--file", type=click.Path(path_type=Path), help="Read the text from this file instead of the argument.")
@click.option(
    "--strength",
    type=float,
    required=True,
    metavar="P",
    help="Probability that a token is replaced by noise at the start: 0 changes nothing, 1 writes a new text.",
)
@click.option("--prompt", metavar="TEXT", help="Prompt that the text answers, instead of the built-in instruction to revise it.")
@prompt_options
@media_options
@denoising_options
@backend_options
@click.option("--diff", is_flag=True, help="Print the changes as a unified diff instead of the text.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@click.option("-q", "--quiet", is_flag=True, help="Do not print the summary on standard error.")
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
    images: list[Image | Video],
    backend: str | None,
    device: str | None,
    dtype: str | None,
    force: bool,
    diff: bool,
    as_json: bool,
    quiet: bool,
    **sampler: Any,
) -> None:
    """Revise TEXT. If TEXT is - or left out, it is read from standard input.

    Noise replaces each token with probability --strength, and denoising starts from the result. By default, a chat message asks
    MODEL to revise the text; --prompt replaces this message and --raw leaves it out.
    """
    given, ending = read_text(text, file, "text")
    revising.check_strength(strength)  # so that a bad value fails before the weights are read
    check_options(sampler)
    loaded = prepared(model, revision, backend=backend, device=device, dtype=dtype, force=force)
    result = revising.revise(
        loaded, given, strength, prompt=prompt, images=images, system=system, raw=raw, markup=markup, seed=seed, **sampler
    )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result), ensure_ascii=False))
    elif diff:
        print_text(unified_diff(given + ending, result.text + ending, str(file or "text")), "")
    else:
        print_text(result.text, ending)
    if not quiet and not as_json:
        steps = ", ".join(map(str, result.denoising_steps)) or "none"
        click.echo(
            f"{result.replaced} tokens replaced by noise; denoising steps by block: {steps}; seed: {result.seed}", err=True
        )


def unified_diff(before: str, after: str, name: str) -> str:
    """The changes between two texts in the format of ``diff -u``, which ``patch`` reads; empty if the texts are equal."""
    old, new = (
        list(io.StringIO(text, newline="\n")) for text in (before, after)
    )  # not splitlines(): it also splits at characters that are not line breaks to patch
    lines = difflib.unified_diff(old, new, name, f"{name} (revised)")
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)
