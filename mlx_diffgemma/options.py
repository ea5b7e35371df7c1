"""The sampler's options as keyword arguments: their names and types in one place, for functions, editors and error messages."""

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypedDict, TypeVar, get_args, get_type_hints

from mlx_diffgemma.errors import InputError

Function = TypeVar("Function", bound=Callable[..., Any])


class DenoisingOptions(TypedDict, total=False):
    """Fields of :class:`~mlx_diffgemma.config.GenerationConfig`, but for ``max_new_tokens``; None takes the checkpoint's own."""

    max_denoising_steps: int | None
    t_min: float | None
    t_max: float | None
    entropy_bound: float | None
    stability_threshold: int | None
    confidence_threshold: float | None
    eos_token_ids: tuple[int, ...] | None
    pad_token_id: int | None
    greedy: bool | None
    canvas_length: int | None


class SamplerOptions(DenoisingOptions, total=False):
    """Those of both modes: of GenerationConfig, and of :class:`~mlx_diffgemma.config.CausalConfig`."""

    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None


def spelled_out(function: Function) -> Function:
    """Have ``help`` and editors show each option that a function takes by ``**options: Unpack[...]``, with its type.

    None, the default of each, stands for what the checkpoint says.
    """
    signature = inspect.signature(function)
    *named, packed = signature.parameters.values()
    [options] = get_args(packed.annotation)
    each = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in get_type_hints(options).items()
    ]
    function.__signature__ = signature.replace(parameters=[*named, *each])  # type: ignore[attr-defined]
    return function


def unknown_option(name: str, known: Iterable[str]) -> InputError:
    """The error for an option that does not exist: it names the nearest that does."""
    nearest = difflib.get_close_matches(name, known, n=1)
    return InputError(
        f"unknown option {name!r}; " + (f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}")
    )
