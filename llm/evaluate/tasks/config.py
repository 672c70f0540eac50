"""A task as its YAML file describes it: what all kinds have in common, and how a file is read."""

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from llm import shipped
from llm.errors import UserError
from llm.paths import PathText

SHIPPED = shipped.root() / "configs" / "evaluate"
"""Tasks that are called by name."""

Schema = TypeVar("Schema", bound=BaseModel)
Paths = Annotated[tuple[PathText, ...], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


@dataclass(frozen=True)
class TaskOptions:
    """What a command line changes of tasks."""

    num_fewshot: int | None = None
    """examples before each document, of tasks that can have some"""
    limit: int | None = None
    """documents of each task, its first ones"""
    image_root: Path | None = None
    """folder in which images are looked for; None: that of the data"""
    data_dirs: tuple[Path, ...] = ()
    """folders in which files of tasks are looked for too"""


class Section(BaseModel):
    """Frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Data(Section):
    """Where a task's rows are."""

    path: Paths = Field(min_length=1)
    """a file, a folder or a list of them, relative to the task file, then to the working directory, then to each
    folder of --data_dir"""
    split: str | None = None
    """regular expression at which a text file is cut into rows, what it matches left out; null: a file is one row"""


class Fewshot(Section):
    """Examples before a document."""

    k: int = Field(default=0, ge=0)
    """how many"""
    seed: int = Field(default=0, ge=0)
    """of the draw, which is another for each document"""
    path: Paths | None = None
    """whose rows; null: the task's own, of which a document is never its own example"""
    draw: Literal["random", "first"] = "random"
    """first: the same first rows before each document"""
    delimiter: str = "\n\n"
    """between examples, and before the document; with a chat template they are turns"""


class TaskConfig(Section):
    """Keys of every kind of task."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$", max_length=100)
    """what results call it; the file's name by default"""
    kind: str
    version: int | str = 1
    """raise it when the same answers would count otherwise"""
    data: Data
    metrics: tuple[str, ...] = ()
    """which are reported; those of its kind by default"""


class AskingConfig(TaskConfig):
    """Keys of the kinds that ask something of each row."""

    description: str = ""
    """stands before everything; with a chat template it is what the system says"""
    prompt: str | None = None
    """template of what is asked"""


class FewshotConfig(AskingConfig):
    """Keys of the kinds that can have examples."""

    fewshot: Fewshot = Fewshot()


def read_task_file(file: Path) -> dict[str, Any]:
    """The content of a task's file. UserError naming it."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{file}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: a task is a mapping of keys (name, kind, data, ...)")
    return {"name": file.stem, **content}


def checked(content: dict[str, Any], schema: type[Schema], file: Path) -> Schema:
    """The content as a config. UserError in one line naming the file and the first key that is wrong."""
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        first = problems[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(first["loc"][-1]), schema.model_fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(schema.model_fields)}"
            raise UserError(f"{file}: unknown key {key}; {hint}") from None
        if first["type"] == "missing":
            raise UserError(f"{file}: missing key {key}") from None
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{file}: {key}={first['input']!r}: {message[0].lower()}{message[1:]}") from None


def found_paths(paths: Sequence[str], key: str, file: Path, data_dirs: Sequence[Path]) -> list[Path]:
    """Where the files of a task are. UserError naming the task's file and what is not there."""
    found = []
    for path in paths:
        folders = [file.parent, Path(), *data_dirs]
        place = next((folder / path for folder in folders if (folder / path).exists()), None)
        if place is None:
            where = " nor ".join([str(file.parent), "the working directory", *map(str, folders[2:])])
            hint = shipped.made_by(path) or ("" if data_dirs else "; --data_dir names the folder where it is")
            raise UserError(f"{file}: {key}={path}: no such file or directory, neither in {where}{hint}")
        found.append(place)
    return found


def digest_of(*said: Any) -> str:
    """The same for equal values of JSON."""
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16).hexdigest()
