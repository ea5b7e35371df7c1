"""``mlx-diffgemma bench``: measures the speed and memory of a checkpoint on this machine."""

import dataclasses
import json
from typing import Any

import click

from mlx_diffgemma.backends import find_place, load_backend
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.cli.estimate import estimate_json, estimate_text
from mlx_diffgemma.cli.loading import check_options, loading_bar
from mlx_diffgemma.cli.options import backend_options, optional_source_options, sampler_options
from mlx_diffgemma.cli.table import table
from mlx_diffgemma.hub import local_folder
from mlx_diffgemma.presets import configured
from mlx_diffgemma.reports import speed
from mlx_diffgemma.reports.estimate import estimate, find_hardware, recognize

#: The value of ``--estimate`` without a machine, and the one for all machines.
_THIS, _ALL = "this", "all"
_RELEASED = "mlx-community/diffusiongemma-26B-A4B-it-4bit"


@click.command(short_help="Measure speed and memory on this machine.")
@optional_source_options
@click.option(
    "--prompt-length",
    type=int,
    default=speed.PROMPT_LENGTH,
    show_default=True,
    metavar="N",
    help="Length of the random prompt, in tokens.",
)
@click.option(
    "--repeats",
    type=int,
    default=speed.REPEATS,
    show_default=True,
    metavar="N",
    help="Times to measure the prompt, the step, the token and the images.",
)
@click.option("--warmup", type=int, default=speed.WARMUP, show_default=True, metavar="N", help="Runs before the measured ones.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of the random tokens and the sampler.")
@click.option("--no-images", is_flag=True, help="Measure no images. On a CPU, the largest image takes minutes.")
@sampler_options
@backend_options
@click.option(
    "--estimate",
    "estimated",
    is_flag=False,
    flag_value=_THIS,
    metavar="[MACHINE]",
    help="Measure nothing. Show by arithmetic the least time that MACHINE can take, such as m3-pro, 4090 or h100: the bytes and "
    "operations of each part. Write it after MODEL.  [default: this machine if it is known, else all; all shows all]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the tables.")
def bench(
    model: str | None,
    revision: str | None,
    prompt_length: int,
    repeats: int,
    warmup: int,
    seed: int,
    no_images: bool,
    backend: str | None,
    device: str | None,
    dtype: str | None,
    force: bool,
    estimated: str | None,
    as_json: bool,
    **sampler: Any,
) -> None:
    """Measure how fast MODEL reads a random prompt, runs one denoising step, writes one causal token, and writes a text of
    --max-new-tokens. If MODEL reads images, measure also how long it takes to read one of its usual size, and one of the largest
    size that fits into its context.

    The table shows the median, minimum and maximum of --repeats runs. The text is written once, and no token ends it early. A
    trained model takes more steps after a random prompt than after a real one, so real texts are written faster.

    The last table shows which mode and which canvas length of `generate` are fastest here, and the option that selects them. That
    depends on how many tokens a denoising step settles: `generate` prints this number (tokens per step) for your own prompts. A
    step of a shorter canvas costs less, but mostly settles fewer tokens too: `generate --canvas-length N` prints how many.

    With --estimate, nothing is measured, and no weights are downloaded: only the headers of their files are read. Without MODEL,
    it is about the released 4-bit checkpoint.
    """
    if model is None:
        if estimated is None:
            raise click.UsageError("Missing argument 'MODEL'.")
        model = _RELEASED
    check_options(sampler)
    runs = {"prompt_length": prompt_length, "repeats": repeats, "warmup": warmup, "seed": seed}
    speed.check_runs(**runs)
    local_folder(model)
    if estimated is not None:
        _estimate(model, revision, estimated, prompt_length, sampler, as_json=as_json)
        return
    find_place(backend, device=device, dtype=dtype)
    checkpoint = Checkpoint.open(model, revision)
    config = configured(checkpoint.generation, sampler)
    speed.check_lengths(checkpoint.config, config, prompt_length=prompt_length, repeats=repeats, warmup=warmup)
    with loading_bar() as progress:
        loaded = load_backend(checkpoint, backend, device=device, dtype=dtype, force=force, progress=progress)
    result = speed.bench(loaded, config, **runs, images=not no_images)
    click.echo(json.dumps(_as_json(model, result)) if as_json else _as_text(model, result))


def _estimate(
    model: str, revision: str | None, machine: str, prompt_length: int, sampler: dict[str, Any], *, as_json: bool
) -> None:
    if machine == _THIS:
        this = speed.Machine.this()
        hardware = recognize(this.cpu, this.gpu)
    else:
        hardware = None if machine == _ALL else find_hardware(machine)
    checkpoint = Checkpoint.open(model, revision)
    config = configured(checkpoint.generation, sampler)
    speed.check_lengths(checkpoint.config, config, prompt_length=prompt_length, repeats=1, warmup=0)
    result = estimate(checkpoint, prompt_length, config.canvas_length)
    click.echo(json.dumps(estimate_json(model, result, hardware)) if as_json else estimate_text(model, result, hardware))


def _as_json(model: str, result: speed.Benchmark) -> dict[str, Any]:
    content = {"model": model, **dataclasses.asdict(result)}
    for name in ("tokens_per_forward", "tokens_per_second"):
        content["text"][name] = getattr(result.text, name)
    content["choices"] = [
        {
            **choice._asdict(),
            "shorter": [each._asdict() for each in choice.shorter],
            **{name: getattr(choice, name) for name in ("mode", "canvas_length", "options")},
        }
        for choice in result.choices()
    ]
    return content


def _as_text(model: str, result: speed.Benchmark) -> str:
    machine, text = result.machine, result.text
    steps = text.denoising_steps
    measured = [
        ("", "median", "least", "most"),
        (f"prompt of {result.prompt_length}, tokens/s", *_figures(result.prefill, ".1f")),
    ]
    for canvas in result.canvases:
        measured.append((f"step of a canvas of {canvas.length}, s", *_figures(canvas.step, ".4f")))
        measured.append(("commit of that canvas, s", *_figures(canvas.commit, ".4f")))
    measured.append(("causal token, s", *_figures(result.token, ".4f")))
    for image in result.images:
        label = f"image of {image.soft_tokens:,} tokens"
        measured.append((f"{label}, vision tower, s", *_figures(image.tower, ".4f")))
        measured.append((f"{label}, causal pass, s", *_figures(image.encode, ".4f")))
    written = [
        (f"text of {text.new_tokens} tokens, tokens/s", f"{text.tokens_per_second:.1f}"),
        ("tokens per denoising step", f"{text.tokens_per_forward:.2f}"),
        ("denoising steps per block", f"{sum(steps) / len(steps):.1f}"),
        ("peak memory of the process, bytes", _bytes(result.peak_rss)),
        ("peak memory of the framework, bytes", _bytes(result.peak_device_memory)),
    ]
    choices = [
        (
            "tokens per step",
            *(f"canvas of {canvas.length}, tokens/s" for canvas in result.canvases),
            "causal, tokens/s",
            "fastest",
        ),
        *(
            (
                f"{each.tokens_per_forward}",
                f"{each.diffusion:.1f}",
                *(f"{one.diffusion:.1f} ({_needed(one)})" for one in each.shorter),
                f"{each.causal:.1f}",
                each.options,
            )
            for each in result.choices()
        ),
    ]
    origin = [
        ("backend", f"{result.backend} on {result.device}, {result.dtype}"),
        ("cpu", machine.cpu),
        *([("gpu", machine.gpu)] if machine.gpu else []),
        ("system", f"{machine.system}, Python {machine.python}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items())),
        ("date", machine.date),
        ("seed", f"{result.seed}, {result.repeats} repeats"),
    ]
    return "\n\n".join([f"{model}\n{table(origin, left=2)}", table(measured), table(written), f"{_ASSUMED}\n{table(choices)}"])


_ASSUMED = """\
Speed by the tokens that a denoising step settles, if they are as many in every canvas. They depend on the text, and mostly are
fewer in a shorter canvas. In brackets: from how many on it is faster than the longest canvas in the same row."""


def _needed(shorter: speed.Shorter) -> str:
    return "never" if shorter.needed is None else f"from {shorter.needed:.1f}"


def _figures(spread: speed.Spread, form: str) -> tuple[str, str, str]:
    return format(spread.median, form), format(spread.least, form), format(spread.most, form)


def _bytes(size: int | None) -> str:
    return "not known" if size is None else f"{size:,}"
