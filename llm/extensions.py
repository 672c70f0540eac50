"""Files of a user's own, run before a config or a model is read: they register what these then name.

    extensions: [my_objective.py]            # in a run config; --extensions=a.py,b.py on a command line

A file calls public functions: `llm.objectives.register`, `llm.tasks.register`. Nothing that is read as data names a
file to run: neither a checkpoint nor a model folder.
"""

import importlib.util
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

from llm.errors import UserError

LOADED: set[Path] = set()
"""Files that this process has run."""


def load(paths: Iterable[str | Path]) -> None:
    """Run Python files, each once in a process, in this order. UserError naming the file, and in it the line, where one
    is not there or fails.
    """
    for path in map(Path, paths):
        file = path.expanduser().resolve()
        if file not in LOADED:
            _run(path, file)
            LOADED.add(file)


def _run(path: Path, file: Path) -> None:
    if not file.is_file():
        raise UserError(f"extensions: {path}: no such file")
    name = f"extension_{len(LOADED)}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"extensions: {path}: is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses of the file look themselves up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does
        del sys.modules[name]
        raise UserError(f"extensions: {path}{_line(file, error)}: {type(error).__name__}: {error}") from error


def _line(file: Path, error: Exception) -> str:
    """Where in the file it failed."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    return f", line {lines[-1]}" if lines else ""
