"""A committed checkpoint folder, opened for reading by any number of ranks: manifest first, then only the blocks that
hold what is asked for. On which layout it was written makes no difference.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.boxes import Box, box_shape, whole
from llm.checkpoint.assemble import Wanted, fill
from llm.checkpoint.fragments import DTYPES, VERSION, FileRecord, Fragment, digest
from llm.checkpoint.intersect import Part
from llm.errors import DamagedFile, UserError
from llm.paths import hub_note
from llm.shipped import made_by

FORMAT = "lattice-checkpoint"
VERSIONS = (2, VERSION)
LARGEST_BLOCK = 16 << 20
FIELDS_OF_2 = {"block_bytes": LARGEST_BLOCK, "stripe": None}
"""What version 2 did not write, as it was the same for all fragments."""
MANIFEST = "manifest.json"
STEP_FOLDER = re.compile(r"step_([0-9]+)")
FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")  # so that none lies outside the folder


@dataclass(frozen=True)
class Manifest:
    """What stands in a manifest; `shapes` are those of the whole parameters, and files go by their names."""

    step: int
    version: int
    meta: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, FileRecord]
    fragments: list[Fragment]
    digest: str
    """Of all that stands in it, and so, as digests of values do, of all values."""


def seal(manifest: dict[str, Any]) -> bytes:
    """The manifest as written: canonical JSON with a digest of itself, so that an edited one is refused."""
    body = json.dumps(manifest, sort_keys=True)
    version = 2 if manifest.get("version") == 2 else VERSION
    return json.dumps({**manifest, "digest": digest(body.encode(), version)}, sort_keys=True).encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder. DamagedFile when it is missing, is not what was written, or is of another
    version.
    """
    file = folder / MANIFEST
    try:
        content = file.read_bytes()
        manifest: dict[str, Any] = json.loads(content)
        own_digest = str(manifest.pop("digest"))
    except OSError as error:
        raise DamagedFile(f"{file}: {error.strerror or error}") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise DamagedFile(f"{file}: damaged: not a checkpoint manifest") from None
    if seal(manifest) != content:  # so not even a blank may differ
        raise DamagedFile(f"{file}: damaged: its content does not match its digest")
    version = manifest.get("version")
    if manifest.get("format") != FORMAT or version not in VERSIONS:
        expected = f"{FORMAT} {' or '.join(map(str, VERSIONS))}"
        raise DamagedFile(f"{file}: format {manifest.get('format')} {version}, expected {expected}")
    unsaid = FIELDS_OF_2 if version == 2 else {}
    try:
        return Manifest(
            step=int(manifest["step"]),
            version=version,
            meta=dict(manifest["meta"]),
            shapes={name: tuple(int(n) for n in shape) for name, shape in manifest["parameters"].items()},
            files={name: FileRecord.from_json(entry) for name, entry in manifest["files"].items()},
            fragments=[Fragment.from_json({**unsaid, **row}) for row in manifest["fragments"]],
            digest=own_digest,
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DamagedFile(f"{file}: damaged: it has a digest, but not the fields of {FORMAT} {version}") from None


def folder_faults(folder: Path, manifest: Manifest) -> Iterator[str]:
    """A line, naming a file, where the folder is another step's, and for each file that is not there in full length."""
    named = STEP_FOLDER.fullmatch(folder.absolute().name)
    if named and int(named[1]) != manifest.step:
        yield f"{folder / MANIFEST}: damaged: this is step {manifest.step}, but the folder is named {named[0]}"
    for name, record in manifest.files.items():
        if not FILE_NAME.fullmatch(name):
            yield f"{folder / MANIFEST}: damaged: {name!r} is no name of a file in the folder"
        elif (found := _other_length(folder / name, record.bytes)) is not None:
            yield f"{folder / name}: damaged: {found}, expected {record.bytes} bytes"


def is_there(folder: Path, name: str) -> bool:
    """Whether a file that a manifest names is one, and lies in the folder."""
    return FILE_NAME.fullmatch(name) is not None and (folder / name).is_file()


def _other_length(path: Path, size: int) -> str | None:
    """What is there instead of a file of so many bytes; None when it is one."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not stat.S_ISREG(status.st_mode):
        return "is no file"
    return None if status.st_size == size else f"has {status.st_size} bytes"


def fragment_faults(folder: Path, manifest: Manifest) -> Iterator[str]:
    """A line for each fragment that cannot be looked up as the manifest describes it."""
    for fragment in manifest.fragments:
        if (fault := _fragment_fault(fragment, manifest)) is not None:
            yield f"{folder / MANIFEST}: {fragment.name} ({fragment.kind}) {fault}"


def _fragment_fault(fragment: Fragment, manifest: Manifest) -> str | None:
    if fragment.dtype not in DTYPES:
        return f"is {fragment.dtype}; known are {', '.join(DTYPES)}"
    if fragment.file not in manifest.files or not FILE_NAME.fullmatch(fragment.file):
        return f"lies in {fragment.file}, which is no file of the checkpoint"
    if not 0 < fragment.block_bytes <= LARGEST_BLOCK or fragment.block_bytes % DTYPES[fragment.dtype].itemsize:
        return f"has blocks of {fragment.block_bytes} bytes"
    if fragment.stripe is not None and not (0 <= fragment.stripe[0] < len(fragment.box) and fragment.stripe[1] > 0):
        return f"has stripes {fragment.stripe} of a box {fragment.box}"
    if fragment.n_blocks != len(fragment.blocks):
        return f"has {len(fragment.blocks)} digests for {fragment.n_blocks} blocks"
    record = manifest.files[fragment.file]
    if not record.header_bytes <= fragment.offset <= fragment.offset + fragment.bytes <= record.bytes:
        return f"lies outside {fragment.file}"
    sizes = manifest.shapes.get(fragment.name, tuple(stop for _, stop in fragment.box))
    fits = len(sizes) == len(fragment.box) and all(
        0 <= a <= b <= n for (a, b), n in zip(fragment.box, sizes, strict=True)
    )
    if not fits or not 0 <= fragment.start <= fragment.start + fragment.numel <= math.prod(box_shape(fragment.box)):
        return f"has elements {fragment.start} to {fragment.start + fragment.numel} of a box {fragment.box} of {sizes}"
    return None


class Checkpoint:
    """One checkpoint: `step`, `meta` (what the trainer saved), and the tensors by canonical name."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.step = manifest.step
        self.meta = manifest.meta
        self.shapes = manifest.shapes
        self.digest = manifest.digest
        self._files = manifest.files
        self._version = manifest.version
        self._known: set[str] = set()  # files whose header is the one that was written
        self._fragments: dict[tuple[str, str], list[Fragment]] = {}
        for fragment in manifest.fragments:
            self._fragments.setdefault((fragment.name, fragment.kind), []).append(fragment)

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Read and check the manifest, that the folder is of its step, and that every file is there in full length.

        DamagedFile names what is wrong. What the files hold is checked when it is read.
        """
        manifest = read_manifest(path)
        for fault in (*folder_faults(path, manifest), *fragment_faults(path, manifest)):
            raise DamagedFile(fault)
        return cls(path, manifest)

    def meta_with(self, *keys: str) -> dict[str, Any]:
        """`meta`, which has these keys: else DamagedFile naming the manifest."""
        for key in keys:
            if key not in self.meta:
                raise DamagedFile(f"{self.path / MANIFEST}: damaged: it does not say meta.{key}")
        return self.meta

    def dtype(self, kind: str = "master") -> str:
        """In which values of a kind are kept."""
        return next(rows[0].dtype for (_, of), rows in self._fragments.items() if of == kind and rows)

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

        Errors and what is read: as of `fill`.
        """
        if name not in self.shapes:
            raise UserError(f"{self.path}: holds no parameter {name}")
        box = whole(self.shapes[name]) if box is None else box
        stop = math.prod(box_shape(box)) if stop is None else stop
        result = torch.empty(max(0, stop - start), dtype=torch.float32)
        self.fill([(name, kind, box, start, stop, result)])
        return result

    def fill(self, places: Iterable[tuple[str, str, Box, int, int, Tensor]]) -> None:
        """Fill flat tensors, each with the values [start, stop) of the flattened box of a parameter in a kind: rows of
        (name, kind, box, start, stop, tensor).

        Reads the blocks that hold any of them, each once and verified. UserError when there is no such parameter or no
        such part of it, DamagedFile when values of it are missing or do not match their digest: tensors may then hold
        anything.
        """
        rows = list(places)
        wanted = []
        for name, kind, box, start, stop, out in rows:
            if name not in self.shapes:
                raise UserError(f"{self.path}: holds no parameter {name}")
            shape = self.shapes[name]
            fits = len(box) == len(shape) and all(0 <= a <= b <= n for (a, b), n in zip(box, shape, strict=True))
            if not fits or not 0 <= start <= stop <= math.prod(box_shape(box)):
                raise UserError(f"{self.path}: {name}, of shape {shape}, has no elements {start} to {stop} of {box}")
            assert out.shape == (stop - start,)
            wanted.append(Wanted(self._fragments.get((name, kind), []), Part(box, start, stop), out))
        found = fill(self.path, self._files, self._known, self._version, wanted)
        for (name, kind, _, start, stop, _), filled in zip(rows, found, strict=True):
            if filled != stop - start:
                raise DamagedFile(
                    f"{self.path}: {name} ({kind}) is not complete: {filled} of {stop - start} values"
                )


def list_steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything that has the name of a checkpoint below a `checkpoints` folder, newest first."""
    named = [(STEP_FOLDER.fullmatch(path.name), path) for path in folder.glob("step_*")]
    return sorted(((int(name[1]), path) for name, path in named if name), reverse=True)


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
    """The checkpoint meant by a run folder (its newest one), a `checkpoints` folder or a checkpoint folder.

    UserError when there is none. DamagedFile when the newest is damaged: only an automatic resume goes back by itself.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder{made_by(path) or hub_note(path)}")
    if os.path.lexists(path / MANIFEST) or path.name.startswith("step_"):
        return Checkpoint.open(path)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    checkpoint, skipped = newest_valid(folder)
    if skipped:
        other = "" if checkpoint is None else f"; the newest that is not is {checkpoint.path}"
        raise DamagedFile(f"{skipped[0]}{other}")
    if checkpoint is None:
        raise UserError(f"{path}: holds no checkpoint")
    return checkpoint
