"""Checks of single values that come from files or callers. Each takes the value's name, and returns the value or raises.

The error is of the class that the caller names, with one line such as ``config.json: hidden_size must be an integer from 1 to
65536, got 1.5``.
"""

from collections.abc import Mapping
from typing import Any, TypeGuard

from mlx_diffgemma.errors import DiffGemmaError

Problem = type[DiffGemmaError]


def integer(name: str, value: object, least: int, most: int, problem: Problem) -> int:
    """An integer from ``least`` to ``most``. Neither a boolean nor a float such as 8.0 is one."""
    if type(value) is not int or not least <= value <= most:
        raise problem(f"{name} must be an integer from {least} to {most}, got {shown(value)}")
    return value


def number(name: str, value: object, least: float, most: float, problem: Problem) -> float:
    """A finite number from ``least`` to ``most``."""
    if not is_number(value) or not least <= value <= most:
        raise problem(f"{name} must be a number from {least:g} to {most:g}, got {shown(value)}")
    return value


def flag(name: str, value: object, problem: Problem) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise problem(f"{name} must be true or false, got {shown(value)}")
    return value


def table(name: str, value: object, problem: Problem) -> Mapping[str, Any]:
    """A JSON object."""
    if not isinstance(value, Mapping):
        raise problem(f"{name} must be a JSON object, got {shown(value)}")
    return value


def token_ids(name: str, value: object, vocab_size: int, problem: Problem) -> tuple[int, ...]:
    """Token ids of a vocabulary: a list of integers, which are at most 1,024."""
    if not isinstance(value, list | tuple) or len(value) > 1024:
        raise problem(f"{name} must be a list of at most 1024 token ids, got {shown(value)}")
    return tuple(integer(name, token, 0, vocab_size - 1, problem) for token in value)


def shown(value: object) -> str:
    """A value as a message shows it: not more than a few words of it."""
    if isinstance(value, list | tuple | dict) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 128:
        return "an integer of more than 38 digits"
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a number, and not a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool)
