"""A flag put into what the file says: `--section.key=value`, which may also be an item of a list that is there."""

from functools import partial
from typing import Any

from pydantic import BaseModel

from llm.errors import UserError
from llm.train.config.data_keys import with_option
from llm.train.config.explain import default_of, takes_list
from llm.train.config.yaml_file import typed


def put(raw: dict[str, Any], dotted: str, value: Any, schema: type[BaseModel]) -> None:
    """Set the dotted key of a config as `schema` has it; UserError naming the flag where there is no place for it."""
    *sections, leaf = dotted.split(".")
    node = raw
    for i, section in enumerate(sections):
        key, rest = ".".join(sections[: i + 1]), [*sections[i + 1 :], leaf]
        if key not in ("data.train", "data.valid") and rest[0].isdecimal() and takes_list(schema, key):
            given = node.get(section)
            node[section] = _with_item(default_of(schema, key) if given is None else given, rest, value, key, dotted)
            return
        child = node.setdefault(section, {})
        if child is None:
            child = node[section] = {}
        if key in ("data.train", "data.valid"):
            node[section] = with_option(child, rest, value, key)
            return
        if isinstance(child, list):
            first = f"--{key}.0.{'.'.join(rest)}"
            raise UserError(f"--{dotted}: {key} is a list; {first} is of the first of its {len(child)}")
        if not isinstance(child, dict):
            raise UserError(f"--{dotted}: {key} is a value, not a section")
        node = child
    node[leaf] = value


def _with_item(given: Any, rest: list[str], value: Any, key: str, dotted: str) -> list[Any]:
    """The list under `key` with another value at the place `rest`, as 0, 0.1 or, of an entry, 0.weight."""
    items = list(given) if isinstance(given, list | tuple) else []
    number = int(rest[0]) if rest[0].isdecimal() else len(items)
    if number >= len(items):
        whole = f"[{','.join(map(typed, [*items, value]))}]"
        held = f"has the items 0 to {len(items) - 1}" if items else "is not a list there"
        raise UserError(f"--{dotted}: {key} {held}; give the whole list, as --{key}={whole}")
    if len(rest) == 2 and isinstance(items[number], dict):
        items[number] = {**items[number], rest[1]: value}
    else:
        inner = partial(_with_item, items[number], rest[1:], value, f"{key}.{number}", dotted)
        items[number] = value if len(rest) == 1 else inner()
    return items
