"""Commands as pages show them, held against the parser that would read them: nothing is run, nothing must be there."""

import importlib.util
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from llm import cli
from llm.cli import bind, split, taken_out, with_values
from llm.command.main import find, with_processes
from llm.jobs.evaluate import LAYOUT_FLAGS, read_flags
from llm.shipped import run_config
from llm.train.config import RunConfig
from llm.train.config.explain import keys_of
from llm.train.config.flags import parse_run_flags
from tests.shared import ROOT

PLAIN = ("cd", "cp", "mkdir", "touch", "tail", "head", "ls", "cat", "git", "tensorboard", "kill", "nvidia-smi", "hf")
"""Commands of the system, or of packages, with which pages do no more than anyone knows."""
OPEN = ("train.objectives", "optim.lr_factors", "deepspeed", "data.train", "data.valid", "task")
"""Keys under which there are names or numbers of the reader's own."""
RUNS = ("launch/pretrain.py", "launch/finetune.py", "tools/campaign.py", "tools/layouts.py", "tools/sweep.py")
"""Scripts that take any key of a run config."""


class Read(BaseException):
    """A command's flags were read, and nothing else was done."""


def commands_of(text: str) -> Iterator[list[str]]:
    """The commands of a block, one a line, as words, without comments and without what is set before them."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        words = shlex.split(line.strip().removeprefix("$ "), comments=True)
        while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
            words.pop(0)
        for end in (i for i, word in enumerate(words) if word in ("|", ">", "&&", "2>&1", "&")):
            words = words[:end]  # what comes behind is the shell's
            break
        if words:
            yield words


def check(words: Sequence[str]) -> None:
    """AssertionError or UserError where such a command would be refused for how it is written."""
    program, rest = Path(words[0]).name, list(words[1:])
    if program in ("python", "python3"):
        _check_python(rest)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        found = get_args_parser().parse_args(rest)
        script = ["-m", found.training_script] if found.module else [found.training_script]
        _check_python([*script, *found.training_script_args])
    elif program in ("bash", "sbatch"):
        inner = [word for word in rest if not word.startswith("--nodes")]
        assert (ROOT / inner[0]).is_file(), inner[0]
        script_given = len(inner) > 1 and inner[1].endswith(".py")
        _check_python(inner[1:] if script_given else ["launch/pretrain.py", *inner[1:]])
    elif program == "make":
        _check_make(rest)
    elif program == "lattice":
        _check_lattice(rest)
    elif program == "pip":
        assert rest[0] == "install"
    else:
        assert program in PLAIN, f"{program}: tests/docs/commands.py does not know how to check this command"


def _check_make(words: Sequence[str]) -> None:
    text = (ROOT / "Makefile").read_text()
    for word in words:
        name, equals, _ = word.partition("=")
        pattern = rf"^(export )?{name} \?=" if equals else rf"^{name}( [\w-]+)*:|^[\w -]* {name}:"
        assert re.search(pattern, text, flags=re.M), f"make {word}: the Makefile has no {name}"


def _check_python(words: list[str]) -> None:
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]) is not None, words[1]
        if words[1] == "llm":
            _check_lattice(words[2:])
        return
    script, rest = words[0], words[1:]
    if not (ROOT / script).is_file():  # a reader's own file
        assert script.isupper() or "/" not in script, f"{script}: no such script"
        return
    if script in ("launch/pretrain.py", "launch/finetune.py"):
        check_run(rest)
    elif script == "launch/evaluate.py":
        check_evaluation(rest)
    elif script in RUNS:
        check_any_key(script, rest)
    else:
        check_flags(script, rest)


def _check_lattice(words: list[str]) -> None:
    """The one command, whose subcommands are scripts under other names."""
    if words[0] in ("--help", "--version"):
        return
    command = find(words[0])
    if "--help" in words:
        return
    rest = command.words(with_processes(words[1:]))
    if command.script.endswith(".py"):
        _check_python([command.script, *rest])
        return
    function = getattr(importlib.import_module(command.script), command.name)
    bind(function, *split(with_values(rest, function)))


def check_run(words: Sequence[str]) -> None:
    """Flags of a training, and the file of its config where it is one of ours."""
    if set(words) & {"--help"}:
        return
    flags = parse_run_flags(list(words))
    for key in flags.overrides:
        assert key in keys_of(RunConfig) or any(key.startswith(f"{name}.") for name in OPEN), key
    if not Path(flags.config).suffix and not flags.config.isupper():
        run_config(flags.config)
    given = (flags.config, flags.overrides.get("model"))
    for path in (path for path in given if isinstance(path, str) and path.startswith("configs/")):
        assert (ROOT / path).is_file(), path


def check_evaluation(words: Sequence[str]) -> None:
    """Flags of an evaluation; tasks that are called by name are in configs/evaluate."""
    values, flags = split(with_values(list(words), read_flags))
    for name in (*LAYOUT_FLAGS, "extensions"):
        flags.pop(name, None)
    found = bind(read_flags, values, flags)
    for task in found.get("tasks", ()):
        assert "." in task or task.isupper() or (ROOT / "configs" / "evaluate" / f"{task}.yaml").is_file(), task


def check_any_key(script: str, words: Sequence[str]) -> None:
    """Flags of a tool that takes those of a run beside its own."""
    module = script.removesuffix(".py").replace("/", ".")
    _, common = importlib.import_module(f"{module}_plan").parse(list(words))
    for key in parse_run_flags(common).overrides if isinstance(common, list) else common.overrides:
        assert key in keys_of(RunConfig), key


def check_flags(script: str, words: Sequence[str]) -> None:
    """Flags of a script that hands a function, or several by name, to `run_cli`."""

    def read(function: Callable[..., Any], argv: Sequence[str] | None = None, **commands: Callable[..., Any]) -> None:
        line = list(words if argv is None else argv)
        if line and line[0] in commands:
            function = commands[line.pop(0)]
        if "--help" not in line:
            repeated, once = taken_out(with_values(line, function), function)
            values, flags = split(once)
            flags.pop("extensions", None)
            bind(function, values, flags)
        raise Read

    before = list(sys.path)
    try:
        with mock.patch.object(cli, "run_cli", read), mock.patch.object(sys, "argv", [script, *words]):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except Read:
        return
    finally:
        sys.path[:] = before
    raise AssertionError(f"{script} reads its flags by other means than run_cli")
