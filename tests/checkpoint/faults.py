"""Single faults of a run folder with checkpoints at STEPS, written by two ranks: what each does, which checkpoints are
damaged by it, and which file has to be named.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.checkpoint.reader import MANIFEST, seal

STEPS = (2, 4, 6)
FILES = ("rank_00000.safetensors", "rank_00001.safetensors", MANIFEST)


@dataclass(frozen=True)
class Fault:
    """`apply(run_dir)` makes it; `damaged` are the steps whose checkpoints must not be loaded any more, and an error or
    a line about it has to name `file`.
    """

    name: str
    apply: Callable[[Path], object]
    damaged: tuple[int, ...]
    file: str


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


def canary_of(run_dir: Path) -> Path:
    """The file that a pickle put into the folder would create."""
    return run_dir.parent / f"{run_dir.name}.canary"


def pickled(run_dir: Path) -> bytes:
    """Such a pickle."""
    return pickle.dumps(Canary(canary_of(run_dir)))


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def flip(path: Path, place: int, bit: int = 0) -> None:
    """Turn one bit around."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def reseal(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and give it the digest that fits."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    del manifest["digest"]
    change(manifest)
    (folder / MANIFEST).write_bytes(seal(manifest))


def exchange(one: Path, other: Path) -> None:
    """Each under the other's name."""
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def replace(path: Path, how: str, run_dir: Path) -> None:
    """Something else of the same name."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "nothing":
        path.write_bytes(b"")
    elif how == "pickle":
        path.write_bytes(pickled(run_dir))


def of_files(step: int) -> list[Fault]:
    """What can befall each file of one checkpoint."""
    found = []

    def add(name: str, file: str, change: Callable[[Path, Path], object]) -> None:
        def apply(run_dir: Path) -> None:
            change(checkpoint(run_dir, step) / file, run_dir)

        found.append(Fault(f"{name}, {file} of step {step}", apply, (step,), f"step_{step:08d}/{file}"))

    for file in FILES:
        add("first bit", file, lambda path, _: flip(path, 0))
        add("a bit of the header", file, lambda path, _: flip(path, 100, bit=5))
        add("a bit in the middle", file, lambda path, _: flip(path, path.stat().st_size // 2, bit=3))
        add("last bit", file, lambda path, _: flip(path, path.stat().st_size - 1, bit=7))
        add("a byte short", file, lambda path, _: os.truncate(path, path.stat().st_size - 1))
        add("a byte long", file, lambda path, _: os.truncate(path, path.stat().st_size + 1))
        add("cut in half", file, lambda path, _: os.truncate(path, path.stat().st_size // 2))
        add("empty", file, lambda path, _: os.truncate(path, 0))
        add("deleted", file, lambda path, _: path.unlink())
        add("zeros", file, lambda path, _: path.write_bytes(bytes(path.stat().st_size)))
        for how in ("folder", "loop", "pickle"):
            add(f"a {how} instead", file, lambda path, run_dir, how=how: replace(path, how, run_dir))
    return found


def _exchanged(step: int, other: int) -> list[Fault]:
    """Files of two steps, or of two ranks, each in the other's place."""
    found = []
    for file in FILES:

        def steps(run_dir: Path, file: str = file) -> None:
            exchange(checkpoint(run_dir, step) / file, checkpoint(run_dir, other) / file)

        found.append(Fault(f"{file} of steps {step} and {other}", steps, (step, other), f"step_{step:08d}/"))

        def copied(run_dir: Path, file: str = file) -> None:
            shutil.copy(checkpoint(run_dir, other) / file, checkpoint(run_dir, step) / file)

        found.append(Fault(f"{file} of step {other} in {step}", copied, (step,), f"step_{step:08d}/"))

    def ranks(run_dir: Path) -> None:
        exchange(*(checkpoint(run_dir, step) / file for file in FILES[:2]))

    def one_rank(run_dir: Path) -> None:
        shutil.copy(*(checkpoint(run_dir, step) / file for file in FILES[:2]))

    def folders(run_dir: Path) -> None:
        exchange(checkpoint(run_dir, step), checkpoint(run_dir, other))

    def folder(run_dir: Path) -> None:
        shutil.rmtree(checkpoint(run_dir, step))
        shutil.copytree(checkpoint(run_dir, other), checkpoint(run_dir, step))

    return [
        *found,
        Fault(f"ranks of step {step}", ranks, (step,), f"step_{step:08d}/rank_0000"),
        Fault(f"rank 0 twice in step {step}", one_rank, (step,), f"step_{step:08d}/{FILES[1]}"),
        Fault(f"folders {step} and {other}", folders, (step, other), f"step_{step:08d}/{MANIFEST}"),
        Fault(f"folder {other} as {step}", folder, (step,), f"step_{step:08d}/{MANIFEST}"),
    ]


def _of_the_folder(step: int) -> list[Fault]:
    """The whole folder is something else."""
    return [
        Fault(
            f"step {step} is {how}",
            lambda run_dir, how=how: replace(checkpoint(run_dir, step), how, run_dir),
            (step,),
            f"step_{step:08d}",
        )
        for how in ("folder", "loop", "nothing", "pickle")
    ]


def row(manifest: dict[str, Any]) -> dict[str, Any]:
    """A fragment that holds something."""
    return next(row for row in manifest["fragments"] if row["numel"])


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no step": lambda m: m.pop("step"),
    "another step": lambda m: m.update(step=m["step"] + 1),
    "no files": lambda m: m.pop("files"),
    "no parameters": lambda m: m.pop("parameters"),
    "no fragments": lambda m: m.pop("fragments"),
    "no meta": lambda m: m.pop("meta"),
    "no config": lambda m: m["meta"].pop("config"),
    "a list of files": lambda m: m.update(files=list(m["files"])),
    "a file without a digest": lambda m: m["files"][FILES[0]].pop("header"),
    "a file that is not listed": lambda m: m["files"].pop(FILES[0]),
    "another version": lambda m: m.update(version=1),
    "a fragment less": lambda m: m["fragments"].remove(row(m)),
    "a fragment without an offset": lambda m: row(m).pop("offset"),
    "an offset beyond the file": lambda m: row(m).update(offset=1 << 40),
    "an offset in words": lambda m: row(m).update(offset="first"),
    "a digest less": lambda m: row(m)["blocks"].pop(),
    "an unknown dtype": lambda m: row(m).update(dtype="object"),
    "a box of too many dimensions": lambda m: row(m)["box"].append([0, 1]),
    "a negative start": lambda m: row(m).update(start=-1),
}
"""Changes of a manifest that leave it with a digest that fits."""


def outside(path: str) -> Callable[[dict[str, Any]], object]:
    """A file of the checkpoint lies elsewhere."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][path] = manifest["files"].pop(FILES[0])
        for fragment in manifest["fragments"]:
            if fragment["file"] == FILES[0]:
                fragment["file"] = path

    return change


def _edited(step: int) -> list[Fault]:
    file = f"step_{step:08d}/{MANIFEST}"

    def unsealed(run_dir: Path) -> None:
        path = checkpoint(run_dir, step) / MANIFEST
        path.write_bytes(path.read_bytes().replace(f'"step": {step}'.encode(), f'"step": {step - 1}'.encode()))

    def respaced(run_dir: Path) -> None:
        path = checkpoint(run_dir, step) / MANIFEST
        path.write_bytes(path.read_bytes().replace(b", ", b","))

    found = [Fault("edited manifest", unsealed, (step,), file), Fault("respaced manifest", respaced, (step,), file)]
    edits = EDITS | {f"files in {path}": outside(path) for path in ("../step_00000004/" + FILES[0], "/dev/zero", "..")}
    for name, change in edits.items():

        def apply(run_dir: Path, change: Callable[[dict[str, Any]], object] = change) -> None:
            reseal(checkpoint(run_dir, step), change)

        named = f"step_{step:08d}" if name == "a fragment less" else file
        found.append(Fault(f"sealed manifest with {name}", apply, (step,), named))
    return found


def all_damaged() -> Fault:
    """Nothing is left to go back to."""

    def apply(run_dir: Path) -> None:
        for step in STEPS:
            flip(checkpoint(run_dir, step) / FILES[1], -1)

    return Fault("all steps damaged", apply, STEPS, f"step_{STEPS[-1]:08d}/{FILES[1]}")


def all_faults() -> list[Fault]:
    """Every fault, each by itself."""
    return [
        *(fault for step in STEPS for fault in of_files(step)),
        *_exchanged(6, 4),
        *_of_the_folder(6),
        *_edited(6),
        all_damaged(),
    ]
