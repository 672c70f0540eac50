"""A run folder as a report sees it: read once, all parts of it optional."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from llm.errors import UserError
from llm.report.rows import JsonLines, Metrics, read_metrics

SAMPLE = re.compile(r"--- sample at step (\d+), prompt (.*) ---")
STEP_LINE = re.compile(r"step +(\d+)/(\d+) ")
NUMBERED = re.compile(r"step (\d+)\b")
RESUMED = re.compile(r"resumed from .* \(step (\d+), ")
ERROR, ANEW = "error: ", "begins anew: "
KINDS = (
    ("error", re.compile(rf"^{ERROR}")),
    ("rewind", re.compile(r"going back to the last checkpoint")),
    ("resume", re.compile(rf"^resumed from |^{ANEW}")),
    ("change", re.compile(r"^changed: ")),
    ("skip", re.compile(r"^step \d+: .*(no update|passed over)")),
    ("spike", re.compile(r"^step \d+: loss .* is above ")),
    ("checkpoint", re.compile(r"^skipped a checkpoint|^step \d+: no checkpoint, |^saved on request")),
    ("stop", re.compile(r"^stopped on request |^stopped early |^nothing to do: |^step \d+: .* given up, ")),
    ("loss of records", re.compile(r"cannot be written|is written again|were lost|dropped damaged lines|stay in it ")),
    ("note", re.compile(r"^note: ")),
    ("end", re.compile(r"^done: ")),
)  # fmt: skip
"""What lines of log.txt are events, in the order in which they are tried."""
MARKED = ("rewind", "resume", "skip", "spike")
"""Events that are drawn into the curve of the loss."""
LONGEST_EVENT = 600
"""Characters of a line."""


class Event(NamedTuple):
    """A line of log.txt that is worth a look; `step` is where the run stood."""

    step: int
    kind: str
    text: str


class Sample(NamedTuple):
    step: int
    prompt: str
    text: str


@dataclass
class RunFolder:
    """What a run has written."""

    path: Path
    name: str
    config: dict[str, Any]
    """config.yaml; empty where there is none that can be read."""
    metrics: Metrics
    starts: list[dict[str, Any]] = field(default_factory=list)
    """starts.jsonl: what the run was, each time that it began or went on."""
    events: list[Event] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    experts: list[tuple[int, list[list[int]]]] = field(default_factory=list)
    """(step, tokens that chose each expert of each MoE layer)."""
    damaged: dict[str, int] = field(default_factory=dict)
    """Lines that were passed over, by file."""

    @property
    def steps(self) -> int | None:
        """Those that the run is to have."""
        steps = (self.config.get("train") or {}).get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def ranks(self) -> int | None:
        """Processes of the newest step."""
        whole, each = (self.metrics.last.get(f"tokens_per_s{of}") for of in ("", "_per_device"))
        return round(whole / each) if whole and each else None


def read_folder(path: Path) -> RunFolder:
    """UserError where there is no run."""
    if not (path / "metrics.jsonl").exists() and not (path / "config.yaml").exists():
        raise UserError(f"{path}: no run folder: it has neither metrics.jsonl nor config.yaml")
    run = RunFolder(path, path.resolve().name, _config(path / "config.yaml"), read_metrics(path / "metrics.jsonl"))
    run.events, from_log = _read_log(path / "log.txt")
    starts, samples, experts = (JsonLines(path / f"{name}.jsonl") for name in ("starts", "samples", "experts"))
    run.starts = [row for _, row in starts]
    run.samples = [Sample(n, str(row.get("prompt", "")), str(row.get("text", ""))) for n, row in samples] or from_log
    run.experts = [(n, row["counts"]) for n, row in experts if _is_table(row.get("counts"))]
    damaged = {"metrics.jsonl": run.metrics.damaged}
    damaged |= {f"{name}.jsonl": lines.damaged for name, lines in (("starts", starts), ("samples", samples))}
    run.damaged = {name: n for name, n in {**damaged, "experts.jsonl": experts.damaged}.items() if n}
    return run


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_table(counts: Any) -> bool:
    """Whether it is rows of one length, of whole numbers."""
    return (
        isinstance(counts, list)
        and bool(counts)
        and all(isinstance(row, list) and row and len(row) == len(counts[0]) for row in counts)
        and all(type(n) is int for row in counts for n in row)
    )


def _read_log(path: Path) -> tuple[list[Event], list[Sample]]:
    """Events, and the samples that an older run has there alone."""
    events: list[Event] = []
    samples: list[Sample] = []
    step, sample = 0, None
    text: list[str] = []
    for line in _lines(path):
        if sample is not None:
            if line == "---":
                samples.append(Sample(int(sample[1]), _unquoted(sample[2]), "\n".join(text)))
                sample, text = None, []
            else:
                text.append(line)
            continue
        if sample := SAMPLE.fullmatch(line):
            continue
        reported = line.removeprefix(ERROR)
        if at := STEP_LINE.match(reported) or NUMBERED.match(reported) or RESUMED.match(reported):
            step = int(at[1])
        elif line.startswith(ANEW):
            step = 0
        kind = next((kind for kind, pattern in KINDS if pattern.search(line)), None)
        if kind is not None:
            events.append(Event(step, kind, line[:LONGEST_EVENT]))
    return events, samples


def _lines(path: Path) -> Iterator[str]:
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                yield line.rstrip("\n")


def _unquoted(prompt: str) -> str:
    try:
        return str(ast.literal_eval(prompt))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return prompt
