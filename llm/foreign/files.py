"""Foreign model folders: what they are, and their tensors, read as they are asked for.

Hugging Face: config.json beside model.safetensors, or its parts and their index, or the same as .bin files. Meta:
params.json beside consolidated.NN.pth. Which of the files are read is llm/foreign/weight_files.py's.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.args import ModelArgs
from llm.checkpoint.reader import FORMAT, MANIFEST
from llm.errors import UserError
from llm.foreign import processor
from llm.foreign.configs import about_config, explained, family_of, model_args, refuse_other_inputs, refuse_quantised
from llm.foreign.family import Family, Match, family_named, match
from llm.foreign.load import ForeignWeights
from llm.foreign.stored import Stored, StoredComputed
from llm.foreign.transforms import BoxPair, Shape
from llm.foreign.weight_files import WeightFiles, hugging_face_files, meta_files, read_json
from llm.parameters import ParameterTable
from llm.paths import hub_note
from llm.safetensors_file import DTYPES

LLAMA4_KEYS = {"moe_args", "use_qk_norm", "nope_layer_interval", "attention_chunk_size", "attn_temperature_tuning"}
"""Of Meta's params.json, which does not name its family; they matter to no earlier one."""
Key = tuple[int, str]


class Files:
    """The tensors of one or several files that make up a model, by (shard, key)."""

    def __init__(self, name: str, files: Mapping[Key, Stored]) -> None:
        self.name = name
        self._files = files

    def shapes(self) -> dict[Key, Shape]:
        return {(shard, key): file.shapes()[key] for (shard, key), file in self._files.items()}

    def dtypes(self) -> Counter[torch.dtype]:
        """How many tensors are of each dtype."""
        found = (file.dtype(key) for (_, key), file in self._files.items())
        return Counter(dtype for dtype in found if dtype is not None)

    def dtype(self) -> torch.dtype:
        """The dtype of most tensors."""
        return self.dtypes().most_common(1)[0][0]

    def read(self, pair: BoxPair, out: Tensor) -> None:
        self._files[pair.shard, pair.key].read(pair, out)

    def only(self, keys: set[Key]) -> "Files":
        """These tensors alone. UserError where one is of a dtype that is not read."""
        for shard, key in sorted(keys & self._files.keys()):
            file = self._files[shard, key]
            if file.dtype(key) is None:
                raise UserError(f"{file.path}: {key} is {file.described(key)[0]}; known are {', '.join(DTYPES)}")
        return Files(self.name, {key: file for key, file in self._files.items() if key in keys})

    def paths(self) -> list[Path]:
        """The files that hold them."""
        return sorted({file.path for file in self._files.values()})

    def nbytes(self, keys: set[Key]) -> int:
        """Bytes of some tensors, be they of a dtype that is read or not."""
        return sum(self._files[shard, key].described(key)[1] for shard, key in keys)


@dataclass(frozen=True)
class ForeignModel:
    """A foreign folder, understood: its tensors are there and known, none of their values has been read."""

    path: Path
    family: Family
    args: ModelArgs
    config: dict[str, Any]
    found: Match
    files: Files
    """The tensors that the model is made of."""
    warnings: tuple[str, ...] = field(default=())
    """Lines about what the folder leaves open or says twice, and what of it was taken."""
    dropped: tuple[str, ...] = field(default=())
    """Names of tensors that no model needs."""

    def weights(self) -> ForeignWeights:
        return ForeignWeights(self.files, self.found)


def is_foreign(path: Path) -> bool:
    """Whether a folder looks like one of another system. A model folder of ours may have a config.json for others."""
    looks = (path / "config.json").is_file() or (path / "params.json").is_file()
    return looks and not _is_ours(path / MANIFEST)


def _is_ours(manifest: Path) -> bool:
    return manifest.is_file() and f'"format": "{FORMAT}"'.encode() in manifest.read_bytes()


def open_foreign(
    path: Path,
    family: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    text_only: bool = False,
) -> ForeignModel:
    """The model in a folder; `overrides` are keys of ModelArgs that hold instead of what its config says.

    text_only: take the text model of a multimodal one. UserError, naming file and key, when it is of no known family,
    or config and tensors do not fit together, or it reads more than text and that is not asked for.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder{hub_note(path)}")
    notes: list[str] = []
    if (path / "config.json").is_file():
        file = path / "config.json"
        config = read_json(file)
        refuse_quantised(config, file)
        chosen = family_named(family) if family else family_of(config, file)
        refuse_other_inputs(chosen, config, file)
        notes += about_config(chosen, config)
        found_files = hugging_face_files(path, config)
        chosen, said = _of_base_model(chosen, found_files)
        notes += said
    elif (path / "params.json").is_file():
        config = read_json(path / "params.json")
        found_files = meta_files(path)
        fused = any(key.endswith(("wqkv.weight", "router_DE")) for key in found_files.shards[0])
        chosen = family_named(family or ("meta_llama4" if fused or config.keys() & LLAMA4_KEYS else "meta_llama"))
    else:
        raise UserError(f"{path}: holds neither config.json nor params.json")
    notes += found_files.notes
    shards = [_with_computed(chosen, shard) for shard in found_files.shards]
    notes += _about_computed(chosen, found_files.shards[0])
    files = Files(str(path), {(i, key): file for i, shard in enumerate(shards) for key, file in shard.items()})
    shapes = files.shapes()
    with explained(chosen, path / ("params.json" if chosen.format == "meta" else "config.json")):
        read = chosen.read_config(config, notes.append)
        if chosen.format == "meta":
            read |= _settled_by_weights(read, shapes, len(shards))
    notes += _settle_tower(chosen, config, read, files, path, text_only)
    if read.get("vision") is not None:
        given = (overrides or {}).get("vision")
        notes += processor.settle(read["vision"], path, read["vocab_size"], given if isinstance(given, dict) else {})
    args = model_args(path, {**read, **_merged(read, overrides or {})})
    found = match(chosen, args, ParameterTable.of(args).shapes, shapes, len(shards))
    used = {(pair.shard, pair.key) for pair in found.pairs}
    own = files.only(used)
    said, nobodys = found_files.spare({key for _, key in used} | set(found.missing), found.unknown)
    notes += said
    found = replace(found, unknown=tuple(key for key in found.unknown if key not in nobodys))
    found.check(str(path))
    if chosen.format == "hf":
        notes += _about_dtype(config, own)
    dropped = sorted({key for shard, key in shapes.keys() - used})
    return ForeignModel(path, chosen, args, config, found, own, tuple(notes), tuple(dropped))


def _of_base_model(family: Family, files: WeightFiles) -> tuple[Family, list[str]]:
    """The family with names as a model without its head writes them, where these are such; and a line that says so."""
    tables = [entry.theirs for entry in family.rows if entry.ours == ("tok_embeddings.weight",) and not entry.twin]
    keys = files.shards[0].keys()
    for table in tables:  # one for each spelling
        prefix = f"{table.partition('.')[0]}."
        if not keys & set(tables) and table.removeprefix(prefix) in keys:
            rows = tuple(replace(entry, theirs=entry.theirs.removeprefix(prefix)) for entry in family.rows)
            lacking = f"names of tensors lack {prefix!r}, as of a model saved without its head"
            return replace(family, rows=rows), [lacking]
    return family, []


def _with_computed(family: Family, shard: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors of one file, what the family computes in place of what it is computed from."""
    found = dict(shard)
    for computed in family.computed:
        if computed.source in found:
            found[computed.name] = StoredComputed(found.pop(computed.source), computed)
    return found


def _about_computed(family: Family, shard: Mapping[str, Stored]) -> Iterator[str]:
    """A line for each tensor that is computed from an older one."""
    for computed in family.computed:
        if computed.source in shard:
            both = f"; that there is {computed.name} too is passed over" if computed.name in shard else ""
            yield f"{computed.source} is resampled as Meta's own code does it{both}"


def _settle_tower(
    family: Family, config: Mapping[str, Any], read: dict[str, Any], files: Files, path: Path, text_only: bool
) -> Iterator[str]:
    """Take `vision` out of what a config says where the tower is not there, or is not asked for; lines that say so.
    UserError where there is one of which the config says nothing."""
    tower = {(shard, key) for shard, key in files.shapes() if family.of_tower(key)}
    if not tower:
        if read.pop("vision", None) is not None or config.get("vision_config"):
            yield "its config describes a vision tower, but there are no weights of one: it is the text model alone"
        return
    prefixes = " and ".join(dict.fromkeys(key.partition(".")[0] for _, key in sorted(tower)))
    said = f"{len(tower)} tensors of {prefixes}, {files.nbytes(tower) / 1e9:.3g} GB"
    if text_only:
        read.pop("vision", None)
        yield f"text_only: {said}, are left out; images cannot be read"
    elif read.get("vision") is None:
        where = "params.json: vision_args" if family.format == "meta" else "config.json: vision_config"
        why = f"{path / where} is missing, and there are {said}"
        if config.get("vision_config"):
            why = f"{path}: the vision tower of {family.name} is not read: {said}, would be lost"
        raise UserError(f"{why}; the text model alone is taken by lattice convert import {path} DST --text_only")


def _about_dtype(config: Mapping[str, Any], files: Files) -> Iterator[str]:
    """A line where the config gives the weights another dtype than the files do."""
    text = config.get("text_config")
    holders = (config, text if isinstance(text, dict) else {})
    said = next((h[key] for h in holders for key in ("dtype", "torch_dtype") if isinstance(h.get(key), str)), None)
    held = str(files.dtype()).removeprefix("torch.") if files.dtypes() else said
    if said not in (None, "auto", held):
        yield f"config.json: dtype {said}, but the files hold {held}, which is kept"


def _merged(read: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Groups are overridden key by key."""
    return {
        key: {**read[key], **value} if isinstance(value, dict) and isinstance(read.get(key), dict) else value
        for key, value in overrides.items()
    }


def _settled_by_weights(read: Mapping[str, Any], shapes: Mapping[Key, Shape], shards: int) -> dict[str, Any]:
    """What Meta's params.json leaves to the weights: vocabulary, tied heads, number of experts."""
    found: dict[str, Any] = {}
    table = shapes.get((0, "tok_embeddings.weight"))
    if table is not None and len(table) == 2 and read.get("vocab_size", -1) == -1:
        found["vocab_size"] = table[0] * (shards if table[1] == read["dim"] else 1)
    if (0, "output.weight") not in shapes:
        found["tie_embeddings"] = True
    moe = read.get("moe")
    if moe is not None and moe["n_experts"] < 1:
        routers = [shape for (_, key), shape in shapes.items() if key.endswith("router_DE")]
        if routers:
            found["moe"] = {**moe, "n_experts": routers[0][-1]}
    return found
