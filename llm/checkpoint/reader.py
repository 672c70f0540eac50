"""A committed checkpoint folder, opened for reading by any number of ranks: manifest first, then only the blocks that
hold what is asked for. On which layout it was written makes no difference.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.boxes import Box, box_shape, whole
from llm.checkpoint.fragments import Fragment, digest, read_blocks
from llm.checkpoint.overlap import Part, common, rectangles, view
from llm.errors import DamagedFile, UserError

FORMAT = "lattice-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"


def seal(manifest: dict[str, Any]) -> bytes:
    """The manifest as written: canonical JSON with a digest of itself, so that an edited one is refused."""
    body = json.dumps(manifest, sort_keys=True)
    return json.dumps({**manifest, "digest": digest(body.encode())}, sort_keys=True).encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder. DamagedFile when it is missing, is not what was written, or is of another
    version.
    """
    file = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(file.read_bytes())
        stated = manifest.pop("digest")
    except OSError as error:
        raise DamagedFile(f"{file}: {error.strerror or error}") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise DamagedFile(f"{file}: damaged: not a checkpoint manifest") from None
    if digest(json.dumps(manifest, sort_keys=True).encode()) != stated:
        raise DamagedFile(f"{file}: damaged: its content does not match its digest")
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise DamagedFile(
            f"{file}: format {manifest.get('format')} {manifest.get('version')}, expected {FORMAT} {VERSION}"
        )
    return manifest


def file_faults(folder: Path, files: dict[str, int]) -> Iterator[str]:
    """A line for each of `files` (name: bytes) that is not there in full length."""
    for name, size in files.items():
        actual = (folder / name).stat().st_size if (folder / name).is_file() else None
        if actual != size:
            found = "is missing" if actual is None else f"has {actual} bytes"
            yield f"{folder / name}: damaged: {found}, expected {size} bytes"


class Checkpoint:
    """One checkpoint: `step`, `meta` (what the trainer saved), and the tensors by canonical name."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.step: int = manifest["step"]
        self.meta: dict[str, Any] = manifest["meta"]
        self.shapes: dict[str, tuple[int, ...]] = {n: tuple(s) for n, s in manifest["parameters"].items()}
        self._fragments: dict[tuple[str, str], list[Fragment]] = {}
        for row in manifest["fragments"]:
            fragment = Fragment.from_json(row)
            self._fragments.setdefault((fragment.name, fragment.kind), []).append(fragment)

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Read and check the manifest, and that every file is there in full length. UserError names what is wrong."""
        manifest = read_manifest(path)
        for fault in file_faults(path, manifest["files"]):
            raise DamagedFile(fault)
        return cls(path, manifest)

    def kinds(self) -> dict[str, set[str]]:
        """For each parameter what is kept of it: master, and optimizer states such as exp_avg."""
        found: dict[str, set[str]] = {name: set() for name in self.shapes}
        for name, kind in self._fragments:
            found.setdefault(name, set()).add(kind)
        return found

    def read(
        self, name: str, kind: str = "master", box: Box | None = None, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Values [start, stop) of the flattened `box` (None: the whole parameter), float32, flat.

        Reads the blocks of 16 MiB that hold any of them, each once and verified: a box that cuts the columns of a
        matrix saves no reading from fragments that hold whole rows. UserError when there is no such parameter or no
        such part of it, DamagedFile when values of it are missing or do not match their digest.
        """
        if name not in self.shapes:
            raise UserError(f"{self.path}: holds no parameter {name}")
        shape = self.shapes[name]
        box = whole(shape) if box is None else box
        fits = len(box) == len(shape) and all(0 <= a <= b <= n for (a, b), n in zip(box, shape, strict=True))
        size = math.prod(box_shape(box))
        asked = Part(box, start, size if stop is None else stop)
        if not fits or not 0 <= asked.start <= asked.stop <= size:
            raise UserError(f"{self.path}: {name}, of shape {shape}, has no elements {start} to {asked.stop} of {box}")
        result = torch.empty(asked.stop - asked.start, dtype=torch.float32)
        areas = rectangles(asked)
        filled = 0
        for fragment in self._fragments.get((name, kind), []):
            near = common(areas, rectangles(fragment.part))
            parts = fragment.block_parts() if near else []
            needed = {i: found for i, part in enumerate(parts) if (found := common(near, rectangles(part)))}
            for i, values in read_blocks(self.path, fragment, needed):
                for rectangle in needed[i]:
                    view(result, asked, rectangle).copy_(view(values, parts[i], rectangle))
                    filled += math.prod(box_shape(rectangle))
        if filled != result.numel():
            raise DamagedFile(f"{self.path}: {name} ({kind}) is not complete: {filled} of {result.numel()} values")
        return result


def list_steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every committed checkpoint below a `checkpoints` folder, newest first."""
    found = []
    for path in folder.glob("step_*") if folder.is_dir() else []:
        number = path.name.removeprefix("step_")
        if path.is_dir() and number.isdigit():
            found.append((int(number), path))
    return sorted(found, reverse=True)


def newest_valid(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose manifest and file lengths are right, and one line for each newer one that was
    skipped.
    """
    skipped: list[str] = []
    for _, path in list_steps(folder):
        try:
            return Checkpoint.open(path), skipped
        except DamagedFile as error:
            skipped.append(str(error))
    return None, skipped


def resolve(path: str | Path) -> Checkpoint:
    """The checkpoint meant by a run folder (its newest valid one), a `checkpoints` folder or a checkpoint folder.

    Raises UserError when there is none.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if (path / MANIFEST).exists() or path.name.startswith("step_"):
        return Checkpoint.open(path)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    checkpoint, skipped = newest_valid(folder)
    if checkpoint is None:
        raise UserError(f"{path}: holds no checkpoint" if not skipped else skipped[0])
    return checkpoint
