"""``mlx-diffgemma verify``: checks whether the backends agree on a checkpoint."""

import dataclasses
import json

import click

from mlx_diffgemma.backends import DTYPES
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.cli.loading import loading_bar
from mlx_diffgemma.cli.options import source_options
from mlx_diffgemma.cli.table import table
from mlx_diffgemma.hub import local_folder
from mlx_diffgemma.reports import conformance


@click.command(short_help="Check whether backends agree on a checkpoint.")
@source_options
@click.option(
    "--backends",
    default="mlx,torch",
    show_default=True,
    metavar="NAMES",
    help="Backends to compare, separated by commas; :DEVICE sets a device, as in torch:cpu,torch:cuda.",
)
@click.option(
    "--against",
    metavar="NAME",
    help="Baseline to compare with: a backend, or reference for transformers on the CPU.  [default: the first of --backends]",
)
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Number type to compute in.")
@click.option(
    "--prompt-length",
    type=int,
    metavar="N",
    help="Length of the random prompt, in tokens.  [default: the sliding window and 8 more, at most 64]",
)
@click.option("--canvas-length", type=int, metavar="N", help="Tokens per canvas.  [default: MODEL's, at most 32]")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of the random tokens and the sampler.")
@click.option(
    "--tolerance",
    type=float,
    default=conformance.TOLERANCE,
    show_default=True,
    metavar="X",
    help="Largest allowed absolute difference of float32 logits, after the softcap, and relative difference of soft tokens.",
)
@click.option("--force", is_flag=True, help="Load MODEL even if it needs more memory than is free.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.pass_context
def verify(
    context: click.Context,
    model: str,
    revision: str | None,
    backends: str,
    against: str | None,
    dtype: str,
    prompt_length: int | None,
    canvas_length: int | None,
    seed: int,
    tolerance: float,
    force: bool,
    as_json: bool,
) -> None:
    """Compare the logits, hidden states, entropies and tokens that backends compute from MODEL.

    All backends get the same random tokens. They run a causal pass over a prompt, two denoising steps of the canvas after it, and
    a step in the next block. Then each backend writes a short text. If MODEL reads images, two small images of random pixels go
    through its vision tower, then a causal pass over a text with them, and a denoising step of the canvas after it.

    In float32, logits and soft tokens must differ by at most --tolerance and tokens must be equal. In bfloat16, only the
    divergence of the logits and, more loosely, the soft tokens are checked. The exit status is 0 if the backends agree, and 1 if
    they do not.

    The models are loaded one at a time. --against reference holds all of MODEL in memory, and MODEL must not be quantized.
    """
    names = [name.strip() for name in backends.split(",")]
    local_folder(model)
    conformance.check_choices(names, against=against, dtype=dtype, seed=seed, tolerance=tolerance)
    checkpoint = Checkpoint.open(model, revision)
    with loading_bar() as progress:
        report = conformance.verify(
            checkpoint,
            names,
            against=against,
            dtype=dtype,
            prompt_length=prompt_length,
            canvas_length=canvas_length,
            seed=seed,
            tolerance=tolerance,
            force=force,
            progress=progress,
        )
    problems = report.problems()
    if as_json:
        content = {**dataclasses.asdict(report), "within": not problems, "problems": problems}
        click.echo(json.dumps(content, default=str))
    else:
        click.echo(_text(report, problems))
    context.exit(1 if problems else 0)


def _text(report: conformance.Report, problems: list[str]) -> str:
    lines = [
        f"{report.checkpoint}, {report.dtype}, against {report.baseline}: "
        f"prompt of {report.prompt_length}, canvases of {report.canvas_length}, seed {report.seed}"
        + (f", image mask {report.image_mask}" if report.image_mask else ""),
        "",
        table(
            [
                ("backend", "pass", "logits: max", "mean", "KL: mean", "median", "same argmax", "states: max"),
                *(
                    (
                        f"{each.backend} ({each.device})",
                        one.name,
                        f"{one.max_abs:.1e}",
                        f"{one.mean_abs:.1e}",
                        f"{one.mean_kl:.1e}",
                        f"{one.median_kl:.1e}",
                        f"{one.same_argmax:.1%}",
                        f"{max(one.states):.1e}",
                    )
                    for each in report.comparisons
                    for one in each.passes
                ),
            ],
            left=2,
        ),
        "",
    ]
    images = [
        (
            f"{each.backend} ({each.device})",
            image.name,
            f"{image.max_abs:.1e}",
            f"{image.mean_abs:.1e}",
            f"{image.states[-1]:.1e}",
            f"{max(image.states):.1e}",
        )
        for each in report.comparisons
        for image in each.images
    ]
    if images:
        head = ("backend", "vision tower", "soft tokens: max", "mean", "relative", "states: max")
        lines += [table([head, *images], left=2), ""]
    for each in report.comparisons:
        where = "" if each.first_different is None else f" (the first at position {each.first_different})"
        lines.append(
            f"{each.backend}: {each.different_tokens} of {each.tokens} tokens differ{where}; "
            f"entropies differ by {each.entropy:.1e} nats at most"
        )
        if any(problem.startswith(f"{each.backend}:") for problem in problems):
            lines += ["", f"{each.backend}, hidden states: RMS of the difference over RMS", "", _states(each), ""]
            if each.images:
                lines += [_tower_states(each), ""]
    verdict = f"out of tolerance: {'; '.join(problems)}" if problems else "within tolerance"
    return "\n".join([*lines, verdict])


def _states(comparison: conformance.Comparison) -> str:
    names = conformance.state_names(len(comparison.passes[0].states))
    rows = [(name, *(f"{one.states[index]:.1e}" for one in comparison.passes)) for index, name in enumerate(names)]
    return table([("after", *(one.name for one in comparison.passes)), *rows])


def _tower_states(comparison: conformance.Comparison) -> str:
    names = conformance.tower_state_names(len(comparison.images[0].states))
    rows = [(name, *(f"{image.states[index]:.1e}" for image in comparison.images)) for index, name in enumerate(names)]
    return table([("after", *(image.name for image in comparison.images)), *rows])
