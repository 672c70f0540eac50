"""Paths as people type them into a config: `~` is the home folder; nothing else is expanded, and a `$` says so."""

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from llm.errors import UserError

VARIABLE = re.compile(r"\$(\w+|\{\w+\})")
ON_HUB = re.compile(r"[\w.-]*\w/[\w.-]*\w")
USUAL_FOLDERS = ("runs", "models", "checkpoints", "out")
"""That a relative path may begin with before they exist."""


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


def hub_note(path: Path) -> str:
    """What a message about a missing model goes on with where its path looks like a name on the Hugging Face hub; else
    empty.
    """
    if not ON_HUB.fullmatch(str(path)) or path.parent.exists() or path.parts[0] in USUAL_FOLDERS:
        return ""
    return f"; models are read from folders here, and `hf download {path} --local-dir FOLDER` fetches one from the hub"


def refuse_unwritable(folder: Path, name: str) -> None:
    """UserError where the folder cannot be made, or nothing be written into it."""
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise UserError(f"{there}: Not a directory; {name} is to be there")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{there}: Permission denied; {name} is to be written there")


def free_space(folder: Path) -> tuple[int, int] | None:
    """Bytes of a block, and bytes that are free, on the file system where the folder is or is to be; None where it
    does not say.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        found = os.statvfs(place)
    except OSError:  # writing says better what is wrong
        return None
    return (found.f_frsize, found.f_bavail * found.f_frsize) if found.f_blocks else None


def refuse_existing(file: str, flag: str, instead: str = "name another file, or remove it") -> None:
    """UserError naming `flag` where a file to be written is there already, or cannot be: asked before the work."""
    if Path(file).is_dir():
        raise UserError(f"{flag}={file}: is a folder; name a file")
    if os.path.lexists(file):
        raise UserError(f"{flag}={file}: exists already; {instead}")
    refuse_unwritable(Path(file).absolute().parent, f"{flag}={file}")


PathText = Annotated[str, AfterValidator(expanded)]
"""A path in a config."""


def check_free(target: Path) -> None:
    """UserError when something is in the place of a folder to be made, or it cannot be made there."""
    if os.path.lexists(target):
        raise UserError(f"{target}: exists already; give another folder, or remove it")
    refuse_unwritable(target.absolute().parent, str(target))
