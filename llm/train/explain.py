"""What a schema of pydantic sections says about wrong input: one line that names the key as it is written."""

import difflib
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError


def refuse_booleans(raw: Any, schema: type[BaseModel], prefix: str = "") -> None:
    """pydantic would read true as the number 1, and a flag without its value is true."""
    for name, value in raw.items() if isinstance(raw, dict) else ():
        info = schema.model_fields.get(name)
        if info is None:
            continue
        inner = section_of(info.annotation)
        if inner is not None:
            refuse_booleans(value, inner, f"{prefix}{name}.")
        elif {bool, Any}.isdisjoint(_leaf_types(info.annotation)):
            for key, leaf in _leaves(value, f"{prefix}{name}"):
                if isinstance(leaf, bool):
                    raise ValueError(f"{key}={str(leaf).lower()}: expected a value other than true or false")


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list | tuple):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, f"{key}.{name}")
    else:
        yield key, value


def _leaf_types(annotation: Any) -> set[Any]:
    inner = getattr(annotation, "__args__", None)
    return {annotation} if inner is None else set().union(*(_leaf_types(argument) for argument in inner))


def explain(error: ValidationError, schema: type[BaseModel]) -> str:
    """One line for the first problem of a pydantic error, naming the key as it is written on the command line."""
    problems = error.errors()
    # of a value that may be a string or a list, pydantic tells both ways in which it failed: the longer one is meant
    first = max(problems[:2], key=lambda problem: len(problem["loc"])) if len(problems) > 1 else problems[0]
    key = ".".join(str(part) for part in first["loc"] if not isinstance(part, str) or part.isidentifier())
    if first["type"] == "extra_forbidden":
        known = _fields(schema, [str(part) for part in first["loc"][:-1]])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known keys here: {', '.join(known)}"
        return f"unknown key {key}; {hint}"
    if first["type"] == "missing":
        return f"missing key {key}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return message
    return f"{key}={first['input']!r}: {message[0].lower()}{message[1:]}"


def _fields(schema: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        field = schema.model_fields.get(part)
        inner = section_of(field.annotation) if field is not None else None
        if inner is not None:
            schema = inner
    return list(schema.model_fields)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The schema inside a field's type, as in `ModelArgs` or `MoEArgs | None`; None for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = [section_of(argument) for argument in getattr(annotation, "__args__", ())]
    return next((schema for schema in inner if schema is not None), None)
