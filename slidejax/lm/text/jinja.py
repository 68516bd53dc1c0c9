"""The environment of chat templates: jinja2's sandbox, with a bound on what a template may use.

jinja2's own sandbox keeps a template away from Python, but lets it run for ever and fill the
memory. Here everything that a template does has a price in characters, and a rendering has a
budget. The price is known before the work is done: of an operation it is the size of the largest
result that these operands can have.

This module loads jinja2, which is optional: it is imported where a template is rendered.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox

__all__ = ["Bounded", "TooMuch", "budget"]

_STATEMENTS = 200  # the price of a list of statements: a turn of a loop, a branch, a macro
_BUDGET = 2 * 10**7
_FOR_EACH = 1000  # more for each character that the template is given

# Functions, methods and filters whose result may be as large as the product of two operands.
# fmt: off
_PRODUCTS = frozenset([
    "batch", "center", "expandtabs", "format", "format_map", "indent", "join", "ljust", "replace",
    "rjust", "slice", "to_bytes", "tojson", "translate", "truncate", "wordwrap", "xmlattr", "zfill",
])
# fmt: on

_left: contextvars.ContextVar[list[int]] = contextvars.ContextVar("left")


class TooMuch(Exception):
    """A template needs more time or memory than templates may have."""


@contextlib.contextmanager
def budget(given: Any) -> Iterator[None]:
    """Gives what is compiled or rendered in the block a budget.

    Args:
      given: what the template is rendered with. A large input may need a large output.

    Raises:
      TooMuch: in the block, when nothing is left.
    """
    token = _left.set([_BUDGET + _FOR_EACH * _deep(given)])
    try:
        yield
    finally:
        _left.reset(token)


def _spend(price: int) -> None:
    left = _left.get()
    left[0] -= price
    if left[0] < 0:
        raise TooMuch("it needs more steps, or larger texts, than a chat template may")


def _deep(value: Any) -> int:
    """The characters in a value and in what it holds."""
    if isinstance(value, Mapping):
        return sum(_deep(key) + _deep(inner) for key, inner in value.items()) + 1
    if isinstance(value, (list, tuple)):
        return sum(map(_deep, value)) + 1
    return _size(value)


def _size(value: Any) -> int:
    """About how many characters a value has."""
    if isinstance(value, (list, tuple)):
        return 1 + len(value) + sum(len(one) for one in value if isinstance(one, str))
    if isinstance(value, int):
        return 1 + value.bit_length() // 8
    sized = isinstance(value, (str, bytes, Mapping, range, set, frozenset))
    return 1 + len(value) if sized else 1


def _times(value: Any) -> int:
    """How often a value can make another one appear, or how much it can widen it."""
    return abs(value) if isinstance(value, int) else _size(value)


def _price(name: str, operands: list[Any]) -> int:
    """The price of a call."""
    price = sum(map(_size, operands))
    if name not in _PRODUCTS or not operands:
        return price
    first, *others = operands
    wide = max(map(_times, others), default=1)
    if name in ("format", "format_map") and isinstance(first, str):
        inner = max((_deep(one) for one in others), default=1)
        wide = max(wide, inner, *_numbers(first), *map(_largest, others), 1)
    return price + _size(first) * wide


def _numbers(text: str) -> list[int]:
    """The numbers in a format, such as the width in `%9d`."""
    digits = "".join(c if c.isdecimal() else " " for c in text).split()
    return [10 ** min(len(run), 12) for run in digits]


def _largest(value: Any) -> int:
    """The largest whole number in a value; a format may take it for a width."""
    if isinstance(value, Mapping):
        return max(map(_largest, value.values()), default=0)
    if isinstance(value, (list, tuple)):
        return max(map(_largest, value), default=0)
    return abs(value) if isinstance(value, int) else 0


def _price_of_operator(operator: str, left: Any, right: Any) -> int:
    if operator == "**":
        return _size(left) * _times(right)
    if operator == "%" and isinstance(left, str):
        return _price("format", [left, right])
    if operator == "*":
        text = isinstance(left, (str, list, tuple)) or isinstance(right, (str, list, tuple))
        size = _times if text else _size
        return size(left) * size(right)
    return _size(left) + _size(right)


class _Generation(ext.Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here it does nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


@jinja2.pass_environment
def _shown(environment: Any, value: Any) -> Any:
    """A value on its way into the text. As it takes the environment, it runs when rendering."""
    _spend(_size(value))
    return value


class Bounded(sandbox.ImmutableSandboxedEnvironment):
    """The sandbox. What it compiles and renders must be inside `budget`."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, ext.loopcontrols],
            optimized=False,  # nothing is computed before there is a budget
            finalize=_shown,
        )
        self.filters["tojson"] = _to_json
        self.filters = {name: _priced(name, one) for name, one in self.filters.items()}
        del self.globals["lipsum"]

    def spend(self, price: int) -> None:
        """The call that a list of statements makes first."""
        _spend(price)

    def joined(self, *parts: Any) -> str:
        """Values beside each other, `a ~ b`."""
        texts = [str(part) for part in parts]
        _spend(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _spend(_price_of_operator(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        if getattr(__obj, "__self__", None) is not __self:  # spend and joined have their own price
            method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
            own = getattr(method, "__self__", None)
            operands = [own, *args, *kwargs.values()]
            _spend(1 + _price(getattr(method, "__name__", ""), operands))
        return super().call(__context, __obj, *args, **kwargs)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for node in [template, *template.find_all(nodes.Node)]:
            for field, value in node.iter_fields():
                if isinstance(value, nodes.Concat):
                    setattr(node, field, _call("joined", value.nodes))
                elif isinstance(value, list):
                    value[:] = [
                        _call("joined", one.nodes) if isinstance(one, nodes.Concat) else one
                        for one in value
                    ]
        for node in template.find_all(nodes.Stmt):
            repeats = isinstance(node, (nodes.For, nodes.Macro))
            for field in ("body", "else_"):
                body = getattr(node, field, None)
                if isinstance(body, list) and (body or (repeats and field == "body")):
                    price = nodes.Const(_STATEMENTS + _constants(body))
                    body.insert(0, nodes.ExprStmt(_call("spend", [price])))
        template.set_environment(self)
        return template


def _call(name: str, operands: list[Any]) -> nodes.Call:
    """A call of a method of the environment."""
    return nodes.Call(nodes.EnvironmentAttribute(name), operands, [], None, None)


def _constants(body: list[Any]) -> int:
    """The characters that a list of statements writes as they are in the template."""
    outputs = [node for node in body if isinstance(node, nodes.Output)]
    parts = [part for output in outputs for part in output.nodes]
    return sum(len(part.data) for part in parts if isinstance(part, nodes.TemplateData))


def _priced(name: str, one: Any) -> Any:
    """A filter that asks for its price first."""

    @functools.wraps(one)
    def priced(*args: Any, **kwargs: Any) -> Any:
        operands = list(args[1:] if hasattr(one, "jinja_pass_arg") else args)
        if name == "join" and operands:
            operands[0] = list(operands[0])
            args = (*args[: len(args) - len(operands)], *operands)
        _spend(1 + _price(name, [*operands, *kwargs.values()]))
        return one(*args, **kwargs)

    return priced


def _to_json(value: Any, *, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as it is; jinja2's own filter writes it for HTML."""
    _spend(_deep(value) * (1 + max(map(_times, options.values()), default=0)))
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
