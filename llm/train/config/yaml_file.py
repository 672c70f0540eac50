"""YAML as the run config reads it: plain values as YAML 1.2 means them, a key given twice is an error.

The parser's own rules are those of YAML 1.1, by which 010 is eight, 1:30 is ninety, 1e-4 is text, and no, off and a
date are no text. Here a number keeps what was typed, so that a name or path that looks like one stays as it is
(`name: 007`), and yes, no, on, off are words, which a key that wants true or false understands.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from llm.errors import UserError

# The parser's own error, and what its constructors raise for a list as a key and for endless nesting.
NOT_YAML = (yaml.YAMLError, ValueError, TypeError, RecursionError)


class TypedInt(int):
    """A whole number that knows how it was written."""

    text: str


class TypedFloat(float):
    """A number that knows how it was written."""

    text: str


class _Loader(yaml.SafeLoader):
    """SafeLoader with the plain values of YAML 1.2, which refuses a key given twice."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<`: its keys may be given again
                continue
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _int(loader: _Loader, node: yaml.ScalarNode) -> TypedInt:
    text = str(loader.construct_scalar(node))
    base = {"0o": 8, "0x": 16, "0b": 2}.get(text.lstrip("+-")[:2].lower(), 10)
    number = TypedInt(int(text, base))
    number.text = text
    return number


def _float(loader: _Loader, node: yaml.ScalarNode) -> TypedFloat:
    text = str(loader.construct_scalar(node))
    number = TypedFloat(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    number.text = text
    return number


PLAIN_VALUES = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?([0-9]+|0o[0-7]+|0x[0-9a-fA-F]+|0b[01]+)", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
)
"""(tag, pattern, first characters) of what is not text, quotes aside; `\\0` stands for an empty value."""

for _tag, _pattern, _first in PLAIN_VALUES:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first]
    )
_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; UserError naming the file when it is missing or malformed."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; expected YAML in UTF-8") from None
    try:
        value = _Loader(text).get_single_data()
    except NOT_YAML as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if value is None:
        raise UserError(f"{path}: is empty; expected a mapping of sections")
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {_noun(value)}")
    return value


def _noun(value: Any) -> str:
    return "list" if isinstance(value, list) else f"only {value!r}"


def scalar(text: str) -> Any:
    """What `text` would be as a value in the YAML file: `1e-4` a number, `false` false, `[a, b]` a list."""
    try:
        return _Loader(text).get_single_data()
    except NOT_YAML:
        return text


def plain(value: Any) -> Any:
    """The value without what was typed: built-in numbers, which any library takes."""
    if isinstance(value, dict):
        return {plain(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, TypedInt):
        return int(value)
    return float(value) if isinstance(value, TypedFloat) else value


def typed(value: Any) -> str:
    """A value for a message, as one would write it in YAML."""
    if isinstance(value, TypedInt | TypedFloat):
        return value.text
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(plain(value))
    return text if len(text) <= 80 else text[:77] + "..."
