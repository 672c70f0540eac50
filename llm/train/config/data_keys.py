"""The forms in which `data.train` and `data.valid` are given, and the flags that reach into them: a path, a source, a
list of both, for `data.valid` also a share.
"""

from typing import Any

from llm.errors import UserError


def as_sources(value: Any, key: str) -> Any:
    """A list of sources for a list or a source; other values as they are. ValueError naming `key` at a number that is
    no share.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        if key != "data.valid":
            raise ValueError(f"{key}={value}: expected a path, or a list of them")
        if not 0 < value < 1:
            raise ValueError(f"{key}={value}: a share of the training documents lies between 0 and 1")
    if isinstance(value, dict):
        return [value]
    if isinstance(value, list | tuple):
        return [{"path": item} if isinstance(item, str) else item for item in value]
    return value


def with_option(given: Any, rest: list[str], value: Any, key: str) -> Any:
    """What stands under `key` once `--key.rest=value` was given: `0.name`, `1`, or for the only source `name`.

    UserError naming the flag where there is no such source.
    """
    flag = f"--{key}.{'.'.join(rest)}"
    sources = as_sources([given] if isinstance(given, str) else given or [], key)
    if not isinstance(sources, list):
        raise UserError(f"{flag}: {key} is a share of the training documents, not a source")
    number, option = (int(rest[0]), rest[1:]) if rest[0].isdecimal() else (0, rest)
    if option is rest and len(sources) > 1:
        raise UserError(f"{flag}: {key} is a list of {len(sources)}; give --{key}.0.{rest[0]} for the first of them")
    if number >= max(1, len(sources)) or len(option) > 1:
        raise UserError(f"{flag}: no such key; the sources of {key} are numbered 0 to {max(1, len(sources)) - 1}")
    sources = list(sources) or [{}]
    if not option:
        sources[number] = value
    elif not isinstance(sources[number], dict):
        raise UserError(f"{flag}: {key}.{number} is no source")
    else:
        sources[number] = {**sources[number], option[0]: value}
    return sources
