"""``mlx-diffgemma generate``: a prompt in, a text out, a block at a time."""

import dataclasses
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from mlx_diffgemma.backends import load_backend
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.cli.live import LiveView, live_console, printable
from mlx_diffgemma.cli.options import backend_options, sampler_options, source_options
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.pipeline import DiffusionGemma, Generation
from mlx_diffgemma.sampler import Block, Draft
from mlx_diffgemma.tokenizer import Tokenizer

#: Is shown every event of a generation, as it happens.
View = Callable[[Draft | Block | Generation], None]


@click.command(short_help="Write a text after a prompt.")
@source_options
@click.argument("prompt", required=False)
@click.option("--file", type=click.Path(path_type=Path), help="Read the prompt from this file.")
@click.option("--raw", is_flag=True, help="Take the prompt as it is, without the chat template.")
@click.option("--system", metavar="TEXT", help="A system message before the prompt.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), metavar="N", help="Same seed, same text.  [default: a fresh one]")
@sampler_options
@backend_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@click.option("--no-live", is_flag=True, help="On a terminal, show finished blocks only, not the canvas being denoised.")
@click.option("-q", "--quiet", is_flag=True, help="Leave out the summary on standard error.")
def generate(
    model: str,
    revision: str | None,
    prompt: str | None,
    file: Path | None,
    raw: bool,
    system: str | None,
    seed: int | None,
    backend: str | None,
    device: str | None,
    dtype: str | None,
    as_json: bool,
    no_live: bool,
    quiet: bool,
    **sampler: Any,
) -> None:
    """Write a text after PROMPT, which is read from standard input if it is - or left out.

    The text goes to standard output, a block as soon as it is finished. The options of the sampler (--max-new-tokens to
    --greedy) default to what MODEL's generation_config.json says; `mlx-diffgemma info MODEL` shows it.

    A file's or standard input's last line break is not part of the prompt.
    """
    text = read_prompt(prompt, file)
    checkpoint = Checkpoint.open(model, revision)
    config = checkpoint.generation.replace(**sampler)  # a bad value is told before the weights are read
    loaded = DiffusionGemma(checkpoint, load_backend(checkpoint, backend, device=device, dtype=dtype))
    events = loaded.stream(text, raw=raw, system=system, seed=seed, **sampler)
    view: View = print_json if as_json else TextView(loaded.tokenizer, config.max_new_tokens, summary=not quiet)
    console = None if as_json or no_live else live_console()
    with LiveView(console, loaded.tokenizer.decode, config.max_new_tokens) if console else nullcontext(view) as show:
        for event in events:
            show(event)
    if console and not quiet and isinstance(event, Generation):
        click.echo(summary_line(event), err=True)


def read_prompt(argument: str | None, file: Path | None) -> str:
    """The prompt from the one place it was given in; raises InputError where it is in none or two, or no text."""
    if argument is not None and file is not None:
        raise InputError("a prompt was given both as an argument and as --file; leave out one")
    if file is not None:
        try:
            text = _decode(file.read_bytes(), str(file)).removesuffix("\n")
        except OSError as unreadable:
            raise InputError(f"--file {file}: cannot be read: {unreadable.strerror}") from None
    elif argument is not None and argument != "-":
        text = _decode(argument.encode(errors="surrogateescape"), "the prompt")
    else:
        if sys.stdin is None or (argument is None and sys.stdin.isatty()):
            raise InputError("there is no prompt; give it as an argument, with --file, or on standard input")
        text = _decode(sys.stdin.buffer.read(), "standard input").removesuffix("\n")
    if not text.strip():
        raise InputError("the prompt is empty")
    return text


def _decode(content: bytes, place: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as wrong:
        raise InputError(f"{place} is not UTF-8: byte {wrong.start} is 0x{content[wrong.start]:02X}; convert it first") from None


class TextView:
    """Prints the text as its blocks are committed, and at the end a line of statistics on standard error."""

    def __init__(self, tokenizer: Tokenizer, max_new_tokens: int, *, summary: bool) -> None:
        self.tokenizer, self.max_new_tokens, self.summary = tokenizer, max_new_tokens, summary
        self.tokens: list[int] = []
        self.printed = ""

    def __call__(self, event: Draft | Block | Generation) -> None:
        if isinstance(event, Block):
            self.tokens = [*self.tokens, *event.tokens[0].tolist()][: self.max_new_tokens]
            self._print_up_to(self.tokenizer.decode(self.tokens, final=False))
        elif isinstance(event, Generation):
            self._print_up_to(event.text)
            click.echo()
            if self.summary:
                click.echo(summary_line(event), err=True)

    def _print_up_to(self, text: str) -> None:
        new = text.removeprefix(self.printed)
        # A terminal would obey what a model writes; to a file it goes as it is, where click would strip escape sequences.
        click.echo(printable(new) if sys.stdout.isatty() else new, nl=False, color=True)
        self.printed = text


def summary_line(generation: Generation) -> str:
    """What a generation took, and its seed."""
    statistics = generation.statistics
    seconds = statistics.encode_seconds + statistics.denoise_seconds
    steps = statistics.denoising_steps
    return (
        f"{statistics.prompt_tokens} prompt tokens, {statistics.new_tokens} new tokens in {seconds:.2f} s "
        f"({statistics.tokens_per_second:.1f} per second); denoising steps by block: {', '.join(map(str, steps))} "
        f"({statistics.tokens_per_forward:.1f} tokens per step); finish reason: {generation.finish_reason}; "
        f"seed: {generation.seed}"
    )


def print_json(event: Draft | Block | Generation) -> None:
    """Prints the finished generation as one JSON object."""
    if isinstance(event, Generation):
        content = dataclasses.asdict(event)
        for name in ("tokens_per_forward", "tokens_per_second"):
            content["statistics"][name] = getattr(event.statistics, name)
        click.echo(json.dumps(content, ensure_ascii=False))
