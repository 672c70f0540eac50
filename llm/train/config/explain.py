"""Wrong input to a schema of pydantic sections, in one line that names the key as it is written; and what is read for
what was written, where YAML and a schema see different things in it."""

import difflib
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from llm.train.config.synonyms import meant
from llm.train.config.yaml_file import TypedFloat, TypedInt, typed


def prepared(value: Any, annotation: Any, key: str = "") -> Any:
    """`value` as a field of this type is to read it: an empty section has its defaults, text that looks like a number
    is text. ValueError naming `key` at true or false where neither can stand: pydantic would read true as the number
    1, and a flag without its value is true.
    """
    schema, leaf_types = section_of(annotation), _leaf_types(annotation)
    if isinstance(value, dict):
        fields = {} if schema is None else schema.model_fields
        of = {name: fields[name].annotation if name in fields else None if fields else annotation for name in value}
        dotted = f"{key}." if key else ""
        return {
            name: inner if of[name] is None else prepared(inner, of[name], f"{dotted}{name}")
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [prepared(inner, annotation, f"{key}.{i}") for i, inner in enumerate(value)]
    if value is None and (schema is not None or dict in _origins(annotation)) and type(None) not in leaf_types:
        return {}
    if isinstance(value, bool) and {bool, Any}.isdisjoint(leaf_types):
        raise ValueError(f"{key}={typed(value)}: expected a value other than true or false")
    if isinstance(value, TypedInt | TypedFloat) and _is_text(leaf_types):
        return value.text
    return value


def takes_text(schema: type[BaseModel], key: str) -> bool:
    """Whether a value of the dotted `key` is text and can be no number."""
    *path, leaf = key.split(".")
    field = _section(schema, path).model_fields.get(leaf)
    return field is not None and _is_text(_leaf_types(field.annotation))


def takes_list(schema: type[BaseModel], key: str) -> bool:
    """Whether a value of the dotted `key` is a list."""
    *path, leaf = key.split(".")
    field = _section(schema, path).model_fields.get(leaf)
    return field is not None and not {list, tuple}.isdisjoint(_origins(field.annotation))


def default_of(schema: type[BaseModel], key: str) -> Any:
    """The default of the dotted `key`, which the schema knows."""
    *path, leaf = key.split(".")
    return _section(schema, path).model_fields[leaf].get_default(call_default_factory=True)


def _is_text(leaf_types: set[Any]) -> bool:
    return str in leaf_types and {int, float, Any}.isdisjoint(leaf_types)


def by_commas(value: Any) -> Any:
    """A list given as `a,b`, which needs no brackets in a shell, or as its only item."""
    if isinstance(value, str):
        return [item for item in map(str.strip, value.split(",")) if item]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


def _leaf_types(annotation: Any) -> set[Any]:
    inner = getattr(annotation, "__args__", None)
    return {annotation} if inner is None else set().union(*(_leaf_types(argument) for argument in inner))


def explain(error: ValidationError, schema: type[BaseModel]) -> str:
    """One line for the first problem of a pydantic error, naming the key as it is written on the command line."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    # of a value that may be a string or a list, pydantic reports both ways in which it failed: the longer one is meant
    first = max(problems[:2], key=lambda problem: len(problem["loc"])) if len(problems) > 1 else problems[0]
    path = list(_written(first, schema))
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}; {_hint(path, schema)}"
    if first["type"] == "missing":
        return f"missing key {key}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return message
    return f"{key}={typed(first['input'])}: {message[0].lower()}{message[1:]}"


def _hint(path: list[str], schema: type[BaseModel]) -> str:
    """What an unknown key may have been meant to be."""
    inner = _section(schema, path[:-1])
    if any(part.isdecimal() for part in path):  # in a list, where only the names beside it can be meant
        near = difflib.get_close_matches(path[-1], inner.model_fields, n=1)
    else:
        near = meant(".".join(path), [*schema.model_fields, *keys_of(schema), "run_dir"])
    if not near:
        return f"known keys here: {', '.join(inner.model_fields)}"
    if near == path[-1:] and "." in path[-1]:
        section, _, leaf = path[-1].rpartition(".")
        return f"in a file it is the key {leaf} under {section.replace('.', ' under ')}"
    return f"did you mean {' or '.join('--run_dir' if name == 'run_dir' else name for name in near)}?"


def _written(problem: Any, schema: type[BaseModel]) -> Iterator[str]:
    """The parts of a problem's place that stand in the file; pydantic also names the alternatives of a union."""
    inner: Any = schema
    unknown = len(problem["loc"]) - 1 if problem["type"] == "extra_forbidden" else None
    for i, part in enumerate(problem["loc"]):
        fields = inner.model_fields if isinstance(inner, type) and issubclass(inner, BaseModel) else {}
        if isinstance(part, int):
            yield str(part)
        elif part in fields:
            yield part
            annotation = fields[part].annotation
            inner = section_of(annotation) or annotation
        elif i == unknown if fields else dict in _origins(inner) and part != "[key]":
            yield part


def _origins(annotation: Any) -> set[Any]:
    """The containers in a type: {dict} of `dict[str, int] | None`."""
    inner = getattr(annotation, "__args__", ())
    return {getattr(annotation, "__origin__", annotation)}.union(*(_origins(argument) for argument in inner))


def _section(schema: type[BaseModel], path: list[str]) -> type[BaseModel]:
    for part in path:
        field = schema.model_fields.get(part)
        schema = (section_of(field.annotation) if field is not None else None) or schema
    return schema


def keys_of(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a schema that takes a value."""
    keys: list[str] = []
    for name, info in schema.model_fields.items():
        inner = section_of(info.annotation)
        if inner is None or str in _leaf_types(info.annotation):
            keys.append(prefix + name)
        if inner is not None:
            keys += keys_of(inner, f"{prefix}{name}.")
    return keys


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The schema inside a field's type, as in `ModelArgs` or `MoEArgs | None`; None for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = [section_of(argument) for argument in getattr(annotation, "__args__", ())]
    return next((schema for schema in inner if schema is not None), None)
