"""A golden trace: what a run of twelve steps was, read from its run folder; kept in NAME.json, one file a config; and
what it means that two of them are the same.

On the machine of the file (processor, threads, torch: everything in machine.py) every number has the same bits. On
another one, float32 numbers agree to FP32, every choice of a router and every greedy token is the same, as none of the
recorded ones is near a tie; in bf16, whose roundings differ where sums are made in another order, the first BF16_STEPS
steps agree to BF16.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm import LLM
from llm.checkpoint.reader import newest_valid
from tests.distributed.harness import metrics
from tests.golden.cases import FOLDER, Case, config_of

FP32 = 1e-5
"""Relative: sums in another order differ by 1e-7, which twelve steps amplify, but not a hundredfold."""
BF16, BF16_STEPS = 2e-3, 2
"""Relative: of the first steps, before the roundings of 8 bits have become other weights."""
LIBRARY = 1e-12
"""Relative: cosines by another C library."""

EXACT = ("step", "tokens", "epoch", "batch_size", "seq_len", "targets", "skipped", "loss_scale")
CLOSE = ("loss", "lm_loss", "grad_norm")
CLOSE_IN_FP32 = ("moe_balance_loss", "moe_z_loss", "valid_loss", "valid_bits_per_byte", "valid_loss_ema")
ROUTING = ("routing_checksum", "expert_load", "expert_rank_load")
KEYS = ("step", *CLOSE, *CLOSE_IN_FP32, *ROUTING, "lr", *EXACT[1:])

Row = dict[str, Any]


@dataclass(frozen=True)
class Trace:
    """A run of a case."""

    parameters: str
    """Digest of the names and shapes in the last checkpoint's manifest."""
    weights: str
    """Digest of the weights after the last step."""
    steps: list[Row]
    """Of metrics.jsonl, KEYS alone, as far as a row has them."""


@dataclass(frozen=True)
class Golden:
    """The traces of a config, and what they all have in common."""

    config: str
    precision: str
    machine: dict[str, Any]
    config_digest: str
    """Of the config's file."""
    text_digest: str
    """Of the training and held-out text."""
    initial_weights: str
    """Digest of the weights before the first step, the same on every CPU."""
    router_margin: float | None
    """How close a router of one process came to another choice, relative to its largest logit; None without a choice.
    """
    greedy: dict[str, Any] | None
    """Token ids with which the trained model of one process continues prompts, and how close another one came; None
    where its bits are those of a machine, in bf16."""
    layouts: dict[str, Trace]


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of names, dtypes, shapes and bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda named: named[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def digest_of_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def digest_of_files(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def read_trace(run_dir: Path) -> Trace:
    """The trace of a finished run."""
    checkpoint, _ = newest_valid(run_dir / "checkpoints")
    assert checkpoint is not None, f"{run_dir} has no checkpoint"
    steps = [{key: row[key] for key in KEYS if key in row} for row in metrics(run_dir)]
    shapes = {name: list(shape) for name, shape in checkpoint.shapes.items()}
    weights = LLM.from_pretrained(run_dir).named_parameters()
    return Trace(digest_of_json(shapes), digest_of(weights), steps)


def golden_of(config: str, machine: dict[str, Any], text_digest: str, of_one: Row, layouts: dict[str, Trace]) -> Golden:
    """What is to be kept of the runs of a config; of_one: what job.py says of the one of one process."""
    raw = config_of(config)
    return Golden(
        config=config,
        precision=raw["train"]["precision"],
        machine=machine,
        config_digest=digest_of_json(raw),
        text_digest=text_digest,
        initial_weights=of_one["initial_weights"],
        router_margin=of_one["router_margin"],
        greedy=of_one.get("greedy"),
        layouts=layouts,
    )


def file_of(config: str, folder: Path = FOLDER) -> Path:
    return folder / f"{config}.json"


def load(config: str, folder: Path = FOLDER) -> Golden:
    """What is kept of a config. A file that is missing, or is none, is an error and never a reason to skip."""
    file = file_of(config, folder)
    if not file.exists():
        raise AssertionError(f"{file.name}: no golden traces of {config}; `python tests/golden/record.py` records them")
    kept = json.loads(file.read_text())
    layouts = {name: Trace(**trace) for name, trace in kept.pop("layouts").items()}
    return Golden(**kept, layouts=layouts)


def text_of(golden: Golden) -> str:
    """The file: JSON with a line for each step."""
    kept = asdict(golden)
    layouts = kept.pop("layouts")
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in kept.items()]
    traces = []
    for name, trace in layouts.items():
        steps = ",\n".join(f"    {json.dumps(row)}" for row in trace.pop("steps"))
        rest = ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in trace.items())
        traces.append(f'  {json.dumps(name)}: {{{rest}, "steps": [\n{steps}\n  ]}}')
    return "{\n" + ",\n".join([*lines, ' "layouts": {\n' + ",\n".join(traces) + "\n }"]) + "\n}\n"


def other_machine(golden: Golden, machine: dict[str, Any]) -> list[str]:
    """What differs between the machine of the file and this one; nothing where the bits must be the same."""
    return sorted(key for key in golden.machine.keys() | machine.keys() if golden.machine.get(key) != machine.get(key))


def differences(
    golden: Golden, case: Case, trace: Trace, machine: dict[str, Any], text_digest: str, of_one: Row | None = None
) -> Iterator[str]:
    """A line for everything in which a run of `case` on `machine` is not what was recorded: config, layout, step, key,
    both values and what would have been allowed. of_one: what job.py says of a run of one process.
    """
    if golden.config_digest != digest_of_json(config_of(case.config)):
        yield f"{case.config}: the config's file is not the one that was recorded"
        return
    if golden.text_digest != text_digest:
        yield f"{case.config}: the text is not the one that was recorded"
        return
    if case.layout not in golden.layouts:
        yield f"{case.config} on {case.layout}: not recorded"
        return
    kept, others = golden.layouts[case.layout], other_machine(golden, machine)
    where = f"{case.config} on {case.layout}"
    if kept.parameters != trace.parameters:
        yield f"{where}: the checkpoint has other names or shapes of parameters"
    if of_one is not None and golden.initial_weights != of_one["initial_weights"]:
        yield f"{where}: other initial weights"
    if len(kept.steps) != len(trace.steps):
        yield f"{where}: {len(kept.steps)} steps recorded, {len(trace.steps)} found"
    for right, row in zip(kept.steps, trace.steps, strict=False):
        for key in KEYS:
            allowed = tolerance(key, int(right["step"]), golden.precision, bool(others))
            if allowed is not None and not agree(right.get(key), row.get(key), allowed):
                yield (
                    f"{where}, step {right['step']}, {key}: {right.get(key)} recorded, {row.get(key)} found, "
                    f"{_difference(right.get(key), row.get(key), allowed, others)}"
                )
    if not others and kept.weights != trace.weights:
        yield f"{where}: other weights after the last step"
    if of_one is not None and golden.greedy is not None and golden.greedy["ids"] != of_one["greedy"]["ids"]:
        yield f"{where}: greedy continuations {of_one['greedy']['ids']} found, {golden.greedy['ids']} recorded"


def tolerance(key: str, step: int, precision: str, other: bool) -> float | None:
    """Relative, of a key in a step; 0 = the same bits, None = not compared. other: the machine is another one."""
    if not other or key in EXACT:
        return 0.0
    if key == "lr":
        return LIBRARY
    if precision == "fp32":
        return 0.0 if key in ROUTING else FP32
    return BF16 if key in CLOSE and step <= BF16_STEPS else None


def relative(right: object, found: object) -> float | None:
    """Relative difference of two numbers; None where one is none."""
    if not all(isinstance(value, (int, float)) for value in (right, found)):
        return None
    return abs(found - right) / max(abs(right), 1e-30)  # type: ignore[operator, arg-type]


def agree(right: object, found: object, allowed: float) -> bool:
    """Whether two values are the same as far as `allowed`, see `tolerance`."""
    if right == found:
        return True
    apart = relative(right, found)
    return allowed > 0 and apart is not None and apart <= allowed


def _difference(right: object, found: object, allowed: float, others: list[str]) -> str:
    apart = relative(right, found)
    by = "" if apart is None else f" (relative {apart:.1e})"
    if not others:
        return f"must have the same bits on the machine of the file{by}"
    most = "must be equal" if allowed == 0 else f"allowed {allowed:.0e}"
    return f"{most}{by} on another machine ({', '.join(others)})"
