"""What a rendering may spend, and what values and operators cost.

Prices are in units of about 10 ns of work. Everything pays before it runs, by the size of what it reads and of what it makes.
"""

import operator
import re
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Sequence, ValuesView
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.runtime import Undefined, markup_join
from jinja2.utils import Namespace

#: What a template may spend, in all and for each character of the conversation. A unit is about 10 ns of work.
BUDGET, BUDGET_PER_CHARACTER = 200_000_000, 1_000
#: Seconds of the thread's processor time that a rendering may take.
SECONDS = 5.0

#: Prices: of a node of the template's syntax tree, of a value that is looked at, of a call, and of a character and an item that
#: are made. Memory decides the last two: the base budget is enough for 50 million characters, or 2 million items.
NODE, VALUE, CALL, CHARACTER, ITEM = 5, 40, 200, 4, 100
#: The most bits of an integer that a template computes, and the most columns of an indentation or a field.
MAX_BITS, MAX_WIDTH = 4096, 1000

_LOOK = 1_000_000  # units between two looks at the clock


class LimitError(TemplateError):
    """A template does too much."""


class Meter:
    """What one rendering may still spend, of ``budget`` units."""

    def __init__(self, budget: int) -> None:
        self.left = budget
        self.end = time.thread_time() + SECONDS
        self.next_look = self.left

    def spend(self, units: int) -> None:
        self.left -= units
        if self.left < self.next_look:
            if self.left < 0:
                raise LimitError("it takes too many steps or too much memory")
            if time.thread_time() > self.end:
                raise LimitError(f"it takes more than {SECONDS:.0f} s")
            self.next_look = self.left - _LOOK


METER: ContextVar[Meter] = ContextVar("meter")


def spend(units: int) -> None:
    """Pay from the budget of the rendering that this thread is doing. Raises LimitError if too little is left."""
    METER.get().spend(units)


# A field of a format with %: its width and precision.
_FIELD = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\d+|\*)?(?:\.(\d+|\*))?")


# --- payments


def weigh(value: Any) -> int:
    """About how many characters a value has when it is written. Pays for a walk through the whole value, as ``==`` makes it."""
    if isinstance(value, str):
        spend(len(value) // 8)
        return len(value)
    total, rest = 0, [value]
    while rest:
        item = rest.pop()
        spend(VALUE)
        total += 2
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, int):
            total += item.bit_length() // 3
        elif isinstance(item, dict):
            rest += item.keys()
            rest += item.values()
        elif isinstance(item, list | tuple | KeysView | ValuesView | ItemsView):
            rest += item
        elif isinstance(item, Namespace):
            raise SecurityError("a namespace cannot be written or compared")
        else:
            total += 24
    spend(total // 8)
    return total


def make(value: Any) -> None:
    """Pay for writing a value as text."""
    if isinstance(value, str):
        spend(CHARACTER * len(value))
    elif value is not None and not isinstance(value, bool | float | Undefined):
        spend(4 * CHARACTER * weigh(value))  # quotes and escapes


def counted(values: Iterable[Any]) -> Iterator[Any]:
    """The values. Each pays when it is taken."""
    for value in values:
        spend(ITEM)
        yield value


def check_width(number: Any) -> int:
    """The number, or 0 if it is none. Raises LimitError if it is too large for a width."""
    if isinstance(number, int) and number > MAX_WIDTH:
        raise LimitError(f"a width of {number} is more than {MAX_WIDTH}")
    return number if isinstance(number, int) else 0


def tick(units: int) -> bool:
    """Pay a price that the template's text decides. True, so that ``and`` can follow."""
    spend(units)
    return True


def weighed(value: Any) -> Any:
    """The value, after a payment for its hash."""
    if not isinstance(value, str):
        weigh(value)
    return value


def sliced(value: Any) -> Any:
    """The value, after a payment for a slice of it."""
    if isinstance(value, Sequence):
        spend(len(value) * (CHARACTER if isinstance(value, str) else ITEM))
    return value


@jinja2.pass_eval_context
def concatenated(context: nodes.EvalContext, values: tuple[Any, ...]) -> str:
    """What ``~`` makes of its operands."""
    for value in values:
        make(value)
    return markup_join(values) if context.autoescape else "".join(map(str, values))


# --- operators


def add(left: Any, right: Any) -> Any:
    if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
        price = CHARACTER if isinstance(left, str) else ITEM
        spend(price * (len(left) + len(right)))
    return left + right


def multiply(left: Any, right: Any) -> Any:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, str | list | tuple) and isinstance(other, int):
            spend((CHARACTER if isinstance(one, str) else ITEM) * len(one) * max(other, 0))
    if isinstance(left, int) and isinstance(right, int):
        check_bits(left.bit_length() + right.bit_length())
    return left * right


def power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        check_bits(left.bit_length() * max(right, 0))
    return left**right


def modulo(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        pay_fields(left, right)
    return left % right


def check_bits(bits: int) -> None:
    """Raise LimitError if an integer of so many bits is too large."""
    if bits > MAX_BITS:
        raise LimitError("it computes a number that is too large")


def pay_fields(form: str, values: Any) -> None:
    """Pay for ``form % values``."""
    for field in _FIELD.finditer(form):
        for number in field.groups("0"):
            if number == "*" or len(number) > 9 or int(number) > MAX_WIDTH:
                raise LimitError(f"a width of {number[:9]} is more than {MAX_WIDTH}, or is not known")
    spend(CHARACTER * (len(form) + form.count("%") * (4 * weigh(values) + MAX_WIDTH)))


def _pair(left: Any, right: Any) -> None:
    """Pay for comparing two values."""
    if isinstance(left, str) and isinstance(right, str):
        spend(min(len(left), len(right)) // 8)
    elif isinstance(left, _CONTAINERS) and isinstance(right, _CONTAINERS):
        weigh(left)
        weigh(right)


def _contains(container: Any, value: Any) -> bool:
    """``value in container``, paid for."""
    if isinstance(value, _CONTAINERS):
        weigh(value)
        if not isinstance(container, dict):
            weigh(container)
    elif isinstance(container, str):
        spend(len(container))
    elif not isinstance(container, dict) and hasattr(container, "__len__"):
        spend(VALUE * len(container))
    elif isinstance(container, Iterator):
        container = counted(container)
    return operator.contains(container, value)


def _compares(compare: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def checked(left: Any, right: Any) -> Any:
        _pair(left, right)
        return compare(left, right)

    return checked


_CONTAINERS = (list, tuple, dict, KeysView, ValuesView, ItemsView, Namespace)
#: By the names of Jinja's tests, and ``notin``. The value comes first, also for ``in``.
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    **{name: _compares(getattr(operator, name)) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "in": lambda value, container: _contains(container, value),
    "notin": lambda value, container: not _contains(container, value),
}
