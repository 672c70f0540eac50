"""What comes with the program beside its packages: launch/, tools/ and configs/.

In the repository they lie beside llm/; a wheel has them in llm/_shipped (setup.py puts them there), laid out as in the
repository, so that a script finds its neighbours in both. What a user's own folder has under the same name goes first.
"""

import difflib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from llm.errors import UserError

PACKAGE = Path(__file__).resolve().parent
FOLDERS = ("pretrain", "finetune", "siblings")
"""Of configs/, in which a run config may be called by its name alone."""
RUNS = Path("runs")
MADE_BY = {
    "data/stdlib": "lattice quickstart prepare",
    "data/sequences/reverse": "tools/sequences.py prepare --task reverse",
    "data/sequences/sort": "tools/sequences.py prepare --task sort",
    "data/values/diabetes": "tools/values.py --data diabetes",
    "data/values/friedman": "tools/values.py --data friedman",
    "data/values/mackey_glass": "tools/values.py --data mackey_glass",
    "data/molecules": "tools/molecules.py prepare --data DIR",
    "data/stories": "tools/stories_chats.py prepare --text FILE",
    "data/captions": "tools/captions.py prepare --data FILE.parquet --text COLUMN",
    "data/easy_vqa": "tools/easy_vqa.py prepare --data DIR",
    "quickstart": "lattice train --config quickstart",
    "chat_full": "lattice finetune --config chat_full",
    "easy_vqa": "lattice finetune --config easy_vqa",
}
"""What makes the data and models that the shipped configs read, by their folder in runs: a command, or a script and its
words. What is written in capitals there is the user's own."""


def root() -> Path:
    """The folder that has launch/, tools/ and configs/."""
    inside = PACKAGE / "_shipped"
    return inside if inside.is_dir() else PACKAGE.parent


def found(path: str | Path) -> Path:
    """The file of a relative path: in the working directory, else the one that ships under it; as given where neither
    is there.
    """
    given = Path(path).expanduser()
    shipped = root() / given
    if given.exists() or given.is_absolute() or given.parts[:1] != ("configs",) or not shipped.is_file():
        return given
    return shipped


def run_config(name_or_path: str | Path) -> Path:
    """The file of a run config, by its path or by the name of a shipped one: `quickstart`. UserError naming the
    nearest where a name is unknown.
    """
    given = Path(name_or_path).expanduser()
    if given.exists() or given.suffix or given.is_absolute():
        return found(name_or_path)
    named = dict(run_configs())
    for name in (str(given), *(f"{folder}/{given}" for folder in FOLDERS)):
        if name in named:
            return named[name]
    near = difflib.get_close_matches(str(given), short_names(), n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else "`lattice configs` lists the latter"
    raise UserError(f"{name_or_path}: neither a file nor a config that ships with Lattice; {hint}")


def short_names() -> list[str]:
    """What --config may be called with: the last part of a name, and all of it."""
    names = [name for name, _ in run_configs()]
    return [*dict.fromkeys(name.partition("/")[2] for name in names), *names]


def run_configs() -> Iterator[tuple[str, Path]]:
    """(`pretrain/quickstart`, its file) of each shipped run config."""
    for folder in FOLDERS:
        for file in sorted((root() / "configs" / folder).glob("*.yaml")):
            yield f"{folder}/{file.stem}", file


def made_by(path: str | Path) -> str:
    """What a message about a missing file goes on with: `; ... makes it` for what shipped configs read and a
    command of ours makes in the working directory; else empty.
    """
    inside = Path(os.path.relpath(path, RUNS)).parts
    for folder, command in MADE_BY.items():
        parts = Path(folder).parts
        if inside[: len(parts)] == parts:
            return f"; `{_as_typed(command)}` makes it"
    return ""


def _as_typed(command: str) -> str:
    if not command.startswith("tools/"):
        return command
    script, _, words = command.partition(" ")
    here = root().resolve() == Path.cwd().resolve()
    return f"python {shlex.quote(str(script if here else root() / script))} {words}"
