"""The text of `--help`, of the command and of each subcommand."""

import shutil
import textwrap
from collections.abc import Iterator, Sequence

from llm.command import source
from llm.command.table import COMMANDS, RUN_KEYS, Command

HELP = ("--help", "-h")
WIDTH = 120
EXTENSIONS = "Python files, separated by commas, run first: they register what models are made of"
NPROC = "--nproc auto is as many processes as this machine has GPUs, or one where it has none"
STATUSES = "exit status: 0 done; 1 failed, or compared and found different; 2 something to mend, in one line; " \
    "75 stopped on request and saved, the same command goes on; 128 + N ended by signal N"  # fmt: skip


def overview() -> str:
    """What `lattice --help` prints."""
    wide = max(len(command.name) for command in COMMANDS)
    lines = ["usage: lattice COMMAND [...]", ""]
    lines += ["Train large transformer models: one model, any layout, one answer.", ""]
    for command in COMMANDS:
        lines += _filled(f"  {command.name:<{wide}}  ", command.about)
    lines += ["", "`lattice COMMAND --help` lists the flags of a command; `lattice --version` names the version.", ""]
    return "\n".join([*lines, *_filled("", STATUSES)])


def of(command: Command, word: str | None = None) -> str:
    """What `lattice COMMAND --help` prints; `word` chooses what the command has several of."""
    chosen = [word] if word in command.described else ["" if "" in command.described else None]
    typed = " ".join(["lattice", command.name, *(one for one in chosen if one)])
    place = command.described.get(chosen[0] or "")
    several = chosen == [None] and bool(command.described)
    lines = [f"usage: {typed} {'COMMAND ' if several else _by_place(place)}[--flag=value ...]", ""]
    lines += [*_filled("", f"{command.about[0].upper()}{command.about[1:]}."), ""]
    if not chosen[0] or command.example.split()[1:2] == chosen:
        lines += [f"  lattice {command.example}", ""]
    if several:
        lines.append("commands:")
        for name, where in command.described.items():
            first = source.signature(where).doc.split("\n\n")[0]
            lines += _filled(f"  {name:<12}", first.partition(". ")[0])
        lines += ["", f"`lattice {command.name} COMMAND --help` lists the flags of one."]
        return "\n".join(lines)
    if place is not None:
        lines += described(place)
    for listed in command.listed:
        flags = source.table(listed)
        lines += [""] * (place is not None)
        lines += [line for name, about in flags.items() for line in _filled(f"  --{name}: ", about)]
    others = [name for name in command.described if name and name != chosen[0]]
    if others:
        lines += ["", f"also: {', '.join(f'lattice {command.name} {name}' for name in others)}"]
    if "nproc" in flags_of(command, chosen[0]):
        lines += ["", NPROC]
    if command.keys:
        lines += ["", "config keys, each as --section.key=value:", *_keys()]
    return "\n".join(lines)


def _by_place(place: str | None) -> str:
    """What a function must be given, which may stand by place, as `SRC DST `."""
    flags = source.signature(place).flags if place is not None else []
    needed = [flag for flag in flags if flag.default is source.REQUIRED]
    return "".join(f"{flag.name.upper()}{'...' if flag.kind.startswith('tuple') else ''} " for flag in needed)


def described(place: str) -> list[str]:
    """The docstring and flags of a function or dataclass, as llm.cli.describe has them."""
    found = source.signature(place)
    lines = [*found.doc.splitlines(), "", "flags:"]
    for flag in found.flags:
        default = "(required)" if flag.default is source.REQUIRED else f"(default {flag.default})"
        lines.append(f"  --{flag.name}: {flag.kind} {default}")
    return [*lines, f"  --extensions: {EXTENSIONS}"]


def flags_of(command: Command, word: str | None = None) -> list[str]:
    """Names of all flags of a command, config keys apart; of its word `word` alone where that is given."""
    places = [place for name, place in command.described.items() if word is None or name == word]
    names = [flag.name for place in places for flag in source.signature(place).flags]
    for listed in command.listed:
        names += source.table(listed)
    return list(dict.fromkeys(names))


def _keys() -> Iterator[str]:
    for key in source.keys(RUN_KEYS):
        default = "" if key.default is source.REQUIRED else f" [{key.default}]"
        yield from _filled(f"  --{key.name:<34} ", f"{key.about}{default}")


def _filled(begins: str, text: str) -> Sequence[str]:
    """The text behind `begins`, its lines as wide as the terminal."""
    width = max(60, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))
    under = " " * min(len(begins), 40)
    filled = textwrap.wrap(
        " ".join(text.split()), width, initial_indent=begins, subsequent_indent=under, break_on_hyphens=False,
        break_long_words=False,
    )  # fmt: skip
    return filled or [begins.rstrip()]
