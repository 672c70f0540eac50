"""The command line of a run: `--config FILE` and `--section.key=value` overrides, checked before any work.

Values read as they would in the YAML file, and the schema in llm/train/config/schema.py has the say on names and types.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

from pydantic import BaseModel

from llm import shipped
from llm.cli import split
from llm.errors import UserError
from llm.paths import expanded
from llm.train.config.explain import keys_of, section_of, takes_text
from llm.train.config.schema import RunConfig
from llm.train.config.synonyms import meant
from llm.train.config.yaml_file import scalar

ITEM = re.compile(r"(\.\d+)+$")
"""Which item of a list a key means."""
OWN_FLAGS = {
    "config": "YAML run config (required; a replay takes the run folder's own without it)",
    "run_dir": "folder of the run; default runs/<name of the config>",
    "replay_step": "rebuild this step of the run in run_dir, print its documents by loss, stop",
    "nproc": "start this many processes on this machine (instead of calling torchrun yourself)",
    "dry_run": "check all that the run checks, print the resolved config, memory and traffic of the layout, stop; "
    "--dry_run=config leaves out files and this machine",
    "show": "print the first N rows as the model will see them, with what trains marked, and stop; "
    "starts no ranks, but keeps what is made of the files in data.cache_dir",
    "help": "this text",
}


@dataclass(frozen=True)
class RunFlags:
    """The command line, taken apart; `overrides` maps dotted config keys to values."""

    config: str
    run_dir: str | None = None
    nproc: int | None = None
    dry_run: bool | Literal["config"] = False
    replay_step: int | None = None
    show: int | None = None
    overrides: dict[str, Any] = field(default_factory=dict)

    def folder(self) -> Path:
        """The run's folder, given or named after the config."""
        return Path(self.run_dir or Path("runs") / Path(self.config).stem)

    def without_nproc(self, words: list[str]) -> list[str]:
        """The words for each process: torchrun would take --nproc for an abbreviation of its own flag."""
        text = str(self.nproc)
        joined = [word for word in words if word != f"--nproc={text}"]
        for i in range(len(joined) - 1):
            if joined[i] == "--nproc" and joined[i + 1] == text:
                return joined[:i] + joined[i + 2 :]
        return joined


def parse_run_flags(words: list[str], example: str = "configs/pretrain/quickstart.yaml") -> RunFlags:
    """RunFlags of the words after the script's name. UserError naming the flag and the nearest known one; example: a
    config for whoever gives none.
    """
    values, texts = split(words)
    if values:
        named = values[0].endswith((".yaml", ".yml")) or values[0] in shipped.short_names()
        hint = f"; did you mean --config {values[0]}?" if named else ""
        raise UserError(f"unexpected word {values[0]!r}; every option is --key=value{hint}")
    flags: dict[str, Any] = {key: True if text is None else _value(key, text) for key, text in texts.items()}
    own = {key: flags.pop(key) for key in list(flags) if key in OWN_FLAGS}
    for key in ("config", "run_dir"):  # paths stay as they were typed
        if key in own and not texts[key]:
            raise UserError(f"--{key} needs a value")
        if key in own:
            texts[key] = _path(f"--{key}", str(texts[key]))
    for key in flags:
        if "." not in key and key not in RunConfig.model_fields:
            near = meant(key, [*OWN_FLAGS, *keys_of(RunConfig)])
            hint = f"did you mean {' or '.join(f'--{name}' for name in near)}?" if near else "see --help"
            raise UserError(f"unknown flag --{key}; {hint}")
    replay_step = _natural(own, "replay_step", "step of the run")
    if replay_step is not None and "config" not in own:
        if "run_dir" not in own:
            raise UserError(f"--replay_step={replay_step}: --run_dir is missing, the folder of the run")
        texts["config"] = str(Path(str(texts["run_dir"]), "config.yaml"))
    elif "config" not in own:
        raise UserError(f"--config FILE is missing; for a start: --config {example}")
    dry_run = own.get("dry_run", False)
    if not isinstance(dry_run, bool) and dry_run != "config":
        raise UserError(f"--dry_run={dry_run}: expected true or false, or config to leave out files and this machine")
    return RunFlags(
        config=str(texts["config"]),
        run_dir=texts.get("run_dir"),
        nproc=_natural(own, "nproc", "number of processes"),
        dry_run=dry_run,
        replay_step=replay_step,
        show=_natural(own, "show", "number of rows"),
        overrides=flags,
    )


def _path(flag: str, text: str) -> str:
    try:
        return expanded(text)
    except ValueError as error:
        raise UserError(f"{flag}={text}: {error}") from None


def _value(key: str, text: str) -> Any:
    """What `--key=text` gives: read as in the YAML file, but where the key takes text that is what was typed, colons,
    hashes and all, unless it is quoted, null, or the list or mapping that the key takes too."""
    value, of = scalar(text), ITEM.sub("", key)
    if key in OWN_FLAGS or value is None or text[:1] in ("'", '"') or not takes_text(RunConfig, of):
        return value
    return value if isinstance(value, list | dict) and text[0] in "[{" else text


def _natural(own: dict[str, Any], key: str, what: str) -> int | None:
    value = own.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise UserError(f"--{key}={value}: expected a {what}, 1 or more")
    return value


def help_text(script: str = "launch/pretrain.py") -> str:
    """What `--help` prints: the flags, then every config key with its default and its line of documentation."""
    lines = [f"usage: torchrun [torchrun options] {script} --config FILE [--section.key=value ...]", ""]
    lines += [f"  --{key:<34} {text}" for key, text in OWN_FLAGS.items()]
    lines += ["", "config keys:"]
    lines += [f"  --{key:<34} {text}" for key, text in _dotted(RunConfig).items()]
    return "\n".join(lines)


def _dotted(schema: type[BaseModel], prefix: str = "") -> dict[str, str]:
    rows: dict[str, str] = {}
    for name, info in schema.model_fields.items():
        inner = section_of(info.annotation)
        if inner is not None:
            if any(section_of(form) is None for form in get_args(info.annotation) if form is not NoneType):
                rows[prefix + name] = info.description or ""  # it has forms without keys, as a path
            rows.update(_dotted(inner, f"{prefix}{name}."))
        else:
            default = "" if info.is_required() else f" [{info.get_default(call_default_factory=True)}]"
            rows[prefix + name] = f"{info.description or ''}{default}"
    return rows
