"""A family of foreign models as a table: which of its tensors hold which of our parameters, and how its config says
what ModelArgs say.

Adding a family is adding one file to llm/foreign/families, or calling `register` from an extension. In a table `{i}`
stands for a layer, `{j}` for one of the vision tower, `{k}` for one of the encoder, and `{e}` for an expert; rows whose
parameters a model does not have do not count for it, and of several rows for the same parameter the first one holds
whose tensors are there. What a family must do beside that is done by the knobs of ModelArgs.
"""

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from typing import Any

from torch import Tensor

from llm.args import LayerSpec, ModelArgs
from llm.boxes import box_shape, share_of, whole
from llm.errors import UserError
from llm.foreign.transforms import TRANSFORMS, BoxPair, FilePart, Shape, Transform, foreign_shapes
from llm.parameters import ParameterTable

Warn = Callable[[str], None]
SHOWN = 4
"""Names of each kind that a message lists."""
DROP = (
    r"(.*\.)?rope\.freqs", r"(.*\.)?freqs_cis", r"(.*\.)?rotary_emb\.(inv_freq|(cos|sin)_cached)",
    r"(.*\.)?_extra_state", r"(.*\.)?position_ids", r"(.*\.)?attention\.(masked_bias|bias)",
    r".*\.self_attn\.(masked_bias|bias)", r".*\.(global|running)_gate_stats_3E", r".*\.expert_activation_DE",
)  # fmt: skip
"""Buffers that public checkpoints carry and no model needs: tables of positions, causal masks, counts. They are passed
over by name, whatever their dtype."""


@dataclass(frozen=True)
class Row:
    """Foreign tensors, and the parameters of ours that they hold."""

    theirs: str
    ours: tuple[str, ...]
    transform: Transform = "same"
    bias: bool = False
    """Whether the row holds for the biases of the same modules too, if there are any."""
    cut: int | None = None
    """The dimension that several files cut, where it is not the one that ours are cut at."""
    ffn: str = ""
    """The feed-forward (dense, moe) of the layers that are written so; empty = of all layers. Read it is anywhere."""
    mixer: str = ""
    """The same of their mixer (attn, ssm)."""
    twin: bool = False
    """Whether it holds once more what another row holds, where it is there: the same values. It is not written."""

    def of_layer(self, spec: LayerSpec) -> bool:
        """Whether a layer like this is written so."""
        return self.ffn in ("", spec.ffn) and self.mixer in ("", spec.mixer.name)


def row(
    theirs: str,
    *ours: str,
    transform: Transform = "same",
    bias: bool = False,
    cut: int | None = None,
    ffn: str = "",
    twin: bool = False,
) -> Row:
    """A row of a table."""
    return Row(theirs, ours, transform, bias, cut, ffn, twin=twin)


@dataclass(frozen=True)
class Computed:
    """A foreign tensor that is computed from another one, which older files have in its place."""

    name: str
    """Of the tensor of the table."""
    source: str
    """Of the tensor that files have. It holds where they have both."""
    compute: Callable[[Tensor], Tensor]
    """From source to name, of the same shape and in float32."""


@dataclass(frozen=True)
class Family:
    """One family of foreign checkpoints."""

    name: str
    """Also `model_type` of a Hugging Face config."""
    rows: tuple[Row, ...]
    read_config: Callable[[Mapping[str, Any], Warn], dict[str, Any]]
    """What its config says, as keys of ModelArgs. UserError naming a key that cannot be honoured; what is resolved
    against another statement of the config is reported."""
    write_config: Callable[[ModelArgs], dict[str, Any]] | None = None
    """The other way; UserError naming a key of ModelArgs that the family cannot express. None = no export."""
    containers: Mapping[str, str] = field(default_factory=dict)
    """What stands before the names of a block, an attention and a feed-forward: ours -> theirs."""
    drop: tuple[str, ...] = DROP
    tower: tuple[str, ...] = ()
    """Patterns of the names of what a multimodal model has beside its text model."""
    needs_tower: bool = False
    """Whether what is written must have the tower."""
    computed: tuple[Computed, ...] = ()
    zeros: tuple[str, ...] = ()
    """Names of tensors that no model of ours has, and that must be 0."""
    format: str = "hf"
    """hf or meta: how its files are laid out."""
    silent: tuple[str, ...] = ()
    """Keys of its config that are not always read, as they say nothing then, or never do of what a model computes."""
    architecture: str = ""
    """What Hugging Face calls the class of its language models."""

    def dropped(self, key: str, args: ModelArgs) -> bool:
        """Whether a foreign tensor is one that a model with these args does not need: one of the tower, where that is
        left out, or a buffer that no model needs."""
        without_tower = args.vision is None and self.of_tower(key)
        return without_tower or key in self.zeros or any(re.fullmatch(pattern, key) for pattern in self.drop)

    def of_tower(self, key: str) -> bool:
        """Whether a foreign tensor belongs to what reads other than text."""
        return any(re.fullmatch(pattern, key) for pattern in self.tower)

    def expanded(self) -> Iterator[Row]:
        """The rows, those of biases written out."""
        for entry in self.rows:
            yield entry
            if entry.bias:
                ours = tuple(f"{name.removesuffix('.weight')}.bias" for name in entry.ours)
                yield replace(entry, theirs=f"{entry.theirs.removesuffix('.weight')}.bias", ours=ours, bias=False)


@dataclass(frozen=True)
class Match:
    """Pairs that fill a model from foreign tensors, and what does not fit."""

    family: Family
    pairs: tuple[BoxPair, ...]
    missing: tuple[str, ...]
    """Foreign tensors, or parameters of ours, that are not there."""
    unknown: tuple[str, ...]
    """Foreign tensors that no row knows."""
    misshapen: tuple[str, ...]
    """Lines about foreign tensors of another shape than expected."""
    unnamed: int = 0
    """How many parameters of ours the family has no name for."""
    alike: tuple[str, ...] = ()
    """Names of other families that fit as this one does, where no config says which is meant."""

    @property
    def whole(self) -> bool:
        return not (self.missing or self.unknown or self.misshapen)

    def check(self, source: str) -> None:
        """UserError on one line unless all fits."""
        faults = [f"misses {_some(self.missing)}"] if self.missing else []
        faults += [f"has {_some(self.unknown)}, which the family does not know"] if self.unknown else []
        faults += [_some(self.misshapen)] if self.misshapen else []
        if faults:
            names = " or ".join((self.family.name, *self.alike))
            raise UserError(f"{source}: not the weights of this {names} model: it {'; it '.join(faults)}")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def match(
    family: Family,
    args: ModelArgs,
    ours: Mapping[str, Shape],
    theirs: Mapping[tuple[int, str], Shape],
    shards: int = 1,
) -> Match:
    """How foreign tensors, by (shard, key), fill parameters of ours by canonical name."""
    pairs: list[BoxPair] = []
    table = ParameterTable.of(args)
    filled: set[str] = set()
    used: set[tuple[int, str]] = set()
    incomplete: dict[str, str] = {}
    for entry, layer in _instances(family, args):
        names = [name.format(i=layer, j=layer, k=layer) for name in entry.ours]
        tied = names == ["output.weight"] and "output.weight" not in ours
        twin = tied or entry.twin  # of a tied table, if it is there
        names = ["tok_embeddings.weight"] if tied else names
        if any(name not in ours for name in names) or (not twin and filled & set(names)):
            continue
        keys = _keys(entry, layer, args)
        present = [key for key in keys if (0, key) in theirs]
        if len(present) < len(keys):
            if not twin:
                absent = next(key for key in keys if key not in present)
                incomplete.update({name: absent for name in names if name not in incomplete or present})
            continue
        found = _cut(entry, keys, names, args, table, ours, theirs, shards, twin)
        pairs += found
        used |= {(pair.shard, pair.key) for pair in found}
        filled |= set(names)
    missing = [incomplete.get(name, name) for name in ours if name not in filled]
    held = dict.fromkeys(filled, 0)
    for pair in pairs:
        held[pair.name] += 0 if pair.twin else prod(box_shape(pair.mine))
    missing += [f"parts of {name}" for name in ours if name in filled and held[name] != prod(ours[name])]
    missing += [f"{key} of part {shard}" for shard, key in sorted(used - theirs.keys())]
    unknown = sorted({key for shard, key in theirs.keys() - used if not family.dropped(key, args)})
    expected = foreign_shapes(pairs)
    misshapen = [
        f"has {key} of shape {theirs[shard, key]}, not {shape}"
        for (shard, key), shape in expected.items()
        if (shard, key) in theirs and theirs[shard, key] != shape
    ]
    unnamed = sum(name not in filled and name not in incomplete for name in ours)
    return Match(family, tuple(pairs), tuple(dict.fromkeys(missing)), tuple(unknown), tuple(misshapen), unnamed)


def export_pairs(family: Family, args: ModelArgs, ours: Mapping[str, Shape], shards: int = 1) -> tuple[BoxPair, ...]:
    """Pairs by which the family's own first spelling is written. UserError where it has no place for a parameter."""
    pairs: list[BoxPair] = []
    table = ParameterTable.of(args)
    filled: set[str] = set()
    specs = args.layer_specs()
    for entry, layer in _instances(family, args):
        names = [name.format(i=layer, j=layer, k=layer) for name in entry.ours]
        if entry.twin or any(name not in ours for name in names) or filled & set(names):
            continue
        if (entry.ffn or entry.mixer) and not entry.of_layer(specs[layer]):
            continue
        pairs += _cut(entry, _keys(entry, layer, args), names, args, table, ours, {}, shards, False)
        filled |= set(names)
    if left := [name for name in ours if name not in filled]:
        raise UserError(f"a {family.name} checkpoint has no place for {_some(left)}")
    return tuple(pairs)


def spellings(family: Family, args: ModelArgs) -> Iterator[tuple[BoxPair, ...]]:
    """Pairs of each row that holds parameters of the model, in the table's order. Several may hold the same ones; that
    of the names in memory is the last."""
    table = ParameterTable.of(args)
    ours, specs = table.shapes, args.layer_specs()
    for entry, layer in _instances(family, args):
        if entry.mixer and entry.mixer != specs[layer].mixer.name:
            continue
        names = [name.format(i=layer, j=layer, k=layer) for name in entry.ours]
        tied = names == ["output.weight"] and "output.weight" not in ours
        twin = tied or entry.twin
        names = ["tok_embeddings.weight"] if tied else names
        if all(name in ours for name in names):
            yield tuple(_cut(entry, _keys(entry, layer, args), names, args, table, ours, {}, 1, twin))


def _instances(family: Family, args: ModelArgs) -> Iterator[tuple[Row, int]]:
    """Rows of the model as a whole, then those of each layer, of the vision tower and of the encoder."""
    rows = list(family.expanded())
    layers = {
        "{i}": args.n_layers,
        "{j}": args.vision.n_layers if args.vision is not None else 0,
        "{k}": args.encoder_layers,
    }
    yield from ((entry, 0) for entry in rows if not any(mark in entry.theirs for mark in layers))
    for mark, n_layers in layers.items():
        for layer in range(n_layers):
            yield from ((entry, layer) for entry in rows if mark in entry.theirs)


def _keys(entry: Row, layer: int, args: ModelArgs) -> list[str]:
    experts = range(args.moe.n_experts if args.moe is not None else 0) if "{e}" in entry.theirs else (0,)
    return [entry.theirs.format(i=layer, j=layer, k=layer, e=expert) for expert in experts]


def own_names(family: Family, args: ModelArgs) -> set[str]:
    """Names of foreign tensors that ours do not have, be they enough to fill a parameter or not."""
    entries = list(_instances(family, args))
    ours = {name.format(i=layer, j=layer, k=layer) for entry, layer in entries for name in entry.ours}
    return {key for entry, layer in entries for key in _keys(entry, layer, args)} - ours


def _cut(
    entry: Row,
    keys: list[str],
    names: list[str],
    args: ModelArgs,
    table: ParameterTable,
    ours: Mapping[str, Shape],
    theirs: Mapping[tuple[int, str], Shape],
    shards: int,
    twin: bool,
) -> list[BoxPair]:
    found: list[BoxPair] = []
    for shard in range(shards):
        their = theirs.get((shard, keys[0]))
        parts = [_part(args, table, name, ours[name], their, shard, shards, entry.cut) for name in names]
        if twin:
            parts = [FilePart(part.name, part.box, True) for part in parts]
        found += TRANSFORMS[entry.transform](keys, parts, args.head_width, shard)
    return found


def _part(
    args: ModelArgs,
    table: ParameterTable,
    name: str,
    shape: Shape,
    their: Shape | None,
    shard: int,
    shards: int,
    cut: int | None,
) -> FilePart:
    """What one of several files of tensor-parallel ranks has of a parameter: a share along `cut`, or as ours are cut.
    Where heads of keys and values are fewer than files, neighbouring ones hold the same one."""
    if shards == 1:
        return FilePart(name, whole(shape))
    if cut is not None:
        return FilePart(name, tuple(share_of(n, shard, shards) if i == cut else (0, n) for i, n in enumerate(shape)))
    module = name.rpartition(".")[0]
    if name.startswith("layers.") and args.kv_heads < shards and module.endswith(("attention.wk", "attention.wv")):
        head = shard * args.kv_heads // shards
        rows = (head * args.head_width, (head + 1) * args.head_width)
        return FilePart(name, (rows, *whole(shape[1:])), twin=shard * args.kv_heads % shards != 0)
    if name == "tok_embeddings.weight" and their is not None and their[0] == shape[0]:  # Llama 1 and 2 cut the width
        return FilePart(name, (whole(shape)[0], share_of(shape[1], shard, shards)))
    box = table[name].box((shard, shards))
    return FilePart(name, box, twin=box == whole(shape) and shard > 0)


_registered: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make a family of one's own known: to import and export, and to `load_state_dict`. ValueError where its name is
    taken."""
    if families().get(family.name, family) is not family:
        raise ValueError(f"family {family.name!r} exists already; give it another name")
    _registered[family.name] = family


def families() -> dict[str, Family]:
    """All families, by name."""
    return {**_families_of_the_package(), **_registered}


@cache
def _families_of_the_package() -> dict[str, Family]:
    from llm.foreign import families as package

    modules = (importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__))
    found = [family for module in modules for family in getattr(module, "FAMILIES", ())]
    return {family.name: family for family in found}


def family_named(name: str) -> Family:
    """UserError listing what there is when there is no such family."""
    known = families()
    if name not in known:
        raise UserError(f"family {name!r} is not known; known are {', '.join(sorted(known))}")
    return known[name]


def best_match(matches: Iterable[Match]) -> Match:
    """The one that fits, else the one with the fewest misfits, of these one that has names for most of the model; those
    with the very same misfits are named beside it."""
    known = list(matches)
    best = min(known, key=lambda m: (len(m.missing) + len(m.unknown) + len(m.misshapen), m.unnamed))
    faults = best.missing, best.unknown, best.misshapen
    alike = [m.family.name for m in known if m is not best and (m.missing, m.unknown, m.misshapen) == faults]
    return replace(best, alike=tuple(alike))
