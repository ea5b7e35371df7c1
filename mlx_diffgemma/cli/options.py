"""Arguments and options that more than one command takes."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from mlx_diffgemma.backends import DTYPES, NAMES

Function = TypeVar("Function", bound=Callable[..., Any])

#: ``model`` and ``revision``: the arguments of :meth:`mlx_diffgemma.checkpoint.Checkpoint.open`.
_SOURCE = (
    click.argument("model"),
    click.option("--revision", metavar="NAME", help="Branch, tag or commit of MODEL on the hub."),
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


def _apply(options: tuple[Callable[[Function], Function], ...], function: Function) -> Function:
    for option in reversed(options):
        function = option(function)
    return function


def source_options(function: Function) -> Function:
    """The argument MODEL, and ``--revision``."""
    return _apply(_SOURCE, function)


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
