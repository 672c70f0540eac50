"""What tools/inspect.py reports of a run, its checkpoints, or one checkpoint, as text or JSON."""

import json as json_format
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python
from tqdm import tqdm

from llm.args import ModelArgs
from llm.checkpoint.inspect import Damage, Survey, damaged_blocks, survey
from llm.checkpoint.reader import MANIFEST, list_steps
from llm.checkpoint.store import HIDDEN
from llm.data.coverage import Coverage, rows_asked
from llm.data.opening import kind_named
from llm.data.packed import Packed
from llm.data.sample_kind import SampleKind
from llm.data.samples import SampleSource
from llm.data.source import MANIFEST as SOURCE_MANIFEST
from llm.data.source import SHARDS, TokenSource, is_source
from llm.data.sources import SourceSpec, source_specs
from llm.data.stream import Stream
from llm.errors import UserError
from llm.parallel.layout import Layout
from llm.paths import PathText, hub_note
from llm.train.config import RunConfig
from llm.train.config.explain import section_of
from llm.train.config.yaml_file import read_yaml
from tools.inspection_samples import sample_lines, samples_in
from tools.inspection_text import SHOWN, checkpoint_lines, run_lines

CHECKPOINTS = "checkpoints"
SET_ASIDE = "damaged_step_"
LINE_INTERVAL_S = 10.0
LAST_BYTES = 1 << 16  # of metrics.jsonl, more than a row has

Report = dict[str, Any]


def inspect(
    path: PathText,
    verify: bool = False,
    data: bool = False,
    tensors: bool = False,
    json: bool = False,
    show: int | None = None,
    images: PathText | None = None,
) -> None:
    """Say what a run folder, its checkpoints or one checkpoint hold, and whether they are whole; or show samples.

    path: a run folder, its `checkpoints` folder, a checkpoint folder, or a checkpoint's manifest.json; with --show a
        folder of samples
    verify: read every block of every fragment against its digest, and name each damaged one
    data: also which rows of which files were read how often (of a run: for the checkpoint that a resume would take)
    tensors: also every tensor with its shape, kinds, dtype and fragments (likewise)
    json: print one JSON object, which has everything in full
    show: so many samples of a folder of data.cache_dir
    images: with --show, folder to write the tiles of their images into, as the model sees them
    """
    place = Path(path)
    if show is not None:
        if show < 1:
            raise UserError(f"--show={show} must be at least 1")
        for line in sample_lines(samples_in(place), show, None if images is None else Path(images)):
            print(_printable(line))
        return
    if images is not None:
        raise UserError("--images goes with --show, which says of how many samples")
    folder = checkpoints_in(place)
    if folder is None:
        report = checkpoint_report(*looked_at(as_checkpoint(place), verify), tensors=tensors, data=data)
        whole, lines = report["whole"], checkpoint_lines(report)
    else:
        report = run_report(place, folder, verify=verify, tensors=tensors, data=data)
        whole = all(entry["whole"] for entry in report["checkpoints"])
        lines = run_lines(report, details=tensors or data)
    if json:
        print(json_format.dumps(report, indent=1))
    else:
        print("\n".join(map(_printable, lines)))
    if not whole:
        sys.stdout.flush()
        raise SystemExit(1)


def _printable(line: str) -> str:
    """What a file says is not to steer a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in line)


def checkpoints_in(place: Path) -> Path | None:
    """The `checkpoints` folder meant by a run folder or that folder itself; None for any other path."""
    if not place.is_dir() or (place / MANIFEST).is_file():
        return None
    if (place / CHECKPOINTS).is_dir() or (place / "metrics.jsonl").is_file():
        return place / CHECKPOINTS
    return place if list_steps(place) or any(_leftovers(place)) else None


def _leftovers(folder: Path) -> tuple[list[str], list[str]]:
    """Names of what a resume has set aside in a `checkpoints` folder, and of what was cut off in the making."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [name for name in names if name.startswith(SET_ASIDE)], [name for name in names if name.startswith(HIDDEN)]


def as_checkpoint(place: Path) -> Path:
    """The checkpoint folder meant by a checkpoint or its manifest; UserError that says what the path is instead."""
    if not place.exists():
        raise UserError(f"{place}: no such file or folder{hub_note(place)}")
    folder = place if place.is_dir() else place.parent
    if (folder / SHARDS).is_dir():
        raise UserError(f"{place}: is a source of token shards; lattice shard check {folder} verifies it")
    if place.is_dir() and ((place / MANIFEST).is_file() or place.name.startswith(("step_", SET_ASIDE))):
        return place
    if place.is_file() and place.name == MANIFEST:
        return folder
    raise UserError(
        f"{place}: {_what_it_is(place)}; expected a run folder, its checkpoints, one checkpoint or its {MANIFEST}"
    )


def _what_it_is(place: Path) -> str:
    """A path that is none of ours, in words."""
    if place.is_dir():
        runs = sorted(child.name for child in place.iterdir() if (child / CHECKPOINTS).is_dir())
        if runs:
            return f"is a folder of runs ({', '.join(runs[:SHOWN])})"
        foreign = (place / "config.json").is_file() and any(place.glob("*.safetensors"))
        return "is a model of another format" if foreign else "is a folder without checkpoints"
    if (place.parent / MANIFEST).is_file():
        return f"is one file of the checkpoint {place.parent}"
    if (place.parent / CHECKPOINTS).is_dir():
        return f"is one file of the run {place.parent}"
    if place.suffix in (".yaml", ".yml"):
        is_run = "data" in (keys := read_yaml(place).keys()) and keys <= RunConfig.model_fields.keys()
        return "is a run config, which lattice train --dry_run checks" if is_run else "is a YAML file"
    return f"is a file of {place.stat().st_size:,} bytes that is no checkpoint"


def looked_at(folder: Path, verify: bool) -> tuple[Survey, list[Damage] | None]:
    """The survey of a checkpoint, and its damaged blocks, or None where they were not looked for."""
    found = survey(folder)
    if not verify:
        return found, None
    with progress(sum(found.bytes_by_kind().values()), f"verifying {folder.name}", "B") as done:
        return found, damaged_blocks(found, done)


@contextmanager
def progress(total: int, what: str, unit: str) -> Iterator[Callable[[int], object]]:
    """What is to be called with how much was done. A bar on a terminal; elsewhere a line now and then."""
    if sys.stderr.isatty():
        with tqdm(total=total, unit=unit, unit_scale=True, desc=what) as bar:
            yield bar.update
        return
    began = last = time.monotonic()
    done = 0

    def count(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= LINE_INTERVAL_S:
            last = now
            print(f"{what}: {done / max(1, total):.0%}, {now - began:.0f} s", file=sys.stderr, flush=True)

    yield count


def run_report(place: Path, folder: Path, *, verify: bool, tensors: bool, data: bool) -> Report:
    """All checkpoints of a run, newest first, and more of the one that a resume would take."""
    entries: list[Report] = []
    resumed: Report | None = None
    for _, path in list_steps(folder):
        looked = looked_at(path, verify)
        if not os.path.lexists(path):
            continue  # the run goes on, and has just dropped it
        entry = summary(*looked)
        if resumed is None and entry["whole"]:
            resumed = checkpoint_report(*looked, tensors=tensors, data=data)
        entries.append(entry)
    set_aside, unfinished = _leftovers(folder)
    return {
        "run": str(place if folder != place else place.resolve().parent),
        "last_recorded": _last_row(folder.resolve().parent / "metrics.jsonl"),
        "checkpoints": entries,
        "set_aside": set_aside,
        "unfinished": unfinished,
        "resume": resumed,
    }


def summary(found: Survey, damages: list[Damage] | None) -> Report:
    """What stands in a run's list of a checkpoint."""
    best = found.meta.get("best") or {}
    return {
        "path": str(found.path),
        "step": found.step,
        "whole": not found.faults and not damages,
        "verified": damages is not None,
        "faults": found.faults,
        "damaged_blocks": [asdict(damage) for damage in damages or ()],
        "bytes": found.bytes,
        "files": len(found.files),
        "written_by": layout_line(found.meta.get("layout")),
        "tokens": found.meta.get("tokens"),
        "rows": (found.meta.get("data") or {}).get("consumed"),
        "best": best or None,
    }


def checkpoint_report(found: Survey, damages: list[Damage] | None, *, tensors: bool, data: bool) -> Report:
    """All about one checkpoint."""
    meta = found.meta
    config = meta.get("config") or {}
    report: Report = {
        **summary(found, damages),
        "layout": meta.get("layout"),
        "parameters": sum(math.prod(shape) for shape in found.shapes.values()),
        "tensors": len(found.shapes),
        "frozen": frozen_report(meta.get("frozen")),
        "fragments": len(found.fragments),
        "bytes_by_kind": found.bytes_by_kind(),
        "format_version": found.version,
        "versions": meta.get("versions") or {},
        "passed_over": (meta.get("guard") or {}).get("passed_over", []),
        "rows_passed_over": (meta.get("guard") or {}).get("rows_passed_over", []),
        "model": model_line(config.get("model")),
        "changed": {key: [value, default] for key, value, default in changed_keys(config, RunConfig)},
        "config": config,
        "data": data_report(meta["data"], config, data) if "data" in meta and "data" in config else None,
    }
    if tensors:
        report["every_tensor"] = {
            name: {"shape": list(found.shapes.get(name, ())), **{kind: held._asdict() for kind, held in kinds.items()}}
            for name, kinds in sorted(found.held().items(), key=lambda item: _in_order(item[0]))
        }
    return report


def frozen_report(frozen: dict[str, Any] | None) -> Report | None:
    """What the run does not train, and so keeps elsewhere; None where it trains everything."""
    if frozen is None:
        return None
    shapes, origin = frozen["shapes"], frozen["from"]
    there = Path(origin["path"]).exists() if "path" in origin else True
    return {"parameters": sum(map(math.prod, shapes.values())), "tensors": len(shapes), "from": origin, "there": there}


def _in_order(name: str) -> list[Any]:
    """Sorts layers.2 before layers.10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def layout_line(layout: dict[str, Any] | None) -> str:
    """A checkpoint's layout as Layout prints itself; one of before it had all its fields, as it stands there."""
    if layout is None:
        return "an unknown layout"
    try:
        return f"{layout['world']} rank(s): {Layout(**layout)}"
    except (KeyError, TypeError):
        return ", ".join(f"{key} {value}" for key, value in layout.items())


def model_line(model: dict[str, Any] | None) -> str | None:
    """The architecture in a line; None where there is none that this version knows."""
    try:
        args = ModelArgs.model_validate({k: v for k, v in (model or {}).items() if k != "init_from"})
    except ValidationError:
        return None
    specs = args.all_specs()
    n_moe = sum(spec.ffn == "moe" for spec in specs)
    encoder = [f"an encoder of {args.encoder_layers} layers"] * (args.encoder_layers > 0)
    parts = [*encoder, f"{args.n_layers} layers", f"dim {args.dim}"]
    parts.append(f"{args.n_heads} heads of {args.head_width} ({args.kv_heads} for keys and values)")
    if n_moe < len(specs):
        parts.append(f"feed-forward {args.ffn_width()}")
    if args.moe is not None and n_moe:
        parts.append(f"{n_moe} layers with {args.moe.n_experts} experts of {args.moe_width()} (top {args.moe.top_k})")
    return ", ".join([*parts, f"vocabulary {args.vocab_size}"])


def changed_keys(config: dict[str, Any], schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, value, default) where the config differs from the schema's defaults, unknown keys included. Keys without a
    default have None for it; those of the model are left to its own line.
    """
    for name, value in config.items():
        info = schema.model_fields.get(name)
        inner = None if info is None else section_of(info.annotation)
        if info is not None and inner is not None and isinstance(value, dict):
            inside = list(changed_keys(value, inner, f"{prefix}{name}."))
            yield from inside
            if not inside and info.get_default() is None and not info.is_required():  # it is there, which says all
                yield f"{prefix}{name}", value, None
        elif info is None or not info.is_required():
            default = None if info is None else to_jsonable_python(info.get_default(call_default_factory=True))
            if info is None or value != default:
                yield f"{prefix}{name}", value, default
        elif not prefix.startswith("model."):
            yield f"{prefix}{name}", value, None


def data_report(state: dict[str, Any], config: dict[str, Any], files: bool) -> Report:
    """Where a run stands in its data, from the state that the checkpoint keeps; with `files` also how often each of
    their rows was read. What cannot be known says why.
    """
    report: Report = {"rows": state["consumed"], "seq_len": state["data"]["seq_len"], "seed": state["seed"]}
    report |= {"earlier_rows": state.get("earlier_rows"), "epochs": None, "note": None, "sources": []}
    raw = config["data"]["train"]
    try:
        specs = source_specs(raw if isinstance(raw, str) else [SourceSpec.model_validate(spec) for spec in raw])
        asked = rows_asked(state, [spec.resolved_name() for spec in specs])
    except (UserError, ValidationError) as error:
        report["note"] = f"rows of each source are not known: {' '.join(str(error).split())}"
        return report
    if report["earlier_rows"]:
        report["note"] = f"{report['earlier_rows']:,} earlier rows of this run came from other data"
    elif report["earlier_rows"] is None and "data" in (config.get("checkpoint") or {}).get("allow_changes", ()):
        report["note"] = "the data was allowed to change in this run: earlier rows may have come from other sources"
    for spec, (name, rows) in zip(specs, asked.items(), strict=True):
        entry: Report = {"name": name, "path": spec.path, "rows": rows, "of": None, "problem": None}
        report["sources"].append(entry)
        try:
            found = find_rows(spec, state["data"]["sources"][name]["fingerprint"], config, report)
            entry |= {"folder": str(found.source.path), "of": found.n_rows}
            if files:
                entry |= _coverage(name, found, report["seed"], rows)
        except UserError as error:
            entry["problem"] = str(error)
    if all(entry["of"] for entry in report["sources"]):
        report["epochs"] = report["rows"] / sum(entry["of"] for entry in report["sources"])
    return report


def find_rows(spec: SourceSpec, fingerprint: str, config: dict[str, Any], report: Report) -> Stream | Packed:
    """The rows that a run read as `spec`. UserError when what they were made of is not there, not whole, or not the
    same any more, or the kind is none that keeps its rows in a folder.
    """
    cache_dir = config["data"].get("cache_dir")
    if spec.kind == "text":
        return Stream(find_source(spec, fingerprint, cache_dir), report["seq_len"])
    kind = kind_named(spec.kind)
    if not isinstance(kind, SampleKind):
        raise UserError(f"rows of kind {spec.kind} are in no folder that is known here")
    together = config["data"].get("packing") != "none"
    max_length = (config.get("chat") or {}).get("max_length", "error")
    how = {"target": kind.target, "together": together, "max_length": max_length, "given": spec.path}
    cache = Path(cache_dir) if cache_dir else None
    for folder in sorted(cache.iterdir()) if cache and cache.is_dir() else ():
        if folder.name.startswith(f"{spec.cache_name()}-") and is_source(folder):
            try:
                found = Packed(SampleSource.open(folder), report["seq_len"], report["seed"], **how)
            except UserError:
                continue  # of text, or of other samples, or damaged
            if found.fingerprint == fingerprint:
                return found
    raise UserError(f"{cache or 'no cache'} has no samples of {spec.path} (relative paths start at {Path.cwd()})")


def find_source(spec: SourceSpec, fingerprint: str, cache_dir: str | None) -> TokenSource:
    """The shards that a run read as `spec`: a folder of shards, or what became of raw text in the cache, which the
    fingerprint knows without the text. UserError when they are not there, not whole, or not the same any more.
    """
    path = Path(spec.path)
    source = TokenSource.open(path) if is_source(path) and (path / SHARDS).is_dir() else None
    if source is not None and source.fingerprint == fingerprint:
        return source
    cache = Path(cache_dir) if cache_dir else None
    for folder in sorted(cache.iterdir()) if cache and cache.is_dir() else ():
        if folder.name.startswith(f"{spec.cache_name()}-") and is_source(folder):
            try:
                stated = json_format.loads((folder / SOURCE_MANIFEST).read_bytes()).get("fingerprint")
            except (ValueError, AttributeError):
                continue  # damaged, so there is no telling what it was
            if stated == fingerprint:
                return TokenSource.open(folder)
    if source is not None:
        raise UserError(f"{path}: holds other shards than the run read ({source.fingerprint}, not {fingerprint})")
    where = f"{path} is no folder of shards" if path.exists() else f"{path} is not there any more"
    raise UserError(f"{where}, and {cache or 'no cache'} has no shards of it (relative paths start at {Path.cwd()})")


def _coverage(name: str, rows: Stream | Packed, seed: int, asked: int) -> Report:
    coverage = Coverage(name, rows, seed, asked)
    total, what = (rows.source.n_docs, "documents") if isinstance(rows, Stream) else (rows.source.n_items, "samples")
    with progress(total, f"{what} of {rows.source.path.name}", "doc") as done:
        return {"times": coverage.times(), "stretches": [asdict(stretch) for stretch in coverage.stretches(done)]}


def _last_row(file: Path) -> Report | None:
    """step, tokens and epoch of the last whole row of metrics.jsonl; None without one."""
    try:
        with open(file, "rb") as stream:
            stream.seek(max(0, file.stat().st_size - LAST_BYTES))
            lines = stream.read().split(b"\n")[:-1]
    except OSError:
        return None
    for line in reversed(lines):
        try:
            row = json_format.loads(line)
            return {key: row.get(key) for key in ("step", "tokens", "epoch")}
        except (ValueError, AttributeError):
            continue
    return None
