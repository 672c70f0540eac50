"""PEFT's folders: adapter_config.json beside adapter_model.safetensors, read and written.

What the config says beside rank, scale and weights must be what PEFT does when nothing is said: what changes the
product, or trains more than adapters, is refused by its key.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.adapters import peft
from llm.adapters.merge import refuse_incomplete
from llm.adapters.saved_tables import added_rows, all_keys, n_tokens, saved_tables, span_of, tables_of
from llm.adapters.vocabulary import grown
from llm.args import LoraArgs, ModelArgs
from llm.args.lora import DEFAULT_TARGETS, target_of
from llm.atomic import new_directory
from llm.boxes import Box, whole
from llm.checkpoint.frozen import Origin, Taken, origin_of
from llm.checkpoint.weights import Weights, boxed
from llm.errors import DamagedFile, UserError
from llm.foreign.export import Rotated, written_config
from llm.foreign.family import Family
from llm.foreign.stored import Stored, StoredPickle, StoredSafetensors
from llm.foreign.transforms import BoxPair
from llm.foreign.weight_files import read_json
from llm.layers.lora import TOKEN_ROWS, AdapterNames, adapters_in
from llm.parameters import ParameterTable
from llm.paths import check_free
from llm.safetensors_file import write_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
BASE = "lattice.base"
"""Key of the header of the weights' file, with the origin of the base."""
TARGETS = (*DEFAULT_TARGETS, "tok_embeddings", "output")
NO_BASE = "rows that train whole are known by those of the base, which is not given"
SHOWN = 4
"""Names that a line lists."""
SAME = 1e-6
"""Relative difference of scales that are equal: a root may be rounded."""
MISTAKEN = {"qwen3_moe"}
"""Families whose dense feed-forwards PEFT takes for the experts of older files, by the ends of their modules' names. As
parameters they are left alone."""
ANY = object()
DEFAULTS: dict[str, Any] = {
    "peft_type": "LORA", "bias": "none", "megatron_core": ANY, "qalora_group_size": ANY, "task_type": "CAUSAL_LM",
    "auto_mapping": ANY, "peft_version": ANY, "base_model_name_or_path": ANY, "revision": ANY, "inference_mode": ANY,
    "r": ANY, "lora_alpha": ANY, "lora_dropout": ANY, "use_rslora": ANY, "rank_pattern": ANY, "alpha_pattern": ANY,
    "target_modules": ANY, "target_parameters": ANY, "exclude_modules": ANY, "layers_to_transform": ANY,
    "layers_pattern": ANY, "ensure_weight_tying": ANY, "init_lora_weights": ANY, "eva_config": ANY,
    "trainable_token_indices": ANY, "modules_to_save": ANY,
}  # fmt: skip
"""Keys that may be set, and to what; any other may be there if it is off. Which weights have adapters is read from the
tensors."""
INITIAL = (True, False, "gaussian", "eva", "orthogonal")
"""Of init_lora_weights: what begins beside the base as it is. Others, as pissa, change the base."""


def is_peft(path: Path) -> bool:
    """Whether a folder holds an adapter of PEFT."""
    return (path / CONFIG).is_file()


class HeldTensors:
    """Parameters in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def read(self, name: str, box: Box, out: Tensor) -> Tensor:
        return out.copy_(boxed(self._tensors[name], box))


@dataclass(frozen=True)
class PeftFolder:
    """An adapter in a folder, whose config has been read."""

    path: Path
    config: dict[str, Any]
    rank: int
    alpha: float
    file: Stored
    base: str | None
    """Name or path of the model that it was made for."""
    origin: Origin | None
    """Where the base's weights came from, of a folder that we have written."""

    @property
    def local_base(self) -> Path | None:
        """The folder of its base: as named, or beside the folder itself. None where there is none."""
        if not self.base:
            return None
        found = (path for path in (Path(self.base), self.path / self.base) if path.is_dir())
        return next(found, None)

    def adapter(
        self, args: ModelArgs, family: Family, base: Weights | None = None
    ) -> tuple[ModelArgs, dict[str, Tensor]]:
        """The model with adapters, and their tensors, for a base with these args that transformers knows as `family`.
        base: its weights, where rows of tokens train whole. UserError where they are of another base, or not complete.
        A base with fewer tokens has to be `grown` before.
        """
        args = args.merged
        try:
            tables = self._saved_tables(args, family, base)
            lora, factors = self._read(args, family, tables)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        adapted = args.model_copy(update={"lora": lora})
        names = adapters_in(ParameterTable.of(adapted))
        if left := factors.keys() - names.keys():
            keys = [site.key for row in peft.sites_of(family, args) for site in row if not left.isdisjoint(site.names)]
            raise UserError(
                f"{self.path}: it has adapters of {_some(list(dict.fromkeys(keys)))}, which can have none here; PEFT's "
                f"merge_and_unload makes one model of it and its base"
            )
        tensors: dict[str, Tensor] = {}
        for name in names.keys() & factors.keys():
            tensors |= _ours(names[name], factors[name])
        if lora.token_rows is not None:
            tensors |= self._token_rows(adapted, family, base, tables)
        refuse_incomplete(self.path, adapted, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
        return adapted, _laid_out(tensors, args, family, theirs=False)

    def grown(self, args: ModelArgs, weights: Weights, family: Family) -> tuple[ModelArgs, Weights]:
        """A base with as many tokens as the tables that the adapter holds whole."""
        try:
            tables, held = tables_of(family, args), self.file.shapes()
            saved = saved_tables(tables, self.config, held)
            return grown(args, weights, n_tokens(saved, held, tables, args.vocab_size))
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None

    def _saved_tables(self, args: ModelArgs, family: Family, base: Weights | None) -> dict[str, Tensor]:
        """What tables that are held whole add to those of the base."""
        saved = saved_tables(tables_of(family, args), self.config, self.file.shapes())
        if not saved:
            return {}
        if base is None:
            raise ValueError(NO_BASE)
        return added_rows(saved, self._tensor, args, base, bool(self.config.get("ensure_weight_tying")))

    def _read(
        self, args: ModelArgs, family: Family, tables: Mapping[str, Tensor]
    ) -> tuple[LoraArgs, dict[str, peft.Factors]]:
        shapes, factors, used = ParameterTable.of(args).shapes, dict[str, peft.Factors](), set[str]()
        twin: dict[str, peft.Factors] = {}
        held_shapes = self.file.shapes()
        held = held_shapes.keys()
        for row in peft.sites_of(family, args):
            wanted = [key for site in row for key in site.tensors]
            if used.isdisjoint(wanted) and not held.isdisjoint(wanted):
                if absent := [key for key in wanted if key not in held]:
                    raise UserError(f"its adapter is not complete: it misses {_some(absent)}")
                for site in row:
                    adapter = peft.read(site, self._tensor)
                    peft.parted(site, adapter, self.rank, shapes, twin if site.pairs[0].twin else factors)
                    self._check_scale(site, adapter[0].shape[-1])
                used |= set(wanted)
        span = self._token_span(args)
        used |= {key for _, key in _token_tables(family, args)} if span is not None else set()
        used |= all_keys(saved_tables(tables_of(family, args), self.config, held_shapes))
        if unknown := sorted(held - used):
            raise UserError(f"not an adapter of this {family.name} model, which has no place for {_some(unknown)}")
        if args.tie_embeddings:
            self._check_twin(factors, twin)
        targets = {target_of(name) for name in factors}
        if not targets:
            raise UserError("it holds no low-rank adapter")
        lora = LoraArgs(
            rank=self.rank,
            alpha=self.alpha,
            targets=tuple(sorted(targets, key=_place)),
            dropout=self.config.get("lora_dropout") or 0.0,
            rslora=bool(self.config.get("use_rslora")),
            token_rows=span_of(tables) if tables else span,
        )
        return lora, factors

    def _token_span(self, args: ModelArgs) -> tuple[int, int] | None:
        """The first of the tokens whose rows train whole, and the first beyond them. UserError where they are not
        consecutive, or not the same of table and head."""
        said = self.config.get("trainable_token_indices")
        if not said:
            return None
        lists = list(said.values()) if isinstance(said, dict) else [said]
        whole_numbers = all(isinstance(found, list) and all(type(i) is int for i in found) for found in lists)
        span = (lists[0][0], lists[0][0] + len(lists[0])) if whole_numbers and lists[0] else (0, 0)
        if span[0] == span[1] or any(found != list(range(*span)) for found in lists):
            raise UserError(f"{CONFIG}: trainable_token_indices={json.dumps(said)}: not the same consecutive tokens")
        if span[1] > args.vocab_size:
            raise UserError(
                f"{CONFIG}: trainable_token_indices: up to token {span[1] - 1}, of which its base has "
                f"{args.vocab_size:,}; save the base with the rows that were added to it"
            )
        return span

    def _token_rows(
        self, adapted: ModelArgs, family: Family, base: Weights | None, tables: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What the rows that train whole add to those of the base; nothing in a matrix that is not named. tables: what
        tables that are held whole add to theirs."""
        assert adapted.lora is not None and adapted.lora.token_rows is not None
        if base is None:
            raise ValueError(NO_BASE)
        (first, end), held = adapted.lora.token_rows, self.file.shapes()
        found = {}
        for name, key in _token_tables(family, adapted):
            shape = (end - first, adapted.dim)
            if held.get(key, shape) != shape:
                raise UserError(f"{self.path}: {key} has shape {held[key]}, expected {shape}")
            added = torch.zeros(shape)
            if name in tables:
                added = tables[name][first:end].clone()
            elif key in held:
                added = self._tensor(key) - base.read(name, ((first, end), (0, adapted.dim)), torch.empty(shape))
            found[name.replace("weight", TOKEN_ROWS)] = added
        return found

    def _tensor(self, key: str) -> Tensor:
        shape = self.file.shapes()[key]
        if self.file.dtype(key) is None:
            raise UserError(f"{key} is {self.file.described(key)[0]}, which is not read")
        out = torch.empty(shape)
        self.file.read(BoxPair(key, 0, whole(shape), key, whole(shape)), out)
        if not out.isfinite().all():
            raise UserError(f"{key} holds values that are not finite")
        return out

    def _check_scale(self, site: peft.Site, rank: int) -> None:
        """UserError where one adapter is scaled otherwise than the others."""
        alpha = self.alpha
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            plain = re.sub(r"^\^?(\.\*)?(\\?\.)?", "", pattern).replace(r"\.", ".")
            if not re.fullmatch(r"[\w.]+", plain):
                raise UserError(f"{CONFIG}: alpha_pattern: {pattern} is more than the end of a name")
            if f".{site.module}".endswith(f".{plain}"):
                alpha = float(value)
                break
        power = 0.5 if self.config.get("use_rslora") else 1
        of_this, of_all = alpha / rank**power, self.alpha / self.rank**power
        if abs(of_this - of_all) > SAME * of_all:
            raise UserError(
                f"the adapter of {site.key} has the scale {of_this:.6g}, others {of_all:.6g}; all must have the same"
            )

    def _check_twin(self, factors: Mapping[str, peft.Factors], twin: Mapping[str, peft.Factors]) -> None:
        """UserError unless the adapter of a tied table is there for both of its uses."""
        name = "tok_embeddings.weight"
        here, there = factors.get(name), twin.get(name)
        if here is None and there is None:
            return
        if there is None and self.config.get("ensure_weight_tying"):
            return
        if here is None or there is None or not all(torch.equal(a, b) for a, b in zip(here, there, strict=True)):
            raise UserError(
                "token table and head are one matrix in this model, and so must have the same adapter; it has "
                f"{'two' if here and there else 'one of the ' + ('table' if here else 'head') + ' alone'}"
            )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _place(target: str) -> tuple[int, str]:
    """The order of targets: those of the text model as they are listed, then the vision tower's."""
    return TARGETS.index(target) if target in TARGETS else len(TARGETS), target


def _ours(names: AdapterNames, factors: peft.Factors) -> dict[str, Tensor]:
    """An adapter's parameters, of its factors: A and B of a stack, B and A of a matrix."""
    left, right = factors
    if names.a.endswith(".lora_a"):
        return {names.a: right[0], names.b: left[0]}
    return {names.a: left, names.b: right}


def _laid_out(tensors: dict[str, Tensor], args: ModelArgs, family: Family, theirs: bool) -> dict[str, Tensor]:
    """Adapters with the rows of queries and keys as the family has them, or from there as `args` say."""
    if family.write_config is None:  # a model is only ever one of these as it was read, with rows as they were
        return tensors
    said = family.read_config(written_config(family, args.merged), lambda _: None)
    interleaved = bool(said.get("rope_interleaved", True))
    if interleaved == args.rope_interleaved:
        return tensors
    source = args if theirs else args.model_copy(update={"rope_interleaved": interleaved})
    moved = Rotated(HeldTensors(tensors), source)
    return {
        name: moved.read(name, whole(tuple(tensor.shape)), torch.empty_like(tensor)) for name, tensor in tensors.items()
    }


def open_peft(path: Path) -> PeftFolder:
    """The adapter in a folder. UserError naming the file and key that stand against it."""
    where = path / CONFIG
    config = read_json(where)
    for key, value in config.items():
        allowed = DEFAULTS.get(key)
        if allowed is not ANY and value and value != allowed:
            raise UserError(f"{where}: {key}={json.dumps(value)} is not supported")
    if config.get("init_lora_weights", True) not in INITIAL:
        raise UserError(
            f"{where}: init_lora_weights={json.dumps(config['init_lora_weights'])} changes the weights of the base; "
            f"save it as a plain adapter, by path_initial_model_for_weight_conversion of PEFT's save_pretrained"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if config.get("peft_type") != "LORA" or type(rank) is not int or not 1 <= rank <= 1 << 16:
        raise UserError(f"{where}: peft_type={config.get('peft_type')}, r={rank}: not a low-rank adapter")
    if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise UserError(f"{where}: lora_alpha={alpha} is no number above 0")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(type(value) in (int, float) for value in patterns.values()):
        raise UserError(f"{where}: alpha_pattern is no mapping of names to numbers")
    base, origin = config.get("base_model_name_or_path"), None
    if base is not None and not isinstance(base, str):
        raise UserError(f"{where}: base_model_name_or_path is no name")
    if (path / WEIGHTS).is_file():
        file = StoredSafetensors(path / WEIGHTS)
        origin = _origin(file)
        return PeftFolder(path, config, rank, float(alpha), file, base, origin)
    if (path / PICKLED).is_file():
        return PeftFolder(path, config, rank, float(alpha), StoredPickle(path / PICKLED), base, None)
    raise UserError(f"{path}: holds {CONFIG}, but no {WEIGHTS}")


def _origin(file: StoredSafetensors) -> Origin | None:
    said = file.metadata.get(BASE)
    if said is None:
        return None
    try:
        return origin_of(json.loads(said))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedFile(f"{file.path}: damaged: {BASE} makes no sense") from None


def write_peft(
    target: Path,
    args: ModelArgs,
    weights: Weights,
    family: Family,
    *,
    dtype: torch.dtype,
    origin: Origin,
    extra_files: Mapping[str, bytes | Path],
    base: Weights | None = None,
    notify: Callable[[int], object] = lambda _: None,
) -> list[str]:
    """Write the adapters of a model as PEFT reads them for the same base in transformers, whole or not at all; lines
    about what it lacks. UserError when `target` exists or the family cannot say what the base is.

    weights: of which only adapters are read. base: of the base, where rows of tokens train whole, which PEFT keeps as
    they are in the end.
    """
    assert args.lora is not None
    check_free(target)
    adapters = adapters_in(ParameterTable.of(args))
    shapes = ParameterTable.of(args).shapes
    held = {
        key: weights.read(key, whole(shapes[key]), torch.empty(shapes[key]))
        for names in adapters.values()
        for key in (names.a, names.b)
    }
    held = _laid_out(held, args, family, theirs=True)
    factors = {name: peft.our_factors(name, adapters, held) for name in adapters}
    sites = peft.sites_in_memory(family, args, adapters)
    tensors: dict[str, Tensor] = {}
    for site in sites:
        tensors |= peft.written(site, peft.fused(site, factors, args.lora.rank))
    tables = {} if base is None else _token_rows(args, weights, base, family)
    tensors |= tables
    notes = list(_notes(args.lora, sites, origin))
    with new_directory(target) as folder:
        described = {key: (dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
        metadata = {"format": "pt", BASE: json.dumps(origin.to_json())}
        write_tensors(folder / WEIGHTS, described, _noted(tensors, dtype, notify), metadata)
        config = _config(args, family, sites, set(factors), origin)
        if args.lora.token_rows is not None:
            modules = (key.removesuffix(f".{peft.TOKEN_ROWS}").rpartition(".")[2] for key in tables)
            config["trainable_token_indices"] = {name: list(range(*args.lora.token_rows)) for name in modules}
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        for name, content in extra_files.items():
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return notes


def _token_rows(args: ModelArgs, weights: Weights, base: Weights, family: Family) -> dict[str, Tensor]:
    """The rows that train whole as they are in the end, by PEFT's key. UserError where PEFT cannot have them."""
    assert args.lora is not None
    if args.lora.token_rows is None:
        return {}
    first, end = args.lora.token_rows
    found = {}
    for name, key in _token_tables(family, args):
        if name in adapters_in(ParameterTable.of(args)):
            raise UserError(
                f"lora.token_rows={[first, end]}: PEFT has no adapter and rows that train whole in one matrix, as this "
                f"run in {name}; --format=hf writes base and adapter as one model"
            )
        shape = (end - first, args.dim)
        rows = base.read(name, ((first, end), (0, args.dim)), torch.empty(shape))
        added = weights.read(name.replace("weight", TOKEN_ROWS), whole(shape), torch.empty(shape))
        found[key] = rows + added
    return found


def _token_tables(family: Family, args: ModelArgs) -> list[tuple[str, str]]:
    """Our names of token table and head, unless that is the table, and the key of their rows that train whole."""
    tables = (table for table in tables_of(family, args) if not table.twin)
    return [(table.name, f"{peft.PREFIX}{table.module}.{peft.TOKEN_ROWS}") for table in tables]


def _noted(tensors: Mapping[str, Tensor], dtype: torch.dtype, notify: Callable[[int], object]) -> Iterator[Tensor]:
    for tensor in tensors.values():
        notify(tensor.numel() * dtype.itemsize)
        yield tensor


def _notes(lora: LoraArgs, sites: list[peft.Site], origin: Origin) -> Iterator[str]:
    if lora.dropout and any(site.stacked for site in sites):
        yield f"lora_dropout is 0 and not {lora.dropout}: PEFT has none beside stacked experts"
    if any(site.pairs[0].twin for site in sites):
        yield (
            "table and head are one matrix, to which PEFT's merge_and_unload adds the adapter twice; --format=hf "
            "writes base and adapter as one model"
        )
    if not isinstance(origin, Taken) or not (Path(origin.path) / "config.json").is_file():
        yield "PEFT needs the base as a Hugging Face folder: export that too, and load the adapter onto it"


def _config(
    args: ModelArgs, family: Family, sites: list[peft.Site], adapted: set[str], origin: Origin
) -> dict[str, Any]:
    lora = args.lora
    assert lora is not None
    held = {site.module for row in peft.sites_of(family, args) for site in row}
    chosen = {site.module for site in sites}
    modules, parameters, ranks, alphas = set[str](), set[str](), dict[str, int](), dict[str, float]()
    for site in sites:
        name = _called(site.module, held, chosen)
        if family.name in MISTAKEN and not site.stacked and ".feed_forward." in site.names[0]:
            parameters.add(f"{name}.weight")
        else:
            (parameters if site.stacked else modules).add(name)
        parts = sum(part in adapted for part in site.names)
        if parts > 1:
            ranks[name] = parts * lora.rank
            alphas[name] = _number(lora.alpha * (math.sqrt(parts) if lora.rslora else parts))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": origin.path if isinstance(origin, Taken) else None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": _number(lora.alpha),
        "lora_dropout": 0.0 if parameters else lora.dropout,
        "use_rslora": lora.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters) or None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }


def _called(module: str, held: set[str], chosen: set[str]) -> str:
    """The end of a module's name by which PEFT finds what has adapters: that of its place in any layer; or, where
    others end so too and have none, as those of a vision tower, the whole."""
    name = re.sub(r"^.*?\.\d+\.", "", module)
    if name == module:  # table and head are in no layer
        name = name.rpartition(".")[2]
    found = {other for other in held if f".{other}".endswith(f".{name}")}
    return name if found <= chosen else module


def _number(value: float) -> float:
    return int(value) if value.is_integer() else value
