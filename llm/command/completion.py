"""What makes a shell complete the words of `lattice`: subcommands, what some of them begin with, flags, else files."""

from collections.abc import Sequence
from typing import Literal

from llm.cli import run_cli
from llm.command import source
from llm.command.help import flags_of
from llm.command.table import COMMANDS, RUN_KEYS
from llm.shipped import short_names

Shell = Literal["bash", "zsh", "fish"]


def completion(shell: Shell) -> None:
    """Print a shell's completion of `lattice`.

    bash: lattice completion bash > ~/.local/share/bash-completion/completions/lattice
    zsh:  lattice completion zsh > ~/.zfunc/_lattice, with ~/.zfunc in fpath before compinit
    fish: lattice completion fish > ~/.config/fish/completions/lattice.fish

    shell: bash, zsh or fish
    """
    print({"bash": bash, "zsh": zsh, "fish": fish}[shell](), end="")


def words_of() -> dict[str, tuple[list[str], list[str]]]:
    """(words that may come first, flags and config keys) of each subcommand."""
    found = {}
    for command in COMMANDS:
        first = [word for word in command.described if word]
        if command.name == "completion":
            first = ["bash", "zsh", "fish"]
        keys = [key.name for key in source.keys(RUN_KEYS)] if command.keys else []
        names = dict.fromkeys([*flags_of(command), *keys, "help"])
        found[command.name] = (first, [f"--{name}" for name in names])
    return found


def bash() -> str:
    """For bash."""
    table = words_of()
    cases = "".join(
        f'    {name}) flags="{" ".join(flags)}"; first="{" ".join(first)}" ;;\n'
        for name, (first, flags) in table.items()
    )
    return f"""# bash completion of lattice
_lattice() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" flags="" first=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{" ".join(table)} --help --version" -- "$word"))
    return
  fi
  case "${{COMP_WORDS[1]}}" in
{cases}  esac
  if [ "${{COMP_WORDS[COMP_CWORD-1]}}" = --config ]; then
    COMPREPLY=($(compgen -W "{" ".join(short_names())}" -- "$word") $(compgen -f -- "$word"))
  elif [[ "$word" == -* ]]; then
    COMPREPLY=($(compgen -W "$flags" -- "$word"))
  elif [ "$COMP_CWORD" -eq 2 ] && [ -n "$first" ]; then
    COMPREPLY=($(compgen -W "$first" -- "$word") $(compgen -f -- "$word"))
  else
    COMPREPLY=($(compgen -f -- "$word"))
  fi
}}
complete -o filenames -F _lattice lattice
"""


def zsh() -> str:
    """For zsh."""
    named = "".join(f"    {_quoted(f'{command.name}:{command.about}')}\n" for command in COMMANDS)
    cases = "".join(
        f"    {name}) flags=({' '.join(flags)}); first=({' '.join(first)}) ;;\n"
        for name, (first, flags) in words_of().items()
    )
    return f"""#compdef lattice
_lattice() {{
  local -a commands flags first
  commands=(
{named}  )
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  case $words[2] in
{cases}  esac
  if [[ $words[CURRENT] == -* ]]; then
    compadd -- $flags
  else
    (( CURRENT == 3 )) && compadd -- $first
    _files
  fi
}}
if [ "$funcstack[1]" = "_lattice" ]; then _lattice "$@"; else compdef _lattice lattice; fi
"""


def fish() -> str:
    """For fish."""
    lines = ["# fish completion of lattice"]
    for command in COMMANDS:
        lines.append(f"complete -c lattice -n __fish_use_subcommand -f -a {command.name} -d {_quoted(command.about)}")
    for name, (first, flags) in words_of().items():
        seen = f"-n '__fish_seen_subcommand_from {name}'"
        lines += [f"complete -c lattice {seen} -l {flag.removeprefix('--')}" for flag in flags]
        if first:
            lines.append(f"complete -c lattice {seen} -a '{' '.join(first)}'")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """For zsh and fish, which both read single quotes so, as no text here has one within."""
    return "'" + text.replace("'", "") + "'"


def main(words: Sequence[str]) -> None:
    """The command line."""
    run_cli(completion, words)
