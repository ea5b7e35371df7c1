"""Arguments and options that more than one command takes."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from mlx_diffgemma.backends import DTYPES, NAMES
from mlx_diffgemma.errors import InputError

Function = TypeVar("Function", bound=Callable[..., Any])

#: ``model`` and ``revision``: the arguments of :meth:`mlx_diffgemma.checkpoint.Checkpoint.open`.
_SOURCE = (
    click.argument("model"),
    click.option("--revision", metavar="NAME", help="Branch, tag or commit of MODEL on the hub."),
)

#: How a text that is given is read, and the seed.
_PROMPT = (
    click.option("--system", metavar="TEXT", help="A system message before the prompt."),
    click.option("--raw", is_flag=True, help="Take the text as it is, without the chat template."),
    click.option("--markup", is_flag=True, help="Read markup such as <|turn> in the text as control tokens."),
    click.option("--seed", type=click.IntRange(0, 2**64 - 1), metavar="N", help="Same seed, same text.  [default: a fresh one]"),
)

#: ``backend``, ``device`` and ``dtype``: the arguments of :func:`mlx_diffgemma.backends.load_backend`.
_BACKEND = (
    click.option(
        "--backend", type=click.Choice(NAMES), help="Framework.  [default: mlx on Apple silicon, else torch if it is installed]"
    ),
    click.option(
        "--device", metavar="NAME", help="cpu or gpu (mlx), cpu or cuda[:N] (torch).  [default: the accelerator if there is one]"
    ),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        help="Type to compute in and to load what is not quantized in.  [default: bfloat16 on an accelerator, float32 on a CPU]",
    ),
)

#: Fields of :class:`mlx_diffgemma.config.GenerationConfig`, which says what is allowed; None where not given.
_DENOISING = (
    click.option("--max-denoising-steps", type=int, metavar="N", help="Denoising steps per canvas at most."),
    click.option("--t-min", type=float, metavar="T", help="Temperature that the last step approaches."),
    click.option("--t-max", type=float, metavar="T", help="Temperature of the first step."),
    click.option("--entropy-bound", type=float, metavar="NATS", help="Accept positions, surest first, up to this total entropy."),
    click.option(
        "--stability-threshold", type=int, metavar="K", help="A canvas may stop when the last K steps all agree with this one."
    ),
    click.option("--confidence-threshold", type=float, metavar="NATS", help="... and its mean entropy is below this."),
    click.option("--canvas-length", type=int, metavar="N", help="Tokens per canvas; fewer suit short answers."),
    click.option("--greedy", is_flag=True, default=None, help="Accept the most likely tokens instead of sampled ones."),
)
_SAMPLER = (click.option("--max-new-tokens", type=int, metavar="N", help="Tokens to write at most."), *_DENOISING)


#: Fields of :class:`mlx_diffgemma.config.CausalConfig` that the sampler's options do not have.
_CAUSAL = (
    click.option("--temperature", type=float, metavar="T", help="Divides the logits; causal mode only.  [default: 1]"),
    click.option("--top-k", type=int, metavar="K", help="Draw from the K most likely tokens; causal mode only."),
    click.option(
        "--top-p", type=float, metavar="P", help="Draw from the most likely tokens of this probability; causal mode only."
    ),
)


class Size(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes: 512MiB and 4GiB count in powers of 1,024; 500MB, 4GB and plain numbers in powers of 1,000."""

    name = "size"

    def __init__(self, least: int = 0) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        name = param.opts[0] if param else "the value"
        written = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*(?:([KMGT])(i?)B?|B)?", value.strip(), re.ASCII | re.IGNORECASE)
        if not written:
            raise InputError(f"{name} {value!r} is not a size; write it as 4GiB (powers of 1,024), 5GB (of 1,000) or in bytes")
        size = int(float(written[1]) * (1024 if written[3] else 1000) ** (" KMGT".index((written[2] or " ").upper())))
        if size < self.least:
            raise InputError(f"{name} must be at least {self.least} bytes, got {value!r}")
        return size


def size_text(size: int) -> str:
    """A size as a person writes it: 4GiB."""
    for unit, letter in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")):
        if size and size % unit == 0:
            return f"{size // unit}{letter}iB"
    return str(size)


def _apply(options: tuple[Callable[[Function], Function], ...], function: Function) -> Function:
    for option in reversed(options):
        function = option(function)
    return function


def source_options(function: Function) -> Function:
    """The argument MODEL, and ``--revision``."""
    return _apply(_SOURCE, function)


def prompt_options(function: Function) -> Function:
    """``--system``, ``--raw``, ``--markup`` and ``--seed``."""
    return _apply(_PROMPT, function)


def backend_options(function: Function) -> Function:
    """``--backend``, ``--device`` and ``--dtype``."""
    return _apply(_BACKEND, function)


def sampler_options(function: Function) -> Function:
    """The sampler's options by the names the reference gives them. Those not given are None: the checkpoint's then hold."""
    return _apply(_SAMPLER, function)


def denoising_options(function: Function) -> Function:
    """As :func:`sampler_options`, but for ``--max-new-tokens``: where a text is given, it says how many there are."""
    return _apply(_DENOISING, function)


def causal_options(function: Function) -> Function:
    """``--temperature``, ``--top-k`` and ``--top-p``; None where not given."""
    return _apply(_CAUSAL, function)
