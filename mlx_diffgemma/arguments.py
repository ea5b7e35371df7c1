"""Checks the arguments of public functions against their annotations, once, where they enter the library.

NumPy's integers, floats, booleans and strings become Python's. A value of another type is an InputError of one line.
"""

import functools
import inspect
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np

from mlx_diffgemma.errors import InputError
from mlx_diffgemma.fields import shown

Function = TypeVar("Function", bound=Callable[..., Any])

#: How messages name a type, alone and in a list.
_NAMES = {
    bool: ("True or False", "booleans"),
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    Path: ("a path", "paths"),
    Mapping: ("a mapping", "mappings"),
    Callable: ("a function", "functions"),
    Any: ("a value", "values"),
}


def checked(function: Function) -> Function:
    """Decorator: raise InputError for an argument that its annotation does not allow, before the function is called.

    On a class, this applies to its constructor. Options behind ``**options`` only lose their NumPy types: the configuration that
    they go into knows their types and ranges.
    """
    if isinstance(function, type):
        function.__init__ = checked(function.__init__)  # type: ignore[misc]
        return cast(Function, function)
    signature = inspect.signature(function)
    hints_of = functools.cache(lambda: get_type_hints(function))  # later, when all names in the annotations exist

    @functools.wraps(function)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        bound, hints = signature.bind(*arguments, **named), hints_of()
        for name, value in bound.arguments.items():
            if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                bound.arguments[name] = {option: plain(given) for option, given in value.items()}
            elif name in hints:
                bound.arguments[name] = _fit(name, value, hints[name])
        return function(*bound.args, **bound.kwargs)

    return cast(Function, wrapper)


def plain(value: Any) -> Any:
    """The value without NumPy's types, also in a list or tuple."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


class _Misfit(Exception):
    """A value does not have the type."""


def _fit(name: str, value: Any, hint: Any) -> Any:
    try:
        return _fitted(value, hint)
    except _Misfit:
        raise InputError(f"{name} must be {_described(hint)}, got {shown(value)}") from None


def _fitted(value: Any, hint: Any) -> Any:
    """The value as the type ``hint``. Raises _Misfit."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _first_fitted(value, inner)
    if origin is np.ndarray:
        return _token_ids(value)
    if origin is Iterable:
        if not isinstance(value, Iterable) or isinstance(value, Mapping | str | bytes | bytearray | memoryview):
            raise _Misfit
        return _list(list(value), inner, list)
    if origin in (Sequence, tuple, list):
        return _list(value, inner, tuple if origin is tuple else list)
    kind = origin or hint
    if kind in (bool, int, float, str):
        value = value.item() if isinstance(value, np.generic) else value
        wanted = (int, float) if kind is float else kind
        fits = isinstance(value, wanted) and (kind is bool or not isinstance(value, bool))  # to Python, a boolean is an int
    elif kind is Path and isinstance(value, str | os.PathLike):
        return Path(value)
    elif kind is Callable:
        fits = callable(value)
    else:
        fits = kind is Any or not isinstance(kind, type) or isinstance(value, kind)
    if not fits:
        raise _Misfit
    return value


def _first_fitted(value: Any, hints: Iterable[Any]) -> Any:
    for hint in hints:
        try:
            return _fitted(value, hint)
        except _Misfit:
            pass
    raise _Misfit


def _list(value: Any, inner: tuple[Any, ...], make: type) -> Any:
    """A list or tuple whose items have the types ``inner``: one for all, or one for each."""
    if isinstance(value, np.ndarray) and value.ndim:
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray | memoryview):
        raise _Misfit
    each = len(inner) > 1 and inner[-1] is not Ellipsis
    if each and len(inner) != len(value):
        raise _Misfit
    if inner[0] is int and not each and all(type(item) is int for item in value):  # a long prompt
        return value
    return make(_fitted(item, inner[index if each else 0]) for index, item in enumerate(value))


def _token_ids(value: Any) -> Any:
    """Token ids as int32 [N]."""
    if not isinstance(value, np.ndarray):
        value = np.array(_list(value, (int,), list), np.int64 if len(value) else np.int32)
    if value.dtype.kind not in "iu" or (value.size and not -(2**31) <= value.min() <= value.max() < 2**31):
        raise _Misfit
    return value.astype(np.int32)


def _described(hint: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(each) for each in inner if each is not type(None))
    if origin is np.ndarray:
        return "a list of token ids"
    if origin is tuple and inner[-1] is not Ellipsis:
        return f"{len(inner)} values"
    if origin in (Sequence, Iterable, tuple, list):
        return f"a list of {_plural(inner[0])}"
    return _NAMES.get(origin or hint, (f"a {getattr(hint, '__name__', hint)}",))[0]


def _plural(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " and ".join(map(_plural, inner))
    if origin is tuple:
        return f"tuples of {len(inner)} {_plural(inner[0])}"
    return _NAMES.get(origin or hint, ("", f"{getattr(hint, '__name__', hint)}s"))[1]
