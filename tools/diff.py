"""Where two runs part: `python tools/diff.py runs/a runs/b` names the first step and the metrics, with both values.

Where both runs have a trace of a common step (`log.trace_steps` in the run config), it also names the first weight,
output or gradient, in the order of computation. Exit status 0: they agree over all common steps; 1: they part; 2: bad
input.

Runs of the same layout and precision must be equal to the last bit. Otherwise sums are taken in another order, and
values may differ by 1e-5 (float32) or 1e-2 (bf16, fp16) of their size.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from llm.cli import run_cli
from llm.errors import UserError
from llm.paths import PathText
from llm.train.config.yaml_file import read_yaml
from llm.train.resume.differences import refused_changes

TIMING = frozenset(
    ("tokens_per_s", "tokens_per_s_per_device", "step_time_s", "data_wait_s", "memory_gb", "mfu", "step")
)
"""What depends on the clock and the machine; and the step, by which rows are found."""
OF_RANKS = frozenset(("expert_rank_load", "tile_imbalance", "tile_imbalance_in_order"))
"""How evenly the work of a step lay on its ranks, which another layout changes."""
FP32_RTOL, BF16_RTOL = 1e-5, 1e-2
GRADIENT_SLACK = 10
"""Gradients of queries and keys are the small rest of what cancels in the backward of the softmax: two sound float32
runs of different layouts came to 2e-5 of their norm in 20 steps, where weights and outputs stayed below 3e-7."""
HOW_IT_IS_CUT = ("parallel", "deepspeed", "train.micro_batch_size", "train.threads", "train.compile")
"""Config keys that change the order of sums, though not what is computed."""
NEXT_SHOWN = 4


@dataclass(frozen=True)
class Run:
    """What a run folder says."""

    path: Path
    config: dict[str, Any]
    rows: dict[int, dict[str, Any]]
    """Row of metrics.jsonl by step."""
    trace: dict[int, dict[tuple[str, str], dict[str, Any]]]
    """Records of trace.jsonl by step, then by (name, tensor), in the order of computation."""
    notes: tuple[str, ...]

    @property
    def precision(self) -> str:
        return str(self.config.get("train", {}).get("precision"))

    def ranks(self, step: int) -> int | None:
        """Number of processes that made a step; None where the row does not say."""
        row = self.rows[step]
        whole, each = row.get("tokens_per_s"), row.get("tokens_per_s_per_device")
        return round(whole / each) if whole and each else None

    def describe(self) -> str:
        ranks = list(dict.fromkeys(self.ranks(step) for step in sorted(self.rows)))
        processes = " then ".join("unknown" if n is None else str(n) for n in ranks)
        traced = f", traced at {ranges(sorted(self.trace))}" if self.trace else ""
        return f"{self.path}: steps {ranges(sorted(self.rows))}; ranks: {processes}; {self.precision}{traced}"


@dataclass(frozen=True)
class Parting:
    """One value that differs."""

    what: str
    a: Any
    b: Any
    relative: float | None
    """Difference over the scale on which it was judged; None for what is equal or not."""

    def line(self) -> str:
        how = "" if self.relative is None else f"   relative {self.relative:.1e}"
        return f"  {self.what}: {self.a!r} | {self.b!r}{how}"


def diff(run_a: PathText, run_b: PathText, rtol: float | None = None, metrics: list[str] | None = None) -> None:
    """Name the first step where two runs part, and in what.

    run_a: a run folder
    run_b: the run folder to set beside it
    rtol: largest relative difference that counts as equal; default: none for the same layout and precision, else 1e-5
        (fp32) or 1e-2 (bf16, fp16)
    metrics: names in metrics.jsonl to compare, separated by commas; default: all but times and memory, and
        between layouts how evenly their ranks were loaded
    """
    if rtol is not None and not (math.isfinite(rtol) and rtol >= 0):
        raise UserError(f"--rtol={rtol}: expected a number from 0 up")
    a, b = read_run(Path(run_a), "--run_a"), read_run(Path(run_b), "--run_b")
    common = sorted(a.rows.keys() & b.rows.keys())
    if not common:
        raise UserError(
            f"no step in common: {a.path} has {ranges(sorted(a.rows))}, {b.path} has {ranges(sorted(b.rows))}"
        )
    names = metric_names(a, b, metrics)
    for label, run in (("A", a), ("B", b)):
        print(f"{label}  {run.describe()}")
        for note in run.notes:
            print(f"   {note}")
    reasons = say_differences(a, b, common)
    if rtol is None:
        rtol, why = default_rtol(a, b, reasons)
    else:
        why = "--rtol"
    if reasons and metrics is None:
        names = [name for name in names if name not in OF_RANKS]
    print(f"compared {'bit by bit' if rtol == 0 else f'to within {rtol:g}'} ({why}): {', '.join(names)}")
    metrics_part = compare_metrics(a, b, common, names, rtol)
    trace_parts = compare_traces(a, b, rtol, metrics_part)
    if metrics_part is not None or trace_parts:
        raise SystemExit(1)


def say_differences(a: Run, b: Run, common: list[int]) -> list[str]:
    """Print how the configs, layouts and steps differ; return the reasons why sums are taken in another order."""
    mathematical = refused_changes(a.config, b.config)
    rest = [line for line in every_difference(a.config, b.config) if line not in mathematical]
    cut = [line for line in rest if line.startswith(HOW_IT_IS_CUT) and not line.startswith("parallel.timeout_s")]
    pairs = {(a.ranks(step), b.ranks(step)) for step in common}
    changed = sorted({f"ranks: {x} -> {y}" for x, y in pairs if x != y})
    for title, lines in (
        ("configs", mathematical),
        ("layouts", changed + cut),
        ("what a resume may change", [line for line in rest if line not in cut]),
    ):
        print(f"{title}: {'; '.join(lines) if lines else 'no difference'}")
    for label, run, other in (("A", a, b), ("B", b, a)):
        alone = sorted(run.rows.keys() - other.rows.keys())
        if alone:
            print(f"only {label} has step(s) {ranges(alone)}")
    return changed + cut


def every_difference(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines `key: in a -> in b` for every key of both that differs."""
    lines = []
    for key in sorted(a.keys() & b.keys()):
        x, y = a[key], b[key]
        if isinstance(x, dict) and isinstance(y, dict):
            lines += every_difference(x, y, f"{prefix}{key}.")
        elif x != y:
            lines.append(f"{prefix}{key}: {x!r} -> {y!r}")
    return lines


def default_rtol(a: Run, b: Run, reasons: list[str]) -> tuple[float, str]:
    """(relative tolerance, why), from the layouts and precisions."""
    if a.precision != b.precision:
        return BF16_RTOL, f"{a.precision} and {b.precision}"
    if not reasons:
        return 0.0, f"same layout, {a.precision}"
    return FP32_RTOL if a.precision == "fp32" else BF16_RTOL, f"layouts differ, {a.precision}"


def metric_names(a: Run, b: Run, wanted: list[str] | None) -> list[str]:
    """Metrics to compare, in the order of the rows."""
    known = {key: None for run in (a, b) for row in run.rows.values() for key in row if key not in TIMING}
    for name in wanted or ():
        if name not in known:
            raise UserError(f"--metrics={name}: not in metrics.jsonl of these runs; possible are {', '.join(known)}")
    return list(known) if wanted is None else wanted


def compare_metrics(a: Run, b: Run, common: list[int], names: list[str], rtol: float) -> int | None:
    """Print where the rows part; return the first such step, or None."""
    if rtol > FP32_RTOL and "routing_checksum" in names:
        names = [name for name in names if name != "routing_checksum"]
        print("routing_checksum left out: it says equal or not, and within this tolerance a router may choose anew")
    parting = {step: found for step in common if (found := parted_metrics(a.rows[step], b.rows[step], names, rtol))}
    if not parting:
        print(f"metrics: all {len(common)} common step(s), {ranges(common)}, agree")
        return None
    first = next(iter(parting))
    before = [step for step in common if step < first]
    print(f"metrics: {f'steps {ranges(before)} agree ({len(before)})' if before else 'no step agrees'}")
    print(f"metrics: step {first} is the first where they part (of {len(common)} common steps, {len(parting)} part)")
    for part in parting[first]:
        print(part.line())
    return first


def parted_metrics(a: dict[str, Any], b: dict[str, Any], names: list[str], rtol: float) -> list[Parting]:
    """What differs between two rows; fields that only one of them has are passed over (another rhythm of validation).
    """
    found = []
    for name in names:
        if name in a and name in b:
            x, y = a[name], b[name]
            if isinstance(x, float) or isinstance(y, float):
                size = max(abs(x), abs(y)) if is_number(x) and is_number(y) else 0.0
                if not close(x, y, size, rtol):
                    found.append(Parting(name, x, y, relative(x, y, size)))
            elif x != y:
                found.append(Parting(name, x, y, None))
    return found


def compare_traces(a: Run, b: Run, rtol: float, metrics_part: int | None) -> bool:
    """Print where the traces part; return whether they do."""
    common = sorted(a.trace.keys() & b.trace.keys())
    if not common:
        if metrics_part is not None:
            steps = [max(metrics_part - 1, 1), metrics_part]
            print(f"no trace of a common step; to find the tensor, run both again with --log.trace_steps={steps}")
        return False
    for step in common:
        one_sided = a.trace[step].keys() ^ b.trace[step].keys()
        if one_sided:
            name, tensor = sorted(one_sided)[0]
            print(f"trace: step {step}: {len(one_sided)} tensor(s) in one run only, such as {name} {tensor}")
        both = [key for key in a.trace[step] if key in b.trace[step]]
        found = [part for key in both if (part := parted_record(key, a.trace[step][key], b.trace[step][key], rtol))]
        if found:
            before = [earlier for earlier in common if earlier < step]
            agreed = f"; steps {ranges(before)} agree" if before else ""
            print(f"trace: step {step} is the first traced one that parts{agreed}")
            print(f"trace: {len(found)} of {len(both)} tensors part; the first is {found[0].what}")
            for part in found[: NEXT_SHOWN + 1]:
                print(part.line())
            if metrics_part is not None and metrics_part < common[0]:
                steps = [max(metrics_part - 1, 1), metrics_part]
                print(f"the metrics part before the first traced step; trace both runs with --log.trace_steps={steps}")
            return True
    print(f"trace: all tensors of step(s) {ranges(common)} agree")
    return False


def parted_record(key: tuple[str, str], a: dict[str, Any], b: dict[str, Any], rtol: float) -> Parting | None:
    """How one traced tensor differs, by the number that differs most; None when it agrees."""
    what = " ".join(key)
    if a["count"] != b["count"] or len(a["linear"]) != len(b["linear"]):
        return Parting(f"{what} (elements)", a["count"], b["count"], None)
    scale = max(a["scale"], b["scale"])
    if scale == 0 and rtol > FP32_RTOL:
        return None  # counts of the router, as with routing_checksum
    allowed = rtol * (GRADIENT_SLACK if key[1] == "gradient" else 1)
    values = [("", x, y, scale) for x, y in zip(a["linear"], b["linear"], strict=True)]
    if is_number(a["norm"]) and is_number(b["norm"]):
        values.insert(0, (" (norm)", a["norm"], b["norm"], max(a["norm"], b["norm"])))
    found = [
        Parting(what + how, x, y, relative(x, y, size)) for how, x, y, size in values if not close(x, y, size, allowed)
    ]
    return max(found, key=lambda part: math.inf if part.relative is None else part.relative, default=None)


def close(x: Any, y: Any, scale: float, rtol: float) -> bool:
    """Whether x and y are the same, or numbers no further apart than rtol * scale."""
    if not (is_number(x) and is_number(y)):
        return bool(x == y)
    if x == y or (math.isnan(x) and math.isnan(y)):
        return True
    return rtol > 0 and math.isfinite(x) and math.isfinite(y) and abs(x - y) <= rtol * scale


def relative(x: Any, y: Any, scale: float) -> float | None:
    """|x - y| / scale where that is a number."""
    return abs(x - y) / scale if is_number(x) and is_number(y) and scale > 0 else None


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_run(path: Path, flag: str) -> Run:
    """The run folder `path`; UserError naming the flag or the file when something is missing or damaged."""
    if not path.is_dir():
        raise UserError(f"{flag}={path}: no such run folder")
    config = read_yaml(path / "config.yaml")
    notes: list[str] = []
    rows: dict[int, dict[str, Any]] = {}
    for row in read_rows(path / "metrics.jsonl", notes):
        rows[row["step"]] = row
    if not rows:
        raise UserError(f"{path / 'metrics.jsonl'}: no whole row; the run has not finished a step")
    trace: dict[int, dict[tuple[str, str], dict[str, Any]]] = {}
    if (path / "trace.jsonl").exists():
        for number, record in enumerate(read_rows(path / "trace.jsonl", notes), 1):
            if not {"name", "tensor", "linear", "scale", "norm", "count"} <= record.keys():
                raise UserError(f"{path / 'trace.jsonl'}: line {number}: not a record of a trace")
            trace.setdefault(record["step"], {})[record["name"], record["tensor"]] = record
    return Run(path, config, rows, trace, tuple(notes))


def read_rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; a torn last line is passed over and noted."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if number == len(lines):
            if line:
                notes.append(f"{path.name}: the last line is torn, and passed over")
            break
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                raise ValueError
        except ValueError:
            if number == len(lines) - 1:
                notes.append(f"{path.name}: the last line is torn, and passed over")
                break
            raise UserError(f"{path}: line {number}: not a JSON object with a step") from None
        rows.append(row)
    return rows


def ranges(steps: list[int]) -> str:
    """Sorted numbers in short: 1-4, 7."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) or "none"


if __name__ == "__main__":
    run_cli(diff)
