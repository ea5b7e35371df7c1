"""Presets: named trades of quality for fewer denoising steps.

A preset multiplies options of a checkpoint by factors. Absolute values would not do, because a checkpoint's limits belong to its
own canvas and temperatures. The released checkpoint takes at most 48 steps for 256 tokens, the picture model of this package at
most 24 for 36. A limit of 24 steps would halve the one and change nothing in the other. A factor loosens both by the same ratio.
A factor of 0 for ``stability_threshold`` lets a canvas end by its entropy alone.

``benchmarks/presets.py`` measures what each preset saves and costs, on small models whose answers are right or wrong. The factors
are the result of its sweep. Of what it tried, ``fast`` saved the most steps with a loss within two standard errors, and ``draft``
the most at a loss of about one point of right answers. Confidence threshold, entropy bound and canvas length stay as they
are; docs/log.md says what changing them cost. Nobody has measured presets on the released model.
"""

from collections.abc import Mapping
from math import ceil
from types import MappingProxyType
from typing import Any

from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.fields import shown
from mlx_diffgemma.options import unknown_option

#: For each preset, what the checkpoint's options are multiplied by. ``exact`` changes nothing.
PRESETS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "exact": MappingProxyType({}),
        "fast": MappingProxyType({"stability_threshold": 0}),
        "draft": MappingProxyType({"stability_threshold": 0, "max_denoising_steps": 1 / 2}),
    }
)

#: The options that :func:`configured` takes.
OPTIONS = ("preset", *GenerationConfig.option_names())


def configured(generation: GenerationConfig, options: Mapping[str, Any]) -> GenerationConfig:
    """``generation`` with the values of the preset that ``options`` may have, and then with the other ``options``.

    None leaves an option as it is. Raises InputError for an unknown preset or option, or a bad value.
    """
    for name in options:
        if name not in OPTIONS:
            raise unknown_option(name, OPTIONS)
    given = dict(options)
    preset = given.pop("preset", None)
    return (generation if preset is None else scaled(generation, factors(preset))).replace(**given)


def factors(preset: str) -> Mapping[str, float]:
    """The factors of a preset. Raises InputError if there is no such preset."""
    if not isinstance(preset, str):
        raise InputError(f"preset must be one of {', '.join(PRESETS)}, got {shown(preset)}")
    if preset not in PRESETS:
        raise unknown_option(preset, PRESETS, "preset")
    return PRESETS[preset]


def scaled(generation: GenerationConfig, by: Mapping[str, float]) -> GenerationConfig:
    """``generation`` with each of the named options multiplied by its factor. Counts are rounded up."""
    options: dict[str, Any] = {}
    for name, factor in by.items():
        own = getattr(generation, name)
        options[name] = ceil(own * factor) if isinstance(own, int) else own * factor
    return generation.replace(**options)
