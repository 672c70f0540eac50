"""YAML as the run config reads it: 1e-4 is a number, a key given twice is an error, nothing but plain values."""

import re
from pathlib import Path
from typing import Any

import yaml

from llm.errors import UserError

# The parser's own error, and what its constructors raise for a date that does not exist, a list as a key, endless
# nesting.
NOT_YAML = (yaml.YAMLError, ValueError, TypeError, RecursionError)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number and refuses a key given twice."""

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


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; UserError naming the file when it is missing or malformed."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; expected YAML") from None
    try:
        value = _Loader(text).get_single_data()
    except NOT_YAML as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(value).__name__}")
    return value


def scalar(text: str) -> Any:
    """What `text` would be as a value in the YAML file: `1e-4` a number, `false` false, `[a, b]` a list."""
    try:
        return _Loader(text).get_single_data()
    except NOT_YAML:
        return text
