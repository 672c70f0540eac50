"""Saving and loading a training state: by this project, by torch.distributed.checkpoint (DCP) and by DeepSpeed.

    python tools/benchmarks/saving.py                   # one result file; about 15 minutes
    python tools/benchmarks/saving.py --dir /dev/shm    # without a disk: what the processors do

The state is what AdamW steps on: float32 masters and two moments, 500 MB over all ranks, of an engine that trains. In
one process, and in two with ZeRO-1, all contestants save it in turn, round after round, into the same folder. A save
behind the training goes on while steps are made: what the training waits for it is the time inside the calls of the
library and, before an optimizer steps, for the copy of the state; and what it costs in all is how much later the same
steps are done.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

os.environ["OMP_NUM_THREADS"] = "1"

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from llm.cli import run_cli
from llm.errors import UserError
from llm.parallel.launch import local
from tools.benchmarks.harness import MIN_ROUNDS, RESULTS, Bar, Spread, table, write_result

ROOT = Path(__file__).resolve().parents[2]
MODEL: dict[str, Any] = {
    "dim": 640, "n_layers": 7, "n_heads": 10, "n_kv_heads": 10, "ffn_hidden": 1728, "vocab_size": 8192,
    "max_seq_len": 256,
}  # fmt: skip
ROWS, SEQ_LEN = 2, 256
READERS: dict[str, tuple[int, dict[str, int]]] = {
    "one process": (1, {}),
    "two processes, ZeRO-1": (2, {}),
    "two processes, tensor-parallel": (2, {"tensor": 2}),
}
"""How many processes and keys of `parallel`, of jobs that read checkpoints of others."""
WRITERS = {name: READERS[name][0] for name in ("one process", "two processes, ZeRO-1")}
STALL_OF_BLOCKING, STALL_OF_COPY, WRITTEN, EXCESS_BLOCKS = 0.10, 1.3, 1.02, 1.0
Found = dict[str, dict[str, list[float]]]
"""contestant, metric, a number of each round."""
Precision = Literal["fp32", "bf16"]


def benchmark(
    precision: Precision = "bf16", rounds: int = MIN_ROUNDS, dir: str | None = None, output: str = str(RESULTS)
) -> None:
    """Time saves and loads of 500 MB of state and write a dated result file.

    precision: arithmetic of the training; the state is float32 in each
    rounds: saves and loads of each contestant that count
    dir: where checkpoints are written, and removed; a temporary folder if not given
    output: folder of the result file
    """
    if rounds < MIN_ROUNDS:
        raise UserError(f"--rounds={rounds}: at least {MIN_ROUNDS}, so that quartiles mean something")
    if dir is not None and not Path(dir).is_dir():
        raise UserError(f"--dir={dir}: no such folder")
    with tempfile.TemporaryDirectory(dir=dir) as scratch:
        place = Path(scratch)
        kept = {writer: str(place / f"kept{nproc}") for writer, nproc in WRITERS.items()}
        sections = []
        for writer, nproc in WRITERS.items():
            task = {"config": run_config(precision, nproc, {}), "folder": str(place), "rounds": rounds}
            found = run_job("compare", task | {"kept": kept[writer]}, nproc, place)
            sections.append(section(writer, found))
        read = {}
        for reader, (nproc, parallel) in READERS.items():
            task = {"config": run_config(precision, nproc, parallel), "folder": str(place)}
            read[reader] = run_job("read", task | {"checkpoints": list(kept.values())}, nproc, place)
        sections.append(reading_section(list(kept), read))
        file_system = file_system_of(place)
    what = f"{precision} training of {shape_text()}; checkpoints on {file_system}; {rounds} rounds."
    how = (
        "Contestants took turns in one job for each number of processes, with one thread each, a flushed disk before "
        "each turn and a warm page cache; the slowest rank counts"
    )
    name = f"saving-{precision}" + ("" if dir is None else f"-{Path(dir).resolve().name}")
    path = write_result(name, "Saving and loading", [what, *sections], Path(output), how)
    print("\n\n".join([what, *sections]), f"\nwritten to {path}")


def shape_text() -> str:
    """The model and a step, in words."""
    return (
        f"width {MODEL['dim']}, {MODEL['n_layers']} layers, vocabulary {MODEL['vocab_size']:,}, {ROWS} rows of "
        f"{SEQ_LEN} tokens a step, AdamW"
    )


def run_config(precision: str, nproc: int, parallel: dict[str, int]) -> dict[str, Any]:
    """A RunConfig; its text is never read."""
    data_parallel = nproc // parallel.get("tensor", 1)
    train = {"precision": precision, "seq_len": SEQ_LEN, "global_batch_size": ROWS}
    return {
        "model": MODEL,
        "tokenizer": {"kind": "bytes"},
        "data": {"train": "unread"},
        "parallel": parallel,
        "train": train | {"micro_batch_size": ROWS // data_parallel},
    }


def run_job(what: str, task: dict[str, Any], nproc: int, scratch: Path) -> Any:
    """The result of tools/benchmarks/saving_job.py on `nproc` processes."""
    written, out = scratch / "task.json", scratch / "out.json"
    written.write_text(json.dumps(task))
    job = str(ROOT / "tools/benchmarks/saving_job.py")
    launcher = [*local.command(nproc), job]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launcher, what, str(written), str(out)], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"{what} on {nproc} processes ended with {done.returncode}: {done.stderr[-1500:]}")
    return json.loads(out.read_text())


def ratio(values: list[float], others: list[float]) -> Spread:
    """Of the per-round ratios values / others."""
    return Spread.of([own / other for own, other in zip(values, others, strict=True)])


def delays(contestant: dict[str, list[float]], step_alone: list[float]) -> list[float]:
    """In each round, how many seconds later a save behind the training let its steps be done than without it."""
    rows = zip(contestant["elapsed"], contestant["steps"], step_alone, strict=True)
    return [elapsed - steps * alone for elapsed, steps, alone in rows]


def section(writer: str, found: dict[str, Any]) -> str:
    """One number of processes: saves, loads, and what was expected."""
    saves: Found = found["saves"]
    loads: Found = found["loads"]
    state, alone = found["state"], saves["training alone"]["step"]
    copy, blocking = saves["memory copy"]["stall"], saves["ours, blocking"]["stall"]
    durations = {name: metrics["stall"] for name, metrics in saves.items() if "bytes" in metrics}
    durations["DeepSpeed, blocking, then flushed"] = saves["DeepSpeed, blocking"]["flushed"]
    written = {name: metrics["bytes"][0] for name, metrics in saves.items() if "bytes" in metrics}
    blocking_rows = [
        [
            name,
            Spread.of(times).text(),
            ratio(times, blocking).text(2),
            f"{written[name] / state:.3f}" if name in written else "",
        ]
        for name, times in durations.items()
    ]
    behind = {name: metrics for name, metrics in saves.items() if "elapsed" in metrics}
    behind_rows = [
        [
            name,
            Spread.of(metrics["stall"]).text(),
            ratio(metrics["stall"], copy).text(2),
            ratio(metrics["stall"], blocking).text(3),
            Spread.of(metrics["elapsed"]).text(2),
            ratio(metrics["step"], alone).text(2),
            Spread.of(delays(metrics, alone)).text(2),
        ]
        for name, metrics in behind.items()
    ]
    ours = loads["ours"]["stall"]
    load_rows = [
        [name, Spread.of(metrics["stall"]).text(), ratio(metrics["stall"], ours).text(2)]
        for name, metrics in loads.items()
    ]
    bars = [
        Bar(f"stall of *{name}* over {over}", ratio(behind[name]["stall"], times).median, bound, at_least=False).text()
        for name in ("ours, behind, first", "ours, behind, later")
        for over, times, bound in (("blocking", blocking, STALL_OF_BLOCKING), ("a memory copy", copy, STALL_OF_COPY))
    ]
    bars.append(Bar("bytes written over the state", written["ours, blocking"] / state, WRITTEN, at_least=False).text())
    preparing = Spread.of(behind["ours, behind, first"]["preparing"])
    return "\n\n".join(
        [
            f"## {writer[0].upper()}{writer[1:]}",
            f"State: {state / 1e6:,.0f} MB. A memory copy of it takes {Spread.of(copy).text()} s, a step with nothing "
            f"beside it {Spread.of(alone).text()} s.",
            "Saves that the training waits for:",
            table(["save", "s", "times ours", "bytes written over the state"], blocking_rows),
            "Saves behind the training:",
            table(
                ["save", "stall, s", "over a memory copy", "over ours blocking", "s until it is done", "a step "
                 "meanwhile over one alone", "training later by, s"],
                behind_rows,
            ),
            "Loads, each checked to bring back the state:",
            table(["load", "s", "times ours"], load_rows),
            "\n".join(f"* {bar}" for bar in bars)
            + f"\n* getting the memory before the first save holds the training for {preparing.text(4)} s\n"
            "* *first*: of a run, memory got behind the training two steps earlier, as the trainer does; *unprepared*: "
            "memory got in the save itself; *later*: any other. Ours copies the state while the next forward and "
            "backward run; what the optimizer's step has to wait for the copy is part of the stall\n"
            "* ours writes a digest of each block, and checks it in loading; DCP and DeepSpeed do neither. DeepSpeed "
            "does not flush what it saves, and writes the model's own weights beside the masters. DCP is given whole "
            "partitions as flat tensors, other keys on each rank: it has nothing to cut, merge or compare. *memory "
            "kept*: a `DefaultStager` that lives on between saves, which is not its default",
        ]
    )  # fmt: skip


def reading_section(writers: list[str], read: dict[str, list[list[dict[str, float]]]]) -> str:
    """What each layout reads of checkpoints of each."""
    rows, most = [], 0.0
    for reader, checkpoints in read.items():
        for writer, ranks in zip(writers, checkpoints, strict=True):
            share = statistics.mean(rank["share"] for rank in ranks)
            total = statistics.mean(rank["read"] for rank in ranks)
            worst = max(rank["most"] for rank in ranks)
            most = max(most, worst)
            rows.append([writer, reader, f"{share / 1e6:,.1f}", f"{total / 1e6:,.1f}", f"{worst:.3f}"])
    bar = Bar("blocks of 16 MiB read of a tensor beyond a rank's share", most, EXCESS_BLOCKS, at_least=False)
    head = ["written by", "read by", "a rank's share, MB", "it reads, MB", "most beyond the share of a tensor, blocks"]
    return f"## Bytes read\n\n{table(head, rows)}\n\n* {bar.text()}"


def file_system_of(folder: Path) -> str:
    """`ext4 (/dev/vda)`."""
    words = ["findmnt", "--noheadings", "--output", "FSTYPE,SOURCE", "--target", str(folder)]
    try:
        kind, device = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError, ValueError):
        return "an unknown file system"
    return f"{kind} ({device})"


if __name__ == "__main__":
    run_cli(benchmark)
