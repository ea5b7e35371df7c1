"""``mlx-diffgemma generate``: writes a text after a prompt, and prints it block by block."""

import dataclasses
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from mlx_diffgemma.cli.live import LiveView, live_console, printable
from mlx_diffgemma.cli.loading import check_options, prepared
from mlx_diffgemma.cli.options import (
    backend_options,
    causal_options,
    media_options,
    prompt_options,
    sampler_options,
    source_options,
)
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.vision.sources import Image, Video
from mlx_diffgemma.writing import MODES, Content, Event, Generation, sampling_config

#: Receives every event of a generation as it happens.
View = Callable[[Event], None]

# Fields that are useful only in the library.
_NOT_IN_JSON = ("parts", "cached_tokens", "unsettled")

#: Options of the commands that show a text while it is written.
mode_option = click.option(
    "--mode",
    type=click.Choice(MODES),
    default=MODES[0],
    show_default=True,
    help="Write a canvas at a time (diffusion) or a token at a time (causal).",
)
no_live_option = click.option(
    "--no-live", is_flag=True, help="On a terminal, show only finished text, not the canvas during denoising."
)


@click.command(short_help="Write a text after a prompt.")
@source_options
@click.argument("prompt", required=False)
@click.option("--file", type=click.Path(path_type=Path), help="Read the prompt from this file instead of the argument.")
@prompt_options
@media_options
@mode_option
@sampler_options
@causal_options
@backend_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@no_live_option
@click.option("-q", "--quiet", is_flag=True, help="Do not print the summary on standard error.")
def generate(
    model: str,
    revision: str | None,
    prompt: str | None,
    file: Path | None,
    system: str | None,
    raw: bool,
    markup: bool,
    seed: int | None,
    images: list[Image | Video],
    mode: str,
    backend: str | None,
    device: str | None,
    dtype: str | None,
    force: bool,
    as_json: bool,
    no_live: bool,
    quiet: bool,
    **sampler: Any,
) -> None:
    """Write a text after PROMPT. If PROMPT is - or left out, it is read from standard input.

    Each block or token is printed on standard output as soon as it is finished. The sampler's defaults are in MODEL's
    generation_config.json; `mlx-diffgemma info MODEL` shows them. In causal mode, of the sampler's options only --max-new-tokens,
    --greedy, --temperature, --top-k and --top-p are allowed.

    The last line break of a file or of standard input is not part of the prompt.
    """
    text = read_prompt(prompt, file)
    check_options(sampler, mode)
    loaded = prepared(model, revision, backend=backend, device=device, dtype=dtype, force=force)
    config = sampling_config(loaded.checkpoint.generation, mode, sampler)
    events = loaded.stream(text, images=images, mode=mode, system=system, raw=raw, markup=markup, seed=seed, **sampler)
    view: View = print_json if as_json else TextView(summary=not quiet)
    console = None if as_json or no_live else live_console()
    _ = loaded.backend  # its bar comes before the canvas
    with LiveView(console, loaded.tokenizer.utf8, config.max_new_tokens) if console else nullcontext(view) as show:
        for event in events:
            show(event)
    if console and not quiet and isinstance(event, Generation):
        click.echo(summary_line(event), err=True)


def read_prompt(argument: str | None, file: Path | None) -> str:
    """The prompt, as :func:`read_text` reads it."""
    return read_text(argument, file, "prompt")[0]


def read_text(argument: str | None, file: Path | None, what: str) -> tuple[str, str]:
    """The text from the argument, the file or standard input, and the line ending to print after it.

    A last line break of a file or of standard input belongs to the ending, not to the text. The ending of an argument is a line
    break.

    Raises:
        InputError: the text is missing, given twice, empty, unreadable or not UTF-8.
    """
    if argument is not None and file is not None:
        raise InputError(f"a {what} was given both as an argument and with --file; leave out one")
    from_argument = argument is not None and argument != "-"
    if file is not None:
        try:
            text = _decode(file.read_bytes(), str(file))
        except OSError as unreadable:
            raise InputError(f"--file {file}: cannot be read: {unreadable.strerror}") from None
    elif argument is not None and from_argument:
        text = _decode(argument.encode(errors="surrogateescape"), f"the {what}")
    else:
        if sys.stdin is None or (argument is None and sys.stdin.isatty()):
            raise InputError(f"no {what} was given; pass it as an argument, with --file, or on standard input")
        text = _decode(sys.stdin.buffer.read(), "standard input")
    ending = "\n" if from_argument or text.endswith("\n") else ""
    text = text if from_argument else text.removesuffix("\n")
    if not text.strip():
        raise InputError(f"the {what} is empty")
    return text, ending


def print_text(text: str, ending: str) -> None:
    """Print a text and its ending. On a terminal, make control characters visible and end the line."""
    if sys.stdout.isatty():
        click.echo(printable(text))
    else:
        click.echo(text + ending, nl=False, color=True)


def _decode(content: bytes, place: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as wrong:
        raise InputError(f"{place} is not UTF-8: byte {wrong.start} is 0x{content[wrong.start]:02X}; convert it first") from None


class TextView:
    """Prints the text as it becomes certain, and at the end a summary line on standard error."""

    def __init__(self, *, summary: bool) -> None:
        self.summary = summary

    def __call__(self, event: Event) -> None:
        if isinstance(event, Content):
            # A terminal would obey escape sequences. A file gets the text unchanged: color=True stops click from stripping them.
            click.echo(printable(event.text) if sys.stdout.isatty() else event.text, nl=False, color=True)
        elif isinstance(event, Generation):
            click.echo()
            if self.summary:
                click.echo(summary_line(event), err=True)


def summary_line(generation: Generation) -> str:
    """The tokens, time, steps, finish reason and seed of a generation."""
    statistics = generation.statistics
    seconds = statistics.encode_seconds + statistics.denoise_seconds
    steps = statistics.denoising_steps
    by_block = (
        f"; denoising steps by block: {', '.join(map(str, steps))} ({statistics.tokens_per_forward:.1f} tokens per step)"
        if steps
        else ", one at a time"
    )
    return (
        f"{statistics.prompt_tokens} prompt tokens, {statistics.new_tokens} new tokens in {seconds:.2f} s "
        f"({statistics.tokens_per_second:.1f} per second){by_block}; finish reason: {generation.finish_reason}; "
        f"seed: {generation.seed}"
    )


def print_json(event: Event) -> None:
    """Print the finished generation as one JSON object."""
    if isinstance(event, Generation):
        content = {name: value for name, value in dataclasses.asdict(event).items() if name not in _NOT_IN_JSON}
        for name in ("tokens_per_forward", "tokens_per_second"):
            content["statistics"][name] = getattr(event.statistics, name)
        click.echo(json.dumps(content, ensure_ascii=False))
