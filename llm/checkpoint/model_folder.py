"""Model folders of ours: weights in the form of a checkpoint, without the state of a training, beside the tokenizer.

What a run resumes from and what is imported are so read by the same code, verified block by block, on any layout.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.args import ModelArgs
from llm.atomic import new_directory
from llm.boxes import whole
from llm.checkpoint.fragments import VERSION, outline_file, write_values
from llm.checkpoint.reader import FORMAT, MANIFEST, seal
from llm.checkpoint.run_folder import save_template, save_tokenizer
from llm.checkpoint.weights import Weights, check_range
from llm.parameters import ParameterTable
from llm.paths import check_free
from llm.tokenizer import Tokenizer

FILE_BYTES = 8 << 30
"""About how large a file of weights becomes."""
KEPT = "original"
"""Folder of files that came with a foreign model and that an export gives back."""


def write_model_folder(
    target: Path,
    args: ModelArgs,
    weights: Weights,
    *,
    dtype: torch.dtype = torch.float32,
    source: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    template: str | None = None,
    keep: Mapping[str, Path] | None = None,
    notify: Callable[[int], object] = lambda _: None,
) -> None:
    """Write the model folder `target`, whole or not at all, one parameter in memory at a time.

    source: where the weights are from, kept in the manifest. template: the text of the chat template that goes with the
    tokenizer. keep: files to keep under their names. `notify` gets the bytes of each parameter written. UserError when
    `target` exists or a value is beyond `dtype`.
    """
    shapes = ParameterTable.of(args).shapes
    name = str(dtype).removeprefix("torch.")
    check_free(target)
    with new_directory(target) as folder:
        files: dict[str, Any] = {}
        fragments = []
        for i, names in enumerate(_parts(shapes, dtype.itemsize)):
            owned = [(n, "master", whole(shapes[n]), 0, torch.empty(shapes[n], device="meta")) for n in names]
            outline = outline_file(f"weights_{i:05d}.safetensors", owned, name)
            fragments += write_values(folder / outline.name, outline, _values(names, shapes, weights, dtype, notify))
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
            if template is not None:
                save_template(template, folder)
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
    notify: Callable[[int], object],
) -> Iterator[Tensor]:
    sizes = {name: torch.Size(shapes[name]).numel() for name in names}
    buffer = torch.empty(max(sizes.values()), dtype=dtype)  # a new tensor each time would be there beside the last one
    for name in names:
        values, box = buffer[: sizes[name]], whole(shapes[name])
        weights.read(name, box, values.view(shapes[name]))
        if dtype == torch.float16 and values.isinf().any():  # seldom, so they are read again, as they are
            check_range(name, weights.read(name, box, torch.empty(shapes[name])).view(-1), values)
        notify(values.nbytes)
        yield values
