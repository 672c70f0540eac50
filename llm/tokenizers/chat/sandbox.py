"""Jinja for templates that came from elsewhere: no attributes but those that chat templates need, and a budget of work.

A template can read the values that it is given, by subscript or attribute, and call the methods of METHODS. Whatever it
loops over, calls, joins or makes is charged to a budget, so that one that would run for ever or fill the memory ends
with an error. Around that stands what `transformers` gives its templates: `raise_exception`, `strftime_now`, `tojson`
that escapes nothing, the block `{% generation %}`, loop controls, blocks trimmed.

Source: transformers 5.23 (utils/chat_template_utils.py); jinja2's sandbox.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MOST_STEPS = 4_000_000
"""Iterations, calls and operations of one rendering, a KiB of text made counting as one more."""
MOST_SECONDS = 20.0
MOST_CHARACTERS = 1 << 25
"""Of a text that a template makes."""
MOST_SOURCE = 1 << 20
MOST_RANGE = 100_000

METHODS: dict[type, frozenset[str]] = {
    str: frozenset((
        "capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdecimal", "isdigit", "islower",
        "isnumeric", "isspace", "isupper", "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix",
        "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip",
        "title", "upper",
    )),
    dict: frozenset(("get", "items", "keys", "values", "copy")),
    list: frozenset(("count", "index", "copy")),
    tuple: frozenset(("count", "index")),
}  # fmt: skip
"""Methods that a template may call, by the type of the value."""
LOOP = frozenset((
    "changed", "cycle", "depth", "depth0", "first", "index", "index0", "last", "length", "nextitem", "previtem",
    "revindex", "revindex0",
))  # fmt: skip
FILTERS = (
    "abs", "batch", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "indent", "int",
    "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace",
    "reverse", "round", "safe", "select", "selectattr", "slice", "sort", "string", "sum", "title", "trim", "unique",
    "upper", "wordcount",
)  # fmt: skip


class Exceeded(Exception):
    """A template did more than it may."""


class Budget:
    """What one rendering has left."""

    def __init__(self) -> None:
        self.steps, self.until = MOST_STEPS, time.monotonic() + MOST_SECONDS

    def charge(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0 or time.monotonic() > self.until:
            raise Exceeded("runs too long: it loops without an end, or as good as that")

    def made(self, value: Any) -> Any:
        """Charge for a value, and refuse one that is too large."""
        size = len(value) if isinstance(value, str | list | tuple | dict) else 0
        if isinstance(value, int) and not isinstance(value, bool):
            size = value.bit_length()
        self.fits(size)
        self.charge(1 + (size >> 10))
        return value

    @staticmethod
    def fits(size: int) -> None:
        if size > MOST_CHARACTERS:
            raise Exceeded(f"makes a text or list of more than {MOST_CHARACTERS:,} characters or entries")


BUDGET: ContextVar[Budget] = ContextVar("BUDGET")


@contextmanager
def budget() -> Iterator[None]:
    """What is rendered inside shares one budget."""
    token = BUDGET.set(Budget())
    try:
        yield
    finally:
        BUDGET.reset(token)


def counted(values: Any) -> Iterator[Any]:
    """The values of a loop, each a step."""
    left = BUDGET.get()
    for value in values:
        left.charge(1)
        yield value


def joined(parts: Iterable[Any]) -> str:
    """Parts as one text."""
    found = [str(part) for part in parts]
    Budget.fits(sum(map(len, found)))
    made: str = BUDGET.get().made("".join(found))
    return made


class _Counting(NodeTransformer):
    """Every loop counts its steps, and ~ what it makes."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise SecurityError("has a recursive loop")
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_counted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        listed = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(listed, "_joined", [], [], None, None, lineno=node.lineno)


class GenerationBlock(Extension):
    """`{% generation %}`: puts `opens` and `closes` around what the assistant says, where they are given."""

    tags = {"generation"}

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        environment.extend(generation_marks=("", ""))

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_around"), [], [], body).set_lineno(line)

    def _around(self, caller: Callable[[], str]) -> str:
        opens, closes = self.environment.generation_marks  # type: ignore[attr-defined]
        return f"{opens}{caller()}{closes}"


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of chat templates."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))
    concat = staticmethod(joined)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols], optimized=False
        )
        self.filters = {name: _charged(self.filters[name]) for name in FILTERS}
        self.filters |= {"tojson": _charged(_tojson), "replace": _charged(_replace), "indent": _charged(_indent)}
        self.filters |= {"join": _charged(self._join), "_counted": counted, "_joined": joined}
        self.globals = {
            "range": _range, "dict": dict_of, "namespace": _Names, "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }  # fmt: skip

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Counting().visit(source), *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`obj.attribute`: an attribute that it may have, else an entry."""
        if self._allowed(obj, attribute):
            return getattr(obj, attribute)
        if isinstance(obj, Namespace | Undefined):
            return super().getattr(obj, self._checked(obj, attribute))
        if isinstance(obj, Mapping) and attribute in obj:
            return obj[attribute]
        self._checked(obj, attribute)
        if hasattr(obj, attribute):
            raise SecurityError(f"reaches for .{attribute} of {_called(obj)}, which templates may not")
        return self.undefined(obj=obj, name=attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`obj[argument]`: an entry, else an attribute that it may have."""
        try:
            found = obj[argument]
        except (AttributeError, TypeError, LookupError):
            if isinstance(argument, str):
                return self.getattr(obj, argument)
            return self.undefined(obj=obj, name=argument)
        return BUDGET.get().made(found) if isinstance(argument, slice) else found

    @staticmethod
    def _allowed(obj: Any, attribute: str) -> bool:
        if isinstance(obj, LoopContext):
            return attribute in LOOP
        return any(attribute in names for kind, names in METHODS.items() if isinstance(obj, kind))

    @staticmethod
    def _checked(obj: Any, attribute: str) -> str:
        if attribute.startswith("_"):
            raise SecurityError(f"reaches for .{attribute} of {_called(obj)}, which templates may not")
        return attribute

    def is_safe_callable(self, obj: Any) -> bool:
        """Macros, what is in `globals`, and the methods that `getattr` gives."""
        if isinstance(obj, Macro | Undefined) or obj in self.globals.values():
            return True
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        return isinstance(owner, GenerationBlock) or self._allowed(owner, name)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template may call."""
        left = BUDGET.get()
        left.charge(1)
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str) and name == "replace":
            return _replace(owner, *args, **kwargs)
        if isinstance(owner, str) and name == "join":
            return self._join(args[0], owner)
        return left.made(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operation whose result is not too large."""
        if operator == "**":
            if not all(isinstance(value, int | float) and abs(value) < 1 << 32 for value in (left, right)):
                raise Exceeded("makes a number that is too large")
            Budget.fits(int(abs(right)) * 32)
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(other, int):
                    Budget.fits(len(one) * other)
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            Budget.fits(len(left) + len(right))
        if operator == "%" and isinstance(left, str):
            raise SecurityError("formats a text by %, which templates may not")
        return BUDGET.get().made(super().call_binop(context, operator, left, right))

    def _join(self, value: Any, d: str = "", attribute: Any = None) -> str:
        parts = [self.getitem(part, attribute) for part in counted(value)] if attribute else list(counted(value))
        texts = [str(part) for part in parts]
        Budget.fits(sum(map(len, texts)) + len(d) * len(texts))
        made: str = BUDGET.get().made(d.join(texts))
        return made


def dict_of(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """`dict` without its attributes."""
    return dict(*args, **kwargs)


class _Names(Namespace):
    """`namespace()`, whose names may not begin with an underscore."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name in dict(*args, **kwargs):
            Sandbox._checked(self, str(name))
        super().__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(Sandbox._checked(self, name), value)


def _called(obj: Any) -> str:
    return {str: "a text", dict: "a mapping", list: "a list", int: "a number"}.get(type(obj), "a value")


def _charged(made_by: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, whose arguments and result are charged for."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        left = BUDGET.get()
        for value in args:
            if isinstance(value, str | list | tuple):
                left.charge(1 + (len(value) >> 10))
        return left.made(made_by(*args, **kwargs))

    for name, value in getattr(made_by, "__dict__", {}).items():  # jinja's marks: what it wants as its first argument
        setattr(wrapped, name, value)
    return wrapped


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    times = text.count(old) if count is None else min(text.count(old), count)
    Budget.fits(len(text) + times * len(new))
    made: str = BUDGET.get().made(text.replace(old, new, times))
    return made


def _indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    filled = width if isinstance(width, str) else " " * min(width, 1 << 10)
    Budget.fits(len(str(text)) + str(text).count("\n") * len(filled))
    return jinja2.filters.do_indent(str(text), filled, first, blank)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    indent = None if indent is None else min(indent, 64)
    made = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return made


def _range(*args: int) -> range:
    found = range(*args)
    if len(found) > MOST_RANGE:
        raise Exceeded(f"has a range of more than {MOST_RANGE:,}")
    return found


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > 100 or not re.fullmatch(r"(?:[^%]|%[-A-Za-z%])*", form):
        raise SecurityError("asks for a date in an unusual form")
    return datetime.now().strftime(form)
