"""Command lines: fire reads them, but every flag is checked against the function's signature before the function runs.

fire alone runs a job first and complains about a mistyped flag afterwards, and takes `--x=false` for a true string. So
fire only splits the line here, all values as text; names and types are settled before any work. Whatever the user must
mend ends as one last line `error: ...` and exit code 2; a bug keeps its traceback.
"""

import difflib
import functools
import inspect
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import fire
from fire.decorators import SetParseFn
from pydantic import ValidationError

from llm.errors import UserError
from llm.extensions import load as load_extensions
from llm.screen import Watched, watched

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
HELP = ("--help", "-h")
EXIT_UNREAD = 128 + 13
"""Exit status of a command whose output nobody reads to its end: that of a process ended by SIGPIPE."""


class Verbatim(str):
    """Annotation of a text taken as it stands, in which "None" is a word."""


Repeated = typing.Annotated[tuple[str, ...], "repeated"]
"""Annotation of a flag that may be given several times: its values, each taken as it stands, in their order."""
Places = typing.Annotated[tuple[str, ...], "places"]
"""Annotation of a parameter that takes all values given by place, each as it stands."""


def run_cli(
    function: Callable[..., object], /, argv: Sequence[str] | None = None, **commands: Callable[..., object]
) -> None:
    """Run `function` with the flags of the command line, or one of `commands` when the line begins with its name.

    Parameters are given by name (`--name=value`, `--name value`) or by place. Annotations decide how a value is read:
    str, PathText, int, float, bool, `list[str]` (separated by commas), Repeated, Places and any but these `| None`.
    Exits with 2 and one line on bad input. Every command takes `--extensions`, which are run first (llm/extensions.py).
    """
    line = list(sys.argv[1:] if argv is None else argv)
    typed = line[0] if line and not _is_flag(line[0]) else ""
    if typed in commands:
        function = commands[line.pop(0)]

    def job() -> None:
        if typed not in commands and not os.path.lexists(typed):
            _refuse_misspelt(typed, commands)
        if any(word in HELP for word in line):
            print(describe(function, commands))
        else:
            repeated, once = taken_out(with_values(line, function), function)
            values, flags = split(once)
            extensions = flags.pop("extensions", "")
            if extensions is None:
                raise UserError("--extensions has no value; give Python files, separated by commas")
            load_extensions(convert("--extensions", extensions, list[str]))
            function(**bind(function, values, flags), **repeated)

    run_or_stop(job)


def _refuse_misspelt(word: str, commands: Collection[str]) -> None:
    """UserError where a word that is no command looks like one, as it would be taken for a path."""
    near = difflib.get_close_matches(word, commands, n=1, cutoff=0.7)
    if word and near:
        raise UserError(f"unknown command {word!r}; did you mean {near[0]}?")


def run_or_stop(job: Callable[[], object]) -> None:
    """Run a job; what the user must mend becomes one last line on stderr and exit code 2.

    Where nobody reads what it prints any more (`| head`), it ends without a word, with the status of SIGPIPE.
    """
    lost: OSError | None = None
    with watched() as streams:
        try:
            try:
                _run_or_stop(job)
            finally:
                lost = _lost_output(streams)  # now, as Python itself would complain at the end of the process
        except OSError:
            if lost is None:
                raise
    if isinstance(lost, BrokenPipeError):
        raise SystemExit(EXIT_UNREAD)
    if lost is not None:
        stop(f"standard output: {lost.strerror}", code=1)


def _run_or_stop(job: Callable[[], object]) -> None:
    try:
        job()
    except UserError as error:
        stop(str(error))
    except ValidationError as error:
        stop("; ".join(_validation_line(problem) for problem in error.errors()))
    except OSError as error:
        if error.filename is None:
            raise
        stop(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        stop("interrupted", code=130)


def _lost_output(streams: Sequence[Watched]) -> OSError | None:
    """Why what was printed cannot be written, if it cannot; from then on it goes nowhere."""
    lost = None
    for stream in streams:
        with suppress(OSError):
            stream.flush()
        error = stream.complaint()
        if error is not None:
            lost = lost or error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
    return lost


def stop(message: str, code: int = 2) -> NoReturn:
    """End the process with `error: message` as the last line."""
    with suppress(OSError):  # the status says it, too
        if sys.stdout is not None:
            sys.stdout.flush()
    with suppress(OSError):
        print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    raise SystemExit(code)


def with_values(line: Sequence[str], function: Callable[..., object]) -> list[str]:
    """The line with `--name value` as `--name=value` where the function's flag `name` takes a value, so that values may
    look like flags: what follows such a flag is its value, unless that is another flag of the function.
    """
    takes_value = {_flag_of(name): hint is not bool for name, hint in _hints(function).items()} | {"extensions": True}
    joined: list[str] = []
    words = list(line)
    while words:
        word = words.pop(0)
        if takes_value.get(_flag_name(word)) and "=" not in word and words and _flag_name(words[0]) not in takes_value:
            word += "=" + words.pop(0)
        joined.append(word)
    return joined


def taken_out(line: Sequence[str], function: Callable[..., object]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """(values of the flags that may be given several times, by parameter, the rest of the line)."""
    parameters = {_flag_of(name): name for name, hint in _hints(function).items() if hint == Repeated}
    found: dict[str, tuple[str, ...]] = {}
    rest = []
    for word in line:
        name = _flag_name(word)
        if name not in parameters:
            rest.append(word)
            continue
        _, equals, value = word.partition("=")
        if not value:
            raise UserError(f"--{name} has no value; one that looks like a flag is given as --{name}=VALUE")
        found[parameters[name]] = (*found.get(parameters[name], ()), value)
    return found, rest


def split(line: Sequence[str]) -> tuple[list[str], dict[str, str | None]]:
    """(values by place, values by flag name) of a command line: `x --a.b=1 --c` gives (["x"], {"a.b": "1", "c": None}).

    UserError on a flag given twice, on words with a meaning to fire alone, and on bytes that are no UTF-8.
    """
    names = [_flag_name(word) for word in line if _is_flag(word)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--{name} is given {names.count(name)} times")
    for word in line:
        if word in ("-", "--"):
            raise UserError(f"a lone {word} means nothing here")
    _refuse_other_encodings(line)
    without_value = [
        _is_flag(word) and "=" not in word and (following is None or _is_flag(following))
        for word, following in zip(line, [*line, None][1:], strict=True)
    ]
    found: tuple[list[str], dict[str, str]] = ([], {})

    @SetParseFn(str)
    def collect(*values: str, **flags: str) -> None:
        found[0].extend(values)
        found[1].update(flags)

    fire.Fire(collect, command=[word for word, bare in zip(line, without_value, strict=True) if not bare])
    given: dict[str, str | None] = {**found[1]}
    given.update({_flag_name(word): None for word, bare in zip(line, without_value, strict=True) if bare})
    return found[0], {name: given[name] for name in names if name in given}


def _refuse_other_encodings(line: Sequence[str]) -> None:
    """UserError at a word that is not UTF-8, but for the name of a file that is there."""
    for before, word in zip(["", *line], line, strict=False):
        name, equals, value = word.partition("=") if _is_flag(word) else (before if _is_flag(before) else "", "", word)
        lone = next((letter for letter in word if "\udc80" <= letter <= "\udcff"), None)
        if lone is not None and not os.path.lexists(value):
            bytes_ = word.encode(errors="surrogateescape")
            shown = bytes_.decode(errors="backslashreplace")
            of = f"{name}: " if name and not equals else ""
            with suppress(UnicodeDecodeError):
                bytes_.decode()
                raise UserError(
                    f"{of}{shown}: is UTF-8, but the locale here is not; put PYTHONUTF8=1 before the command"
                )
            raise UserError(f"{of}{shown}: the byte 0x{ord(lone) - 0xDC00:x} is not UTF-8; give the text in UTF-8")


def bind(function: Callable[..., object], values: Sequence[str], flags: dict[str, str | None]) -> dict[str, Any]:
    """The arguments of `function` by name, each with its annotated type. UserError names the flag and what is
    possible.
    """
    names = {_flag_of(name): name for name in inspect.signature(function).parameters}
    parameters = {flag: inspect.signature(function).parameters[name] for flag, name in names.items()}
    types_of = {flag: _hints(function)[name] for flag, name in names.items()}
    gathering = next((flag for flag, kind in types_of.items() if kind == Places), None)
    gathered = tuple(values) if gathering else ()
    values = () if gathering else values
    if gathered and gathering in flags:
        raise UserError(f"--{gathering} is given twice: {gathered[0]!r} by place and {flags[gathering]!r} by name")
    placed = [flag for flag, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    if len(values) > len(placed):
        raise UserError(f"{values[len(placed)]!r} is one value too many; the flags are {_flag_list(parameters)}")
    given: dict[str, str] = dict(zip(placed, values, strict=False))
    for name, text in flags.items():
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, n=1, cutoff=0.5)
            raise UserError(
                f"unknown flag --{name}; "
                + (f"did you mean --{near[0]}?" if near else f"the flags are {_flag_list(parameters)}")
            )
        if name in given:
            raise UserError(f"--{name} is given twice: {given[name]!r} by place and {text!r} by name")
        if text is None and types_of[name] is not bool:
            raise UserError(f"--{name} has no value; one that looks like a flag is given as --{name}=VALUE")
        given[name] = "true" if text is None else text
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and name not in given and not (gathered and name == gathering)
    ]
    if missing:
        raise UserError(f"missing {' and '.join('--' + name for name in missing)}; see --help")
    found = {names[name]: convert(f"--{name}", text, types_of[name]) for name, text in given.items()}
    return {**found, names[gathering]: gathered} if gathering and gathered else found


def convert(name: str, text: str, kind: Any) -> Any:
    """`text` as a value of the annotation `kind`; UserError names `name` when it is none."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (inner,) = (option for option in typing.get_args(kind) if option is not types.NoneType)
        if text in ("None", "none", "null") and inner is not Verbatim:
            return None
        kind = inner
    if kind in (Repeated, Places):
        return (text,)
    if typing.get_origin(kind) is typing.Annotated:
        value, checks = convert(name, text, kind.__origin__), kind.__metadata__
        try:
            return functools.reduce(lambda value, check: check.func(value), checks, value)
        except ValueError as error:
            raise UserError(f"{name}={text}: {error}") from None
    if typing.get_origin(kind) in (list, tuple):
        return typing.get_origin(kind)(
            convert(name, part, typing.get_args(kind)[0]) for part in text.split(",") if part
        )
    if kind is bool:
        if text.lower() not in TRUE + FALSE:
            raise UserError(f"{name}={text}: expected true or false")
        return text.lower() in TRUE
    if typing.get_origin(kind) is typing.Literal:
        if text not in typing.get_args(kind):
            raise UserError(f"{name}={text}: possible are {', '.join(typing.get_args(kind))}")
        return text
    return text if kind in (str, Verbatim) else _number(name, text, kind)


def _number(name: str, text: str, kind: type[int] | type[float]) -> float:
    try:
        number = float(text) if kind is float or not re.fullmatch(r"[-+ ]*[\d_]+ *", text) else int(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number != kind(number):
        raise UserError(f"{name}={text}: expected {'a whole number' if kind is int else 'a number'}")
    return kind(number)


def describe(function: Callable[..., object], commands: dict[str, Callable[..., object]] | None = None) -> str:
    """The text of --help: docstring, flags with types and defaults, commands."""
    lines = [inspect.getdoc(function) or function.__name__, "", "flags:"]
    hints = typing.get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        default = "(required)" if parameter.default is parameter.empty else f"(default {parameter.default})"
        lines.append(f"  --{_flag_of(name)}: {_type_name(hints[name])} {default}")
    lines.append("  --extensions: Python files, separated by commas, run first: they register what models are made of")
    others = {name: command for name, command in (commands or {}).items() if command is not function}
    if others:
        lines += ["", "commands:"]
        lines += [f"  {name}: {(inspect.getdoc(command) or name).splitlines()[0]}" for name, command in others.items()]
    return "\n".join(lines)


def _hints(function: Callable[..., object]) -> dict[str, Any]:
    hints = typing.get_type_hints(function, include_extras=True)
    return {name: hints[name] for name in inspect.signature(function).parameters}


def _flag_of(parameter: str) -> str:
    """The flag of a parameter: a word of Python's own has an underscore behind it there (`with_`)."""
    return parameter.removesuffix("_")


def _flag_name(word: str) -> str:
    """`a_b` of `--a-b` and `--a-b=1`; empty for a value."""
    return word.lstrip("-").split("=")[0].replace("-", "_") if _is_flag(word) else ""


def _is_flag(word: str) -> bool:
    """What fire takes for a flag: --name, -n, -n=value; a negative number is a value."""
    return re.match(r"--.|-[A-Za-z](=|$)", word) is not None


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):  # the former is `| None` of an annotated type
        return " | ".join("None" if inner is types.NoneType else _type_name(inner) for inner in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(typing.get_args(kind))
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


def _flag_list(parameters: typing.Iterable[str]) -> str:
    return ", ".join(f"--{name}" for name in parameters)


def _validation_line(problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
