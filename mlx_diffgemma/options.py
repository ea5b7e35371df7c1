"""The sampler's options as keyword arguments: one list of names and types for functions, editors and error messages."""

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypedDict, TypeVar, get_args, get_type_hints

from mlx_diffgemma.errors import InputError
from mlx_diffgemma.fields import shown

Function = TypeVar("Function", bound=Callable[..., Any])


class DenoisingOptions(TypedDict, total=False):
    """A preset, and fields of :class:`~mlx_diffgemma.config.GenerationConfig` except ``max_new_tokens``.

    The preset is one of :data:`mlx_diffgemma.presets.PRESETS`. The fields replace its values. None takes the preset's value, and
    without a preset the checkpoint's.
    """

    preset: str | None
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
    """The options of both modes: fields of GenerationConfig and of :class:`~mlx_diffgemma.config.CausalConfig`."""

    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None


def spelled_out(function: Function) -> Function:
    """Decorator that shows ``help`` and editors every option behind a function's ``**options: Unpack[...]``, with its type.

    The default of each option is None, which takes the checkpoint's value.
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


def unknown_option(name: str, known: Iterable[str], kind: str = "option") -> InputError:
    """The error for an option that does not exist. It suggests the option with the nearest name."""
    nearest = difflib.get_close_matches(name, known, n=1)
    return InputError(
        f"unknown {kind} {shown(name)}; " + (f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}")
    )
