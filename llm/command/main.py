"""`lattice COMMAND ...`, or `python -m llm COMMAND ...`: finds the subcommand, and hands its words to what does it.

A script runs in this process, as if it had been called by its path: its ranks, its signals and its exit status are its
own. Nothing here imports torch.
"""

import difflib
import importlib
import runpy
import sys
from collections.abc import Sequence
from importlib import metadata

from llm import shipped
from llm.command import help
from llm.command.table import BY_NAME, Command
from llm.errors import UserError

OTHER_NAMES = {"pretrain": "train", "eval": "evaluate", "sample": "generate", "talk": "chat", "fine-tune": "finetune"}
"""What others call a subcommand, for whoever types it."""


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line. SystemExit with 2 and one line where it is wrong."""
    line = list(sys.argv[1:] if words is None else words)
    try:
        _run(line)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # `| head`: nobody reads what is printed any more
        sys.stderr.close()
        raise SystemExit(128 + 13) from None


def _run(line: list[str]) -> None:
    if not line or line[0] in help.HELP or line == ["help"]:
        print(help.overview(), flush=True)
        return
    if line[0] in ("--version", "version"):
        print(f"lattice {version()}")
        return
    if line[0] == "help":
        line = [*line[1:], "--help"]
    command = find(line[0])
    rest = line[1:]
    if any(word in help.HELP for word in rest):
        print(help.of(command, rest[0]), flush=True)
        return
    if not rest and command.described and "" not in command.described:
        raise UserError(f"{command.name} needs one of {', '.join(command.described)}: lattice {command.example}")
    start(command, command.words(with_processes(rest)))


def find(name: str) -> Command:
    """The subcommand of that name. UserError naming the nearest."""
    if name in BY_NAME:
        return BY_NAME[name]
    near = [OTHER_NAMES[name]] if name in OTHER_NAMES else difflib.get_close_matches(name, BY_NAME, n=1, cutoff=0.5)
    hint = f"did you mean `lattice {near[0]}`?" if near else "`lattice --help` lists them"
    raise UserError(f"unknown command {name!r}; {hint}")


def with_processes(words: Sequence[str]) -> list[str]:
    """The words with the number that `--nproc auto` stands for on this machine."""
    changed = list(words)
    for i, word in enumerate(words):
        if word == "--nproc=auto":
            changed[i] = f"--nproc={processes()}"
        elif word == "auto" and i and words[i - 1] == "--nproc":
            changed[i] = str(processes())
    return changed


def processes() -> int:
    """One for each GPU; one where there is none, as the cores of a CPU are also the threads of one process."""
    import torch

    return max(1, torch.cuda.device_count())


def start(command: Command, words: list[str]) -> None:
    """Run what does it, with these words."""
    if not command.script.endswith(".py"):
        importlib.import_module(command.script).main(words)
        return
    script = str(shipped.root() / command.script)
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")


def version() -> str:
    """Of what is installed; of a bare checkout it is not known."""
    try:
        return metadata.version("lattice-llm")
    except metadata.PackageNotFoundError:
        return "of a checkout that is not installed"
