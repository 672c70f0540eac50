"""Model folders of ours: weights in the form of a checkpoint, without the state of a training, beside the tokenizer.

What a run resumes from and what is imported are so read by the same code, verified block by block, on any layout.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm.args import ModelArgs
from llm.boxes import Box, runs, whole
from llm.checkpoint.fragments import BLOCK_BYTES, DTYPES, VERSION, outline_file, write_values
from llm.checkpoint.pretrained import save_tokenizer
from llm.checkpoint.reader import FORMAT, MANIFEST, Checkpoint, seal
from llm.errors import UserError
from llm.foreign.export import Weights, check_range, new_target
from llm.foreign.load import view
from llm.parameters import ParameterTable
from llm.tokenizer import Tokenizer
from llm.tokenizers.export import export_tokenizer, exported_as_it_came
from llm.tokenizers.folder import FolderTokenizer

FILE_BYTES = 8 << 30
"""About how large a file of weights becomes."""
KEPT = "original"
"""Folder of files that came with a foreign model and that an export gives back."""


class OfModule:
    """Weights of a model in memory."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters())

    def read(self, name: str, box: Box, out: Tensor) -> Tensor:
        return out.copy_(view(self._parameters[name].detach(), box))


class OfCheckpoint:
    """Weights of a checkpoint or model folder, or their moving average. Reading in order reads each block once."""

    def __init__(self, checkpoint: Checkpoint, average: bool = False) -> None:
        self.checkpoint = checkpoint
        self._kind = "ema" if average else "master"
        if average and not all("ema" in kinds for kinds in checkpoint.kinds().values()):
            raise UserError(f"{checkpoint.path}: holds no averaged weights; the run had no optim.ema_decay")

        self._block: tuple[str, int, Tensor] = ("", 0, torch.empty(0))
        """(parameter, first element, values), the last that was read."""

    def read(self, name: str, box: Box, out: Tensor) -> Tensor:
        shape = self.checkpoint.shapes.get(name, ())
        at, _, length = next(runs(shape, box, 0, out.numel()), (0, 0, 0)) if len(shape) == len(box) else (0, 0, 0)
        if not out.is_contiguous():
            return out.copy_(self.read(name, box, torch.empty(out.shape, dtype=self.dtype())))
        rest = out.view(-1)
        if length < len(rest):
            self._fill(name, box, 0, rest)
            return out
        size, step = prod(shape), BLOCK_BYTES // self.dtype().itemsize
        while len(rest):
            n = len(rest) if at + len(rest) == size else len(rest) // step * step
            if at % step == 0 and n:  # whole blocks go straight to where they belong
                self._fill(name, whole(shape), at, rest[:n])
            else:
                values = self._from(name, at, size)[: len(rest)]
                n = len(values)
                rest[:n].copy_(values)
            rest, at = rest[n:], at + n
        return out

    def _from(self, name: str, at: int, size: int) -> Tensor:
        """The values of a parameter from element `at` on, as many as a block holds."""
        of, first, values = self._block
        if of != name or not first <= at < first + len(values):
            step = BLOCK_BYTES // self.dtype().itemsize
            first = at // step * step
            self._block = "", 0, torch.empty(0)  # so that there are not two
            values = torch.empty(min(step, size - first), dtype=self.dtype())
            self._fill(name, whole(self.checkpoint.shapes[name]), first, values)
            self._block = name, first, values
        return values[at - first :]

    def _fill(self, name: str, box: Box, start: int, out: Tensor) -> None:
        """Values of the flattened box from `start` on."""
        self.checkpoint.fill([(name, self._kind, box, start, start + len(out), out)])

    def dtype(self) -> torch.dtype:
        """In which the weights are kept."""
        return DTYPES[self.checkpoint.dtype(self._kind)]


def write_native(
    target: Path,
    args: ModelArgs,
    weights: Weights,
    *,
    dtype: torch.dtype = torch.float32,
    source: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    keep: Mapping[str, Path] | None = None,
    tell: Callable[[int], object] = lambda _: None,
) -> None:
    """Write the model folder `target`, whole or not at all, one parameter in memory at a time.

    source: where the weights are from, kept in the manifest. keep: files to keep under their names. `tell` is told the
    bytes of each parameter written. UserError when `target` exists or a value is beyond `dtype`.
    """
    shapes = ParameterTable.of(args).shapes
    name = str(dtype).removeprefix("torch.")
    with new_target(target) as folder:
        files: dict[str, Any] = {}
        fragments = []
        for i, names in enumerate(_parts(shapes, dtype.itemsize)):
            owned = [(n, "master", whole(shapes[n]), 0, torch.empty(shapes[n], device="meta")) for n in names]
            outline = outline_file(f"weights_{i:05d}.safetensors", owned, name)
            fragments += write_values(folder / outline.name, outline, _values(names, shapes, weights, dtype, tell))
            files[outline.name] = outline.record.to_json()
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "step": 0,
            "parameters": {n: list(shape) for n, shape in shapes.items()},
            "files": files,
            "fragments": [fragment.to_json() for fragment in fragments],
            "meta": {
                "config": {"model": args.model_dump(mode="json")},
                "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
                "source": dict(source or {}),
            },
        }
        (folder / MANIFEST).write_bytes(seal(manifest))
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
        for file, path in (keep or {}).items():
            (folder / KEPT).mkdir(exist_ok=True)
            (folder / KEPT / file).write_bytes(path.read_bytes())


def _parts(shapes: Mapping[str, tuple[int, ...]], itemsize: int) -> Iterator[list[str]]:
    names: list[str] = []
    filled = 0
    for name, shape in shapes.items():
        names.append(name)
        filled += torch.Size(shape).numel() * itemsize
        if filled >= FILE_BYTES:
            yield names
            names, filled = [], 0
    if names:
        yield names


def _values(
    names: list[str],
    shapes: Mapping[str, tuple[int, ...]],
    weights: Weights,
    dtype: torch.dtype,
    tell: Callable[[int], object],
) -> Iterator[Tensor]:
    sizes = {name: torch.Size(shapes[name]).numel() for name in names}
    buffer = torch.empty(max(sizes.values()), dtype=dtype)  # a new tensor each time would be there beside the last one
    for name in names:
        values, box = buffer[: sizes[name]], whole(shapes[name])
        weights.read(name, box, values.view(shapes[name]))
        if dtype == torch.float16 and values.isinf().any():  # seldom, so they are read again, as they are
            check_range(name, weights.read(name, box, torch.empty(shapes[name])).view(-1), values)
        tell(values.nbytes)
        yield values


@dataclass
class Extra:
    """What goes with weights into a foreign folder."""

    files: dict[str, bytes | Path] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def kept_files(checkpoint: Checkpoint, tokenizer: Tokenizer | None, family: str | None) -> Extra:
    """Files that came with the model, and its tokenizer in the form that others read.

    family: as which family of Hugging Face's format it is written, whose tokenizer files are then such that
    AutoTokenizer gives this tokenizer's ids; None for Meta's format, which gets the tokenizer's own file.
    """
    found = Extra()
    kept = checkpoint.path / KEPT
    if kept.is_dir():
        found.files = {file.name: file for file in sorted(kept.iterdir()) if file.is_file()}
    if tokenizer is None:
        if not any(name.startswith("tokenizer") for name in found.files):
            found.notes.append("written without a tokenizer, as there is none")
        return found
    ends = list(tokenizer.end_ids)
    found.config = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends if len(ends) > 1 else ends[0]}
    if family is not None and not exported_as_it_came(tokenizer, found.files, family):
        try:
            export = export_tokenizer(tokenizer)
        except UserError as error:
            found.notes.append(f"written without a tokenizer that transformers reads: {error}")
        else:
            for name in (
                "tokenizer_config.json",
                "special_tokens_map.json",
                "added_tokens.json",
                "vocab.json",
                "merges.txt",
            ):
                found.files.pop(name, None)
            generation = found.files.get("generation_config.json")
            found.files |= export.files
            if generation is not None:
                found.files["generation_config.json"] = generation
            found.config, found.notes = export.config, [*found.notes, *export.notes]
    found.files.setdefault("generation_config.json", _json(found.config))
    if not any(name.startswith("tokenizer.") for name in found.files) or tokenizer.kind == "sentencepiece":
        found.files |= {name: content for name, content in own_files(tokenizer).items() if name not in found.files}
    return found


def own_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The tokenizer's own file, tokenizer.model for SentencePiece and tiktoken, for those that read no tokenizer.json;
    none for kinds that nobody else knows."""
    inner = tokenizer.inner if isinstance(tokenizer, FolderTokenizer) else tokenizer
    with tempfile.TemporaryDirectory() as folder:
        config = inner.save(Path(folder))
        if config.path is None:
            return {}
        return {config.path: (Path(folder) / config.path).read_bytes()}


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"
