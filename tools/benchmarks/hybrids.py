"""HYDRA's three patterns against plain attention on books: loss by position, at equal parameters, rows and steps.

    python tools/benchmarks/hybrids.py prepare --text BOOKS.jsonl.gz      # runs/hybrids/data: books, a tokenizer
    python tools/benchmarks/hybrids.py run                                # every pattern with every seed, and scores
    python tools/benchmarks/hybrids.py report

All four models have the same width, depth, vocabulary and schedule; the width of the feed-forward makes their
parameters equal. They are scored on the same windows of held-out books, whose positions are taken in four bands, so
that what a pattern remembers of far tokens shows in the last. A difference is stated only beyond two standard errors.
"""

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import yaml
from torch import Tensor
from torch.nn.functional import cross_entropy

from llm import LLM, ModelArgs
from llm.atomic import write_file
from llm.cli import run_cli
from llm.data.documents import read_documents
from llm.datatypes import TransformerInput
from llm.errors import UserError
from llm.parameters import ParameterTable
from llm.paths import PathText
from llm.tokenizer import TokenizerConfig, load_tokenizer
from tools.benchmarks.harness import RESULTS
from tools.benchmarks.machine import hardware, versions

ROOT = Path(__file__).resolve().parents[2]
WORK = "runs/hybrids"
SEEDS = (0, 1, 2)
STEPS, ROWS, SEQ_LEN = 120, 4, 1024
VOCABULARY = 2048
HELD_OUT = 20
"""Every so many-th book is held out."""
WINDOWS = 96
BANDS = 4
PLAIN = {"dim": 128, "n_layers": 8, "n_heads": 4, "ffn_hidden": 384, "tie_embeddings": True, "max_seq_len": SEQ_LEN}
STATE = {"d_state": 64, "head_width": 64}
PATTERNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "v1": {"layer_pattern": ["ssm", "attn"], "ssm": STATE},
    "v2": {"layer_pattern": ["ssm", "routed"], "ssm": STATE, "route": {"rate": 0.15}},
    "v3": {"layer_pattern": ["ssm", "ssm@4", "ssm@16", "attn@16"], "ssm": STATE},
}
EQUAL = 0.02
"""Largest difference of parameters."""


def model_of(name: str) -> dict[str, Any]:
    """`model` of a run config: the pattern of this name, with the feed-forward that makes its parameters nearest to
    those of the plain model. UserError where that is not within 2 %."""
    wanted = _count(PLAIN)
    candidates = [{**PLAIN, **PATTERNS[name], "ffn_hidden": hidden} for hidden in range(16, PLAIN["ffn_hidden"] + 1, 8)]
    best = min(candidates, key=lambda model: abs(_count(model) - wanted))
    if abs(_count(best) / wanted - 1) > EQUAL:
        raise UserError(f"{name}: no width of the feed-forward gives {wanted:,} parameters within {EQUAL:.0%}")
    return best


def _count(model: dict[str, Any]) -> int:
    table = ParameterTable.of(ModelArgs.model_validate({**model, "vocab_size": VOCABULARY}))
    return sum(math.prod(shape) for shape in table.shapes.values())


def prepare(text: PathText, work: PathText = WORK) -> None:
    """Hold books out and train a tokenizer on the others.

    text: books, one a row in the field `text`
    work: the folder for data and runs
    """
    data = Path(work) / "data"
    parts: dict[str, list[str]] = {"train": [], "valid": []}
    for number, book in enumerate(read_documents(text, key="--text")):
        parts["valid" if number % HELD_OUT == HELD_OUT - 1 else "train"].append(json.dumps({"text": book.text}))
    data.mkdir(parents=True, exist_ok=True)
    for side, rows in parts.items():
        write_file(data / f"{side}.jsonl", ("\n".join(rows) + "\n").encode())
    words = ["--input", data / "train.jsonl", "--output", data / "tokenizer.model", "--vocab_size", VOCABULARY]
    _python("tools/train_tokenizer.py", *words, "--max_bytes", 10_000_000, "--overwrite")
    print(f"{data}: {len(parts['train'])} books to train on, {len(parts['valid'])} held out")


def run(work: PathText = WORK, steps: int = STEPS) -> None:
    """Train every model with every seed, or go on where this was cut off, and score each.

    work: the folder for data and runs
    steps: of each run
    """
    folder = Path(work)
    for seed in SEEDS:
        for name in PATTERNS:
            place = folder / f"{name}-{seed}"
            if (place / "bands.json").exists():
                continue
            config = _config(name, seed, steps, folder / "data")
            file = folder / f"{name}-{seed}.yaml"
            write_file(file, yaml.safe_dump(config, sort_keys=False).encode())
            _python("launch/pretrain.py", "--config", file, "--run_dir", place)
            write_file(place / "bands.json", (json.dumps(bands(place, folder / "data")) + "\n").encode())


def _config(name: str, seed: int, steps: int, data: Path) -> dict[str, Any]:
    return {
        "model": {**model_of(name), "vocab_size": -1},
        "tokenizer": {"kind": "sentencepiece", "path": str(data / "tokenizer.model")},
        "data": {"train": str(data / "train.jsonl"), "valid": str(data / "valid.jsonl"),
                 "cache_dir": str(data / "cache")},
        "optim": {"name": "adamw", "lr": 3.0e-3, "schedule": "cosine", "warmup_steps": 20, "weight_decay": 0.1},
        "train": {"steps": steps, "global_batch_size": ROWS, "micro_batch_size": ROWS, "seq_len": SEQ_LEN,
                  "precision": "fp32", "seed": seed, "threads": 1},
        "checkpoint": {"interval": steps, "keep": 1},
        "eval": {"rows": 32, "interval": steps},
        "log": {"interval": 20, "tensorboard": False},
    }  # fmt: skip


@torch.no_grad()
def bands(run: Path, data: Path) -> list[float]:
    """Mean loss in nats of a run's newest model in each band of positions of the windows held out."""
    model = LLM.from_pretrained(run).eval()
    total = torch.zeros(SEQ_LEN, dtype=torch.float64)
    ids_NT = windows(data)
    for ids_BT in ids_NT.split(8):
        logits = model(TransformerInput(ids_BT[:, :-1])).logits
        assert logits is not None
        losses = cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
        total += losses.view(len(ids_BT), -1).double().sum(0)
    return (total / len(ids_NT)).view(BANDS, -1).mean(1).tolist()


def windows(data: Path) -> Tensor:
    """(windows, SEQ_LEN + 1) ids of held-out books, evenly over all that there are; none has a mark."""
    tokenizer = load_tokenizer(TokenizerConfig(kind="sentencepiece", path=str(data / "tokenizer.model")))
    found: list[Tensor] = []
    for book in read_documents(data / "valid.jsonl"):
        ids = torch.tensor(tokenizer.encode(book.text))
        found += list(ids[: len(ids) // (SEQ_LEN + 1) * (SEQ_LEN + 1)].view(-1, SEQ_LEN + 1))
    if len(found) < WINDOWS:
        raise UserError(f"{data}: {len(found)} windows of {SEQ_LEN + 1} tokens are held out; {WINDOWS} are needed")
    chosen = [found[number * len(found) // WINDOWS] for number in range(WINDOWS)]
    return torch.stack(chosen)


def report(work: PathText = WORK, output: PathText | None = None, notes: str = "") -> None:
    """Write a dated result of all runs.

    work: the folder with the runs
    output: the file; default: tools/benchmarks/results/DATE-hybrids.md
    notes: what else is to be said of the measurement
    """
    folder, day = Path(work), date.today().isoformat()
    file = Path(output or RESULTS / f"{day}-hybrids.md")
    scores = {name: [_scores(folder / f"{name}-{seed}") for seed in SEEDS] for name in PATTERNS}
    rows = {name: [_metrics(folder / f"{name}-{seed}") for seed in SEEDS] for name in PATTERNS}
    width = SEQ_LEN // BANDS
    columns = " | ".join(f"{band * width} to {(band + 1) * width - 1}" for band in range(BANDS))
    lines = [f"# HYDRA's patterns against plain attention, {day}", "", hardware(), "", versions(), ""]
    lines += ["Command: `python tools/benchmarks/hybrids.py prepare`, `run`, `report`.", ""]
    lines += [notes, ""] if notes else []
    lines += [
        f"Mean loss in nats a token on {WINDOWS} windows of held-out books by position in the window, mean of",
        f"{len(SEEDS)} seeds with its standard error; {len(rows['plain'][0])} steps of {ROWS} rows of {SEQ_LEN} tokens",
        "",
        f"| model | parameters | {columns} |",
        "| --- " * (BANDS + 2) + "|",
    ]
    for name, found in scores.items():
        cells = [_with_error([run[band] for run in found]) for band in range(BANDS)]
        lines.append(f"| {name} | {_count(model_of(name)):,} | {' | '.join(cells)} |")
    lines += ["", "Loss minus that of plain attention, seed by seed; equal: within two standard errors.", ""]
    lines += [f"| model | {columns} |", "| --- " * (BANDS + 1) + "|"]
    for name in (name for name in PATTERNS if name != "plain"):
        cells = []
        for band in range(BANDS):
            more = [ours[band] - plain[band] for ours, plain in zip(scores[name], scores["plain"], strict=True)]
            clear = abs(statistics.mean(more)) > 2 * _error(more)
            cells.append(_with_error(more) + ("" if clear else ", equal"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    rates = [statistics.mean(row["route_rate"] for row in steps[len(steps) // 2 :]) for steps in rows["v2"]]
    wanted = PATTERNS["v2"]["route"]["rate"]
    lines += ["", "Share of tokens that attended in v2, mean of the second half of each run (wanted: "]
    lines[-1] += f"{wanted:.0%}): {', '.join(f'{rate:.2%}' for rate in rates)}."
    write_file(file, ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


def _scores(run: Path) -> list[float]:
    if not (run / "bands.json").exists():
        raise UserError(f"{run}: not scored yet; `python tools/benchmarks/hybrids.py run` goes on")
    return [float(value) for value in json.loads((run / "bands.json").read_text())]


def _metrics(run: Path) -> list[dict[str, Any]]:
    """A row a step."""
    rows = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "loss" in row]


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def _with_error(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.4f} ± {_error(values):.4f}"


def _python(script: str, *words: object) -> None:
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    if subprocess.run(command).returncode:
        raise UserError(f"{' '.join(command)} has failed; its message is above")


if __name__ == "__main__":
    run_cli(report, prepare=prepare, run=run, report=report)
