"""What a template can call: filters, tests, functions, and methods of texts, lists and mappings.

The lists hold what the chat templates of published models use. What is not in them is refused with its name.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import wraps
from math import log2
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.filters import FILTERS
from jinja2.runtime import LoopContext, Undefined
from jinja2.tests import TESTS
from jinja2.utils import Cycler, Joiner, Namespace

from mlx_diffgemma.templates.meter import (
    CALL,
    CHARACTER,
    COMPARISONS,
    ITEM,
    MAX_WIDTH,
    LimitError,
    add,
    check_bits,
    check_width,
    counted,
    make,
    pay_fields,
    sliced,
    spend,
    weigh,
)

# --- filters and tests


def _filter(name: str, pay: Callable[..., Any]) -> Callable[..., Any]:
    """Jinja's filter of that name. ``pay`` gets its arguments first, and may return another value in place of the first."""
    made = FILTERS[name]
    passed = int(hasattr(made, "jinja_pass_arg"))  # Jinja then passes a context, before the value

    @wraps(made)
    def paid(*args: Any, **kwargs: Any) -> Any:
        spend(CALL)
        before, value, after = args[:passed], args[passed], args[passed + 1 :]
        other = pay(value, *after, **kwargs)
        return made(*before, value if other is None else other, *after, **kwargs)

    return paid


def _pay_nothing(value: Any, *args: Any, **kwargs: Any) -> None:
    pass


def _pay_text(value: Any, *args: Any, **kwargs: Any) -> None:
    make(value)


def _pay_slice(value: Any) -> None:
    sliced(value)


def _pay_escape(value: Any) -> None:
    spend(6 * CHARACTER * weigh(value))


def _pay_trim(value: Any, chars: Any = None) -> None:
    make(value)
    spend(weigh(value) * len(chars or ""))


def _pay_each(value: Any, *args: Any, **kwargs: Any) -> Iterator[Any] | None:
    return counted(value) if isinstance(value, Iterable) and not isinstance(value, Undefined) else None


def _pay_sort(value: Any, *args: Any, **kwargs: Any) -> list[Any] | None:
    if not isinstance(value, Iterable) or isinstance(value, Undefined):
        return None
    values = list(counted(value))
    spend(weigh(values) * int(1 + log2(1 + len(values))))
    return values


def _pay_dictsort(value: Any, *args: Any, **kwargs: Any) -> None:
    if isinstance(value, Mapping):
        by_key = not args[1:] and kwargs.get("by", "key") == "key"
        spend(ITEM * len(value) + weigh(list(value) if by_key else value) * int(1 + log2(1 + len(value))))


def _pay_replace(value: Any, old: Any, new: Any, count: Any = None) -> None:
    for part in (value, old, new):
        make(part)
    text = str(value)
    spend(CHARACTER * (len(text) + text.count(str(old)) * len(str(new))))


def join_values(value: Any, d: Any = "", attribute: Any = None) -> list[Any] | None:
    values = _pay_sort(value)
    if values is not None:
        spend(CHARACTER * (4 * weigh(values) + len(values) * weigh(d)))
    return values


def _pay_indent(value: Any, width: Any = 4, *args: Any, **kwargs: Any) -> None:
    columns = check_width(len(width) if isinstance(width, str) else width)
    make(value)
    spend(CHARACTER * columns * (1 + str(value).count("\n")))


def _pay_format(value: Any, *args: Any, **kwargs: Any) -> None:
    pay_fields(str(value), kwargs or args)


def _pay_int(value: Any, *args: Any, **kwargs: Any) -> None:
    if isinstance(value, str) and len(value) > MAX_WIDTH:
        raise LimitError("it reads a number that is too long")


def _pay_round(value: Any, precision: Any = 0, *args: Any, **kwargs: Any) -> None:
    check_bits(4 * abs(int(precision)))


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """As transformers defines it: without HTML escapes."""
    check_width(len(indent) if isinstance(indent, str) else indent)
    spend(CHARACTER * (4 + 8 * bool(ensure_ascii)) * weigh(value) + weigh(separators) * weigh(value))
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if indent is None:
        return encoder.encode(value)
    return "".join(_paid(encoder.iterencode(value)))  # the indentation counts too


def _paid(chunks: Iterable[str]) -> Iterator[str]:
    for chunk in chunks:
        spend(ITEM + CHARACTER * len(chunk))
        yield chunk


def _sum(environment: jinja2.Environment, iterable: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    if attribute is not None:
        iterable = environment.call_filter("map", iterable, kwargs={"attribute": attribute})
    for value in counted(iterable):
        start = add(start, value)
    return start


_PAYMENTS: dict[Callable[..., Any], str] = {
    _pay_nothing: "abs attr count d default first float items last length",
    _pay_text: "capitalize lower safe string title upper",
    _pay_escape: "e escape",
    _pay_trim: "trim",
    _pay_each: "list map reject rejectattr select selectattr",
    _pay_sort: "groupby max min sort unique",
    _pay_dictsort: "dictsort",
    _pay_replace: "replace",
    join_values: "join",
    _pay_indent: "indent",
    _pay_format: "format",
    _pay_int: "int",
    _pay_round: "round",
    _pay_slice: "reverse",
}
PAID_FILTERS = {name: _filter(name, pay) for pay, names in _PAYMENTS.items() for name in names.split()}
PAID_FILTERS |= {"tojson": _tojson, "sum": jinja2.pass_environment(_sum)}


def _is_lower(value: Any) -> bool:
    make(value)
    return str(value).islower()


def _is_upper(value: Any) -> bool:
    make(value)
    return str(value).isupper()


_SAME_TESTS = """
boolean callable defined divisibleby even false filter float integer iterable mapping none number odd sameas sequence string
test true undefined
"""
_TESTS: Mapping[str, Any] = TESTS
PAID_TESTS: dict[str, Callable[..., Any]] = {
    **{name: _TESTS[name] for name in _SAME_TESTS.split()},
    "lower": _is_lower,
    "upper": _is_upper,
    **{name: COMPARISONS[name] for name in ("eq", "ne", "lt", "le", "gt", "ge", "in")},
    **{"equalto": COMPARISONS["eq"], "lessthan": COMPARISONS["lt"], "greaterthan": COMPARISONS["gt"]},
    **{"==": COMPARISONS["eq"], "!=": COMPARISONS["ne"], "<": COMPARISONS["lt"], "<=": COMPARISONS["le"]},
    **{">": COMPARISONS["gt"], ">=": COMPARISONS["ge"]},
}


# --- functions and methods


def _raise_exception(message: Any) -> None:
    make(message)
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > MAX_WIDTH:
        raise LimitError("it asks for a date in too long a form")
    return datetime.now().strftime(re.sub(r"%[\d\-_^#0+]*\d", "%", form))  # a width can be any number


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    pairs = [counted(arg) if not isinstance(arg, Mapping) else arg for arg in args]
    spend(ITEM * sum(len(arg) for arg in args if isinstance(arg, Mapping)))
    return dict(*pairs, **kwargs)


class _Namespace(Namespace):
    """As in transformers: without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have a name that begins with an underscore, got {name!r}")


def pay_method(text: str, name: str, arguments: Sequence[Any]) -> None:
    """Pay for a call of a method of str, before it is made."""
    given = max((len(argument) for argument in arguments if isinstance(argument, str)), default=0)
    spend(CHARACTER * (len(text) + given))
    if name in ("strip", "lstrip", "rstrip", "rfind", "rindex", "rsplit", "rpartition"):  # these may look at each pair
        spend(len(text) * given // 4)
    if name in ("split", "rsplit", "splitlines"):
        separator = arguments[0] if arguments and isinstance(arguments[0], str) and arguments[0] else None
        spend(ITEM * (text.count(separator) if separator else len(text) // 2))
    if name in ("center", "ljust", "rjust", "zfill"):
        for argument in arguments:
            check_width(argument)
    if name == "replace" and len(arguments) >= 2:
        _pay_replace(text, *arguments[:2])


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


#: The methods that a template can call, by the type of their object.
METHODS: dict[type, frozenset[str]] = {
    str: _names(
        "capitalize center count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace istitle "
        "isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip "
        "split splitlines startswith strip swapcase title upper zfill"
    ),
    list: _names("copy count index"),
    tuple: _names("count index"),
    dict: _names("copy get items keys values"),
    LoopContext: _names("changed cycle"),
    Cycler: _names("next reset"),
}


def _bounded_range(*args: int) -> range:
    made = range(*args)
    if len(made) > 100_000:
        raise OverflowError("Range too big: a template may count to 100,000")
    return made


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "range": _bounded_range,
    "dict": _dict,
    "namespace": _Namespace,
    "cycler": Cycler,
    "joiner": Joiner,
    "raise_exception": _raise_exception,
    "strftime_now": _strftime_now,
}
