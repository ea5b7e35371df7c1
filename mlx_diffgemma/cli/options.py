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
    click.option("--revision", metavar="NAME", help="Branch, tag or commit of MODEL on the hub.  [default: main]"),
)

#: How the prompt is read, and the seed.
_PROMPT = (
    click.option("--system", metavar="TEXT", help="System message to put before the prompt."),
    click.option("--raw", is_flag=True, help="Use the text as it is, without the chat template."),
    click.option("--markup", is_flag=True, help="Read markup such as <|turn> in the text as control tokens, not as plain text."),
    click.option(
        "--seed",
        type=click.IntRange(0, 2**64 - 1),
        metavar="N",
        help="Seed of the random numbers; the same seed gives the same text.  [default: a new one each time]",
    ),
)

#: ``backend``, ``device``, ``dtype`` and ``force``: the arguments of :func:`mlx_diffgemma.backends.load_backend`.
_BACKEND = (
    click.option(
        "--backend",
        type=click.Choice(NAMES),
        help="Framework that runs the model.  [default: mlx on Apple silicon; elsewhere torch if installed, else mlx]",
    ),
    click.option(
        "--device",
        metavar="NAME",
        help="Device to run on: cpu or gpu with mlx, cpu or cuda[:N] with torch.  [default: gpu or cuda if available, else cpu]",
    ),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        help="Number type for computing and for unquantized weights.  [default: bfloat16 on gpu and cuda, float32 on cpu]",
    ),
    click.option("--force", is_flag=True, help="Load MODEL even if it needs more memory than is free."),
)

#: Fields of :class:`mlx_diffgemma.config.GenerationConfig`, which checks the values. None when an option is not given.
_DENOISING = (
    click.option(
        "--max-denoising-steps",
        type=int,
        metavar="N",
        help="Maximum number of denoising steps per canvas.  [default: MODEL's own]",
    ),
    click.option("--t-min", type=float, metavar="T", help="Temperature that the schedule falls towards.  [default: MODEL's own]"),
    click.option("--t-max", type=float, metavar="T", help="Temperature of the first denoising step.  [default: MODEL's own]"),
    click.option(
        "--entropy-bound",
        type=float,
        metavar="NATS",
        help="In each step, accept the surest positions until their entropies add up to this.  [default: MODEL's own]",
    ),
    click.option(
        "--stability-threshold",
        type=int,
        metavar="K",
        help="End a canvas early only if its most likely tokens equal those of the K steps before.  [default: MODEL's own]",
    ),
    click.option(
        "--confidence-threshold",
        type=float,
        metavar="NATS",
        help="End a canvas early only if its mean entropy per token is below this.  [default: MODEL's own]",
    ),
    click.option(
        "--canvas-length",
        type=int,
        metavar="N",
        help="Tokens per canvas, at most MODEL's; a short canvas suits short answers.  [default: MODEL's own]",
    ),
    click.option("--greedy", is_flag=True, default=None, help="Take the most likely tokens instead of sampled ones."),
)
_SAMPLER = (
    click.option("--max-new-tokens", type=int, metavar="N", help="Maximum number of tokens to write.  [default: MODEL's own]"),
    *_DENOISING,
)


#: Fields of :class:`mlx_diffgemma.config.CausalConfig` that are not among the sampler's options.
_CAUSAL = (
    click.option(
        "--temperature",
        type=float,
        metavar="T",
        help="Divide the logits by this before sampling; causal mode only.  [default: 1]",
    ),
    click.option(
        "--top-k",
        type=int,
        metavar="K",
        help="Sample from the K most likely tokens only; causal mode only.  [default: all tokens]",
    ),
    click.option(
        "--top-p",
        type=float,
        metavar="P",
        help="Sample from the fewest most likely tokens with a total probability of P; causal mode only.  [default: all tokens]",
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
            raise InputError(
                f"{name} {value!r} is not a size; write a number of bytes, or a size such as 4GiB (powers of 1,024) or 5GB "
                f"(powers of 1,000)"
            )
        size = int(float(written[1]) * (1024 if written[3] else 1000) ** (" KMGT".index((written[2] or " ").upper())))
        if size < self.least:
            raise InputError(f"{name} must be at least {self.least} bytes, got {value!r}")
        return size


def size_text(size: int) -> str:
    """A size in the largest unit that divides it, such as 4GiB, else in bytes."""
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
    """``--backend``, ``--device``, ``--dtype`` and ``--force``."""
    return _apply(_BACKEND, function)


def sampler_options(function: Function) -> Function:
    """The sampler's options, with the names of the reference implementation. None leaves the checkpoint's value."""
    return _apply(_SAMPLER, function)


def denoising_options(function: Function) -> Function:
    """As :func:`sampler_options`, without ``--max-new-tokens``: an edited text has its own length."""
    return _apply(_DENOISING, function)


def causal_options(function: Function) -> Function:
    """``--temperature``, ``--top-k`` and ``--top-p``; None when not given."""
    return _apply(_CAUSAL, function)
