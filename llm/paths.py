"""Paths as people type them into a config: `~` is the home folder; nothing else is expanded, and a `$` says so."""

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

VARIABLE = re.compile(r"\$(\w+|\{\w+\})")


def expanded(text: str) -> str:
    """The path with `~` or `~user` at its beginning replaced.

    PydanticCustomError (a ValueError) where that user has no home, or where a shell would have replaced `$NAME`, which
    nothing here does: a folder of that name would be made without a word.
    """
    if "\0" in text:
        raise PydanticCustomError("path", "a path has no null character")
    path = os.path.expanduser(text) if text.startswith("~") else text
    if path.startswith("~") and not Path(path).exists():
        raise PydanticCustomError("path", "there is no home folder {user}", {"user": path.partition("/")[0]})
    variable = VARIABLE.search(path)
    if variable is not None and not Path(path).exists():
        raise PydanticCustomError(
            "path",
            "{name} is not replaced here; write the path out, or give it on the command line without quotes, where "
            "the shell replaces it",
            {"name": variable[0]},
        )
    return path


PathText = Annotated[str, AfterValidator(expanded)]
"""A path in a config."""
