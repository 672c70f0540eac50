"""Does my config give one answer on every layout? `python tools/layouts.py --config C --nproc 4` runs its first steps,
on its own data, on every layout that fits and compares them with one process.

Layouts are tensor x pipeline x expert x data-parallel ranks x ZeRO stage; the validator of the run config says which
fit. A layout is equal when loss and gradient norm of every step are: in float32 to 1e-5 of their size, with the same
number of tokens at every expert; in bf16 to 1e-2, and to 2e-3 in the mean. Exit status 0: all are equal; 1: one is not;
2: bad input. Any key of the run config can be given as in launch/pretrain.py (--section.key=value), but for those of
the layout, and a few that have flags of their own here.

Where float32 chose other experts, and one process had a token at that step whose choice hung on a rounding, the layout
is right in its own way: it is called a tie and judged by the steps before. Where the first step is equal and a later
one is not, a line says how the difference grew.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import llm.installed  # noqa: F401  (says in one line what is missing)

from llm.atomic import write_file
from llm.cli import HELP, describe, run_or_stop
from llm.data.sources import check_data
from llm.errors import UserError
from llm.parallel.launch import local
from llm.train.chat import run_tokenizer
from llm.train.config import RunConfig, check_layout, load_config
from llm.train.settle import task_in
from tools.diff import every_difference
from tools.layouts_plan import Candidate, Precision, Settings, alone, check_flags, fitting, parse, prepared
from tools.shrink import shrunk

JOB = Path(__file__).with_name("layouts_job.py")
BOUND: dict[str, float] = {"fp32": 1e-5, "bf16": 1e-2}
"""Relative. Sums in another order differ by 1e-7 in float32, which a few steps may amplify; bf16 rounds to 2e-3."""
MEAN_BOUND = 2e-3
"""Of the mean over the steps: what does not average out is a bias, not rounding."""
FEW = 3
"""Steps in which rounding has not grown to the bound, and a wrong gradient or update has shown."""
TIE = 1e-6
"""Margin of a router's choice, relative to its logits, that rounding can undo."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """How a layout's steps compare with one process."""

    equal: bool
    routing: str
    """equal; "differs at step 3"; "tie at step 3"; "-" without experts."""
    loss: float | None = None
    """Largest relative difference over the steps compared; None without such."""
    grad_norm: float | None = None
    mean: float | None = None
    """Mean over the steps of the loss's relative difference, with its sign."""
    differences: tuple[float, ...] = ()
    """Relative difference at each step compared: that of loss or gradient norm, whichever is larger."""
    failure: str | None = None
    """What stopped it."""


def layouts(settings: Settings, overrides: Mapping[str, Any] | None = None) -> None:
    """Print how every layout compares with one process, and write the table that was asked for. `overrides` maps
    dotted keys of the run config to values.

    SystemExit(1) where a layout is not equal; UserError where nothing can be compared.
    """
    check_flags(settings)
    config, steps, precision = settings.config, settings.steps, settings.precision
    nproc, stages = settings.nproc, settings.stages
    run = prepared(load_config(config, dict(overrides or {})), precision, settings.seed)
    if (task := task_in(run)).compares_with_start:
        raise UserError(f"{config}: task={task.name} compares with sums that only a run makes")
    check_data(run.data.train)
    run_tokenizer(run)
    if settings.shrink:
        small = shrunk(run, max(nproc))
        print(f"made small: {'; '.join(every_difference(run.model_dump(), small.model_dump()))}")
        run = small
    candidates = {ranks: list(fitting(run, ranks, stages)) for ranks in sorted(set(nproc))}
    for ranks, found in candidates.items():
        if not found:
            print(f"no layout of {ranks} ranks fits")
    if not any(candidates.values()):
        check_layout(run, max(nproc))
        raise UserError(f"--nproc={','.join(map(str, nproc))}: no layout with ZeRO {stages} fits {config}")
    print(f"{config}: {steps} steps in {precision}; equal is within {BOUND[precision]:g} of one process in float32")
    (expected,) = trained([alone(run)], 1, steps)
    if isinstance(expected, str):
        raise UserError(f"{config}: one process alone failed: {expected}")
    if any(row["skipped"] for row in expected):
        raise UserError(f"{config}: one process alone skipped a step: {[row['skipped'] for row in expected]}")
    print(described(expected))
    print(HEADINGS)
    table = []
    for ranks, found in candidates.items():
        results = trained([candidate.config for candidate in found], ranks, steps)
        for candidate, rows in zip(found, results, strict=True):
            verdict = compare(rows, expected, precision)
            print(line(candidate, verdict), flush=True)
            if (growth := grown(verdict, precision)) is not None:
                print(growth, flush=True)
            table.append(entry(candidate, verdict, rows))
    n_equal = sum(row["equal"] for row in table)
    print(f"{n_equal} of {len(table)} layouts are equal to one process")
    if settings.json is not None:
        document = {"config": run.model_dump(mode="json"), "steps": steps, "reference": expected, "layouts": table}
        write_file(Path(settings.json), (json.dumps(document, indent=1) + "\n").encode())
    if n_equal < len(table):
        raise SystemExit(1)


def trained(configs: Sequence[RunConfig], ranks: int, steps: int, job: Path = JOB) -> Iterator[list[Row] | str]:
    """The rows of each config's steps, as soon as they are there; or the message of what stopped it.

    One torchrun serves as many as run through; after one that fails the rest get a new one.
    """
    with tempfile.TemporaryDirectory(prefix="layouts") as folder:
        done = 0
        while done < len(configs):
            began = done
            task, out, log = (Path(folder) / f"{name}{began}" for name in ("task.json", "out.jsonl", "log.txt"))
            task.write_text(json.dumps([config.model_dump(mode="json") for config in configs[began:]]))
            with log.open("w") as file:
                words = [str(job), str(task), str(steps), str(out)]
                process = subprocess.Popen([*local.command(ranks), *words], stdout=file, stderr=subprocess.STDOUT)
            try:
                running = True
                while running:
                    running = process.poll() is None
                    lines = out.read_text().split("\n")[:-1] if out.exists() else []
                    for text in lines[done - began :]:
                        done += 1
                        yield json.loads(text)
                    time.sleep(0.1 if running else 0)
            finally:
                process.terminate()
                process.wait()
            if done < len(configs):
                done += 1
                yield failure(log, process.returncode)


def failure(log: Path, status: int) -> str:
    """Why a job ended, from what it printed."""
    said = [text for text in log.read_text(errors="replace").splitlines() if text.startswith("error: ")]
    return said[0].removeprefix("error: ") if said else f"exit status {status}"


def compare(rows: list[Row] | str, expected: list[Row], precision: Precision) -> Verdict:
    """Judge a layout's steps by one process's."""
    if isinstance(rows, str):
        return Verdict(False, "-", failure=rows)
    parted = next((i for i, row in enumerate(rows) if row["routing_checksum"] != expected[i]["routing_checksum"]), None)
    n_compared, sound = len(rows), all(row["skipped"] is None for row in rows)
    routing = "-" if expected[0]["routing_checksum"] is None else "equal"
    if parted is not None:
        routing = f"differs at step {parted + 1}"
        if precision == "fp32":
            margin = expected[parted]["margin"]
            if margin is not None and margin < TIE:
                routing, n_compared = f"tie at step {parted + 1}", parted
            else:
                sound = False
    off = {
        key: [relative(row[key], right[key]) for row, right in zip(rows[:n_compared], expected, strict=False)]
        for key in ("loss", "grad_norm")
    }
    if not n_compared:
        return Verdict(False, routing)
    largest = {key: max(map(abs, values)) for key, values in off.items()}
    mean = sum(off["loss"]) / n_compared
    equal = sound and max(largest.values()) <= BOUND[precision] and abs(mean) <= MEAN_BOUND
    differences = tuple(max(abs(loss), abs(norm)) for loss, norm in zip(off["loss"], off["grad_norm"], strict=True))
    return Verdict(equal, routing, largest["loss"], largest["grad_norm"], mean, differences)


def relative(value: float, right: float) -> float:
    """(value - right) / right; infinite where there is no such number."""
    if value == right:
        return 0.0
    off = (value - right) / right if right else math.inf
    return math.inf if math.isnan(off) else off


HEADINGS = "ranks  tensor  pipeline  expert  data  zero  micro      loss  grad_norm  routing"


def line(candidate: Candidate, verdict: Verdict) -> str:
    """A row of the printed table."""
    layout, micro = candidate.layout, candidate.config.train.micro_batch_size
    numbers = (
        f"{layout.world:5}  {layout.tensor:6}  {layout.pipeline:8}  {layout.expert:6}  {layout.data:4}  "
        f"{layout.zero_stage:4}  {micro:5}"
    )
    if verdict.failure is not None:
        return f"{numbers}  FAILED: {verdict.failure}"
    sizes = "  ".join(
        f"{'-' if value is None else format(value, '.1e'):>{width}}"
        for value, width in ((verdict.loss, 8), (verdict.grad_norm, 9))
    )
    return f"{numbers}  {sizes}  {verdict.routing}{'' if verdict.equal else '   NOT EQUAL'}"


def grown(verdict: Verdict, precision: Precision) -> str | None:
    """The line under a layout whose first step is equal and a later one is not; None for others.

    Both rounding and a wrong update look like this after many steps. Few steps distinguish them, not these numbers.
    """
    off, bound = verdict.differences, BOUND[precision]
    if not off or not off[0] <= bound < max(off):
        return None
    step = next(step for step, value in enumerate(off, 1) if value > bound)
    most = off.index(max(off))
    text = (
        f"       off by {off[0]:.1e} at step 1, {off[-1]:.1e} at step {len(off)}, most at step {most + 1} with "
        f"{off[most]:.1e}, beyond {bound:g} first at step {step}: "
    )
    if step <= FEW:
        return f"{text}early for rounding, so look for a defect, unless the learning rate is far too high"
    return f"{text}rounding grows with the steps and the learning rate; --steps {FEW} distinguishes it from a defect"


def described(expected: list[Row]) -> str:
    """What one process did, in a line."""
    margins = [(row["margin"], step) for step, row in enumerate(expected, 1) if row["margin"] is not None]
    nearest = ""
    if margins:
        nearest = "; nearest choice of a router: {:.1e} of its logits, step {}".format(*min(margins))
    first, last = expected[0], expected[-1]
    return (
        f"one process: loss {first['loss']:.4f} to {last['loss']:.4f}, gradient norm {first['grad_norm']:.3g} to "
        f"{last['grad_norm']:.3g}{nearest}"
    )


def entry(candidate: Candidate, verdict: Verdict, rows: list[Row] | str) -> Row:
    """A layout in the JSON file."""
    layout = candidate.layout
    return {
        "ranks": layout.world,
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "expert": layout.expert,
        "data": layout.data,
        "zero_stage": layout.zero_stage,
        "micro_batch_size": candidate.config.train.micro_batch_size,
        **asdict(verdict),
        "rows": None if isinstance(rows, str) else rows,
    }


def main(words: Sequence[str]) -> None:
    """The command line."""
    if any(word in HELP for word in words):
        print(describe(Settings) + "\n  --section.key=value: any key of the run config, as in launch/pretrain.py")
        return
    settings, flags = parse(words)
    layouts(settings, flags.overrides)


if __name__ == "__main__":
    run_or_stop(lambda: main(sys.argv[1:]))
