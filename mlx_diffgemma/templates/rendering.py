"""Rendering: Jinja's environment with payments, and a conversation's way through it."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
import numpy as np
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Joiner
from jinja2.visitor import NodeTransformer

from mlx_diffgemma.templates import meter
from mlx_diffgemma.templates.language import FUNCTIONS, METHODS, PAID_FILTERS, PAID_TESTS, join_values, pay_method
from mlx_diffgemma.templates.meter import (
    BUDGET,
    BUDGET_PER_CHARACTER,
    CALL,
    CHARACTER,
    COMPARISONS,
    METER,
    NODE,
    VALUE,
    LimitError,
    Meter,
    make,
    spend,
    weigh,
    weighed,
)

#: The longest template, in characters. The released one has 17,000.
MAX_SOURCE = 128 * 1024
#: The longest prompt that a template may write, in characters: this, and so much for each character of the conversation.
OUTPUT, OUTPUT_PER_CHARACTER = 1 << 20, 8

# Filters that only _Metering can name: a template cannot write a name with a space.
_ADDED = {
    f" {name}": added
    for name, added in {
        "tick": meter.tick,
        "weighed": meter.weighed,
        "sliced": meter.sliced,
        "concatenated": meter.concatenated,
        **COMPARISONS,
    }.items()
}
# The names of comparisons in Jinja's syntax tree that differ from its tests.
_OPERATORS = {"lteq": "le", "gteq": "ge"}


@jinja2.pass_context
def _written(_: Context, value: Any) -> Any:
    """Pay for what ``{{ }}`` writes. (Jinja computes nothing at compile time if this takes the context.)"""
    make(value)
    return value


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with the same settings as in transformers, and with payments."""

    default_binop_table = ImmutableSandboxedEnvironment.default_binop_table | {
        "+": meter.add,
        "*": meter.multiply,
        "**": meter.power,
        "%": meter.modulo,
    }
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], optimized=False, finalize=_written
        )
        self.filters, self.tests, self.globals = PAID_FILTERS | _ADDED, dict(PAID_TESTS), dict(FUNCTIONS)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Refuse ``str.format``. Jinja asks at each access, before the method can be passed on."""
        if isinstance(getattr(value, "__self__", None), str) and getattr(value, "__name__", "") in ("format", "format_map"):
            raise SecurityError("str.format is not available in a chat template; use ~ or the filter format")
        return None

    def call_filter(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith(" "):
            raise SecurityError("no such filter")
        return super().call_filter(name, *args, **kwargs)

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(obj, weighed(argument) if isinstance(argument, tuple) else argument)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        spend(CALL)
        if not isinstance(obj, Macro | BlockReference | LoopContext | Joiner | Undefined):
            name, owner = getattr(obj, "__name__", ""), getattr(obj, "__self__", None)
            if not any(isinstance(owner, kind) and name in methods for kind, methods in METHODS.items()):
                if not any(obj is function for function in FUNCTIONS.values()):
                    raise SecurityError(f"{name or type(obj).__name__} cannot be called in a chat template")
            elif not isinstance(owner, str):
                weigh([owner if name in ("copy", "count", "index") else (), *args])
            elif name == "join" and len(args) == 1:
                args = (join_values(args[0], owner),)
            else:
                pay_method(owner, name, (*args, *kwargs.values()))
        return super().call(context, obj, *args, **kwargs)


class _Generation(Extension):
    """``{% generation %}``, with which transformers finds the model's words for training. Here it only writes its body."""

    tags = {"generation"}  # noqa: RUF012 (an attribute of Jinja's class)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Metering(NodeTransformer):
    """Adds payments to a template's syntax tree."""

    def visit_For(self, node: nodes.For) -> Any:
        if node.test is not None:
            node.test = nodes.And(_paying(nodes.Const(VALUE + _size(node.test)), "tick"), node.test)
        return self._with_body(node)

    def _with_body(self, node: Any) -> Any:
        price = CALL + sum(map(_size, node.body))
        self.generic_visit(node)
        node.body = [nodes.ExprStmt(_paying(nodes.Const(price), "tick")), *node.body]
        return node

    visit_Macro = visit_CallBlock = visit_Block = _with_body

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        left, pairs = node.expr, []
        for operand in node.ops:
            right, name = operand.expr, _OPERATORS.get(operand.op, operand.op)
            literal = _is_literal(right) or (_is_literal(left) and name not in ("in", "notin"))
            pairs.append(nodes.Compare(left, [operand]) if literal else _paying(left, name, right))
            left = right
        made: nodes.Expr = pairs[0]
        for pair in pairs[1:]:
            made = nodes.And(made, pair)
        return made

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _paying(nodes.Tuple(node.nodes, "load"), "concatenated")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _paying(node.node, "sliced")
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = _paying(node.key, "weighed")
        return node


def _paying(value: nodes.Expr, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, f" {name}", list(args), [], None, None)


def _is_literal(node: nodes.Node) -> bool:
    """Whether a value stands in the template, so that comparing with it takes no longer than the template is."""
    return isinstance(node, nodes.Const) or (isinstance(node, nodes.List | nodes.Tuple) and all(map(_is_literal, node.items)))


def _size(node: nodes.Node) -> int:
    """The price of running a part of the template once, without what its calls and filters pay themselves."""
    if isinstance(node, nodes.TemplateData):
        return CHARACTER * len(node.data)
    text = len(node.value) if isinstance(node, nodes.Const) and isinstance(node.value, str) else 0
    return NODE + text + sum(map(_size, node.iter_child_nodes()))


# --- rendering


class Template:
    """A compiled chat template. Making it raises TemplateError, or one of the errors of Python's compiler.

    Args:
        budget: the units that a rendering may spend, in addition to those for each character of the conversation.
    """

    def __init__(self, source: str, budget: int = BUDGET) -> None:
        self._budget = budget
        if len(source) > MAX_SOURCE:
            raise LimitError(f"it has {len(source)} characters, more than {MAX_SOURCE}")
        environment = _Environment()
        tree = _Metering().visit(environment.parse(source))
        tree.set_environment(environment)
        for node in tree.find_all(nodes.Node):
            node.lineno = node.lineno or 1
        code = environment.compile(tree)
        self._template = jinja2.Template.from_code(environment, code, environment.make_globals(None))

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, variables: Mapping[str, Any]
    ) -> str:
        """Render a conversation as transformers' ``apply_chat_template`` does.

        Args:
            variables: the names of special tokens and the template's options.

        Raises:
            LimitError: the template does too much. Other TemplateErrors and Python's errors: it refuses the conversation.
        """
        given = {
            "messages": [_with_reasoning(_plain(message)) for message in messages],
            "tools": _plain(tools),
            "documents": None,
        }
        characters = _length(given)
        clash = given.keys() & variables.keys()
        if clash:
            raise TemplateError(f"{', '.join(sorted(clash))} cannot be options of a template")
        reset = METER.set(Meter(self._budget + BUDGET_PER_CHARACTER * characters))
        try:
            pieces, room = [], OUTPUT + OUTPUT_PER_CHARACTER * characters
            for piece in self._template.generate(given | _plain(variables)):
                room -= len(piece)
                if room < 0:
                    raise LimitError("it writes too much")
                pieces.append(piece)
            return "".join(pieces)
        finally:
            METER.reset(reset)


compiled = lru_cache(maxsize=8)(Template)


def _plain(value: Any) -> Any:
    """The value in types of JSON, so that a template meets no other object."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value) if type(value) is not kind else value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_plain(item) for item in value]
    return _plain(value.item()) if isinstance(value, np.generic) else f"<{type(value).__name__}>"


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A message without fields that are None, and with its thoughts under each of the names that templates read."""
    message = {name: value for name, value in message.items() if value is not None}
    thoughts = next((message[name] for name in ("reasoning_content", "thinking", "reasoning") if name in message), None)
    return message if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}


def _length(value: Any) -> int:
    """The number of characters in a conversation."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_length(key) + _length(item) for key, item in value.items())
    return sum(map(_length, value)) if isinstance(value, list | tuple) else 4
