"""How long a real run waits for its data: a short `launch/pretrain.py` over real text, read from its metrics.jsonl."""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from llm.environment import alone
from llm.errors import UserError
from tools.benchmarks.harness import Bar
from tools.stdlib_corpus import write_corpus

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40
FIRST = 5
"""Steps that do not count: the loader's thread is only starting."""
BAR = 0.01

CONFIG: dict[str, Any] = {
    "model": {"dim": 256, "n_layers": 6, "n_heads": 8, "n_kv_heads": 4, "ffn_hidden": 704},
    "tokenizer": {"kind": "bytes"},
    "train": {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 8, "seq_len": 256, "precision": "bf16"},
    "optim": {"warmup_steps": 10},
    "checkpoint": {"interval": STEPS, "keep": 1, "keep_best": False},
    "log": {"tensorboard": False},
}


def data_wait_section() -> str:
    """Run it and say what share of a step is waiting."""
    with tempfile.TemporaryDirectory() as folder:
        rows = short_run(Path(folder))
    shares = [row["data_wait_s"] / row["step_time_s"] for row in rows[FIRST:]]
    bar = Bar("median share of a step spent waiting for data", statistics.median(shares), BAR, at_least=False)
    return (
        f"## Data wait\n\n`launch/pretrain.py`, {STEPS} steps of 8 x 256 bytes of Python's standard library, bf16, one "
        f"process.\n\n* {bar.text()}\n* the longest wait of {len(shares)} steps took {100 * max(shares):.2f} % of its "
        f"step."
    )


def short_run(folder: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl of a run in `folder`."""
    write_corpus(str(folder / "text"))
    config = {**CONFIG, "data": {"train": str(folder / "text" / "train.jsonl"), "cache_dir": str(folder / "cache")}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, str(ROOT / "launch/pretrain.py"), f"--config={folder / 'config.yaml'}"]
    done = subprocess.run(
        [*command, f"--run_dir={folder / 'run'}"], cwd=ROOT, env=alone(), capture_output=True, text=True
    )
    if done.returncode != 0:
        raise UserError(f"launch/pretrain.py ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
