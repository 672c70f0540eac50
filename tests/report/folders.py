"""Run folders as a run would have written them, of any length, without training."""

import json
import math
from pathlib import Path
from typing import Any

import yaml

SCRIPT = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
"""What a text may hold and a page must not run."""
SPIKE = 97.25


def write_run(
    folder: Path, steps: int, *, fields: int = 12, moe: tuple[int, int] | None = None, lr: float = 0.001, **config: Any
) -> Path:
    """A finished run with a spike of the loss at two fifths. fields: further numbers of a row. moe: layers and experts.
    """
    folder.mkdir(parents=True)
    spike = steps * 2 // 5
    more = ", ".join(f'"measure_{i}": {i + 0.5}' for i in range(fields))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            loss = SPIKE if step == spike else 2 + 8 * math.exp(-5 * step / steps) + step * 7919 % 13 / 100
            row = f'{{"step": {step}, "loss": {loss:.6f}, "grad_norm": {1 + step * 7907 % 17 / 10}, "lr": {lr}, '
            row += f'"tokens": {step * 4096}, "epoch": {step / 1000}, "batch_size": 8, "seq_len": 512, '
            row += f'"skipped": null, "tokens_per_s": {5000 + step % 7}, "tokens_per_s_per_device": 625.5, '
            row += '"step_time_s": 0.8, "data_wait_s": 0.02, "memory_gb": 3.25, "mfu": null, '
            row += f'"loss/code": {loss + 0.5:.6f}, {more}'
            if step % (steps // 5) == 0:
                row += f', "valid_loss": {loss + 0.25:.6f}, "eval/arc/acc": 0.5, "eval/arc/acc_stderr": 0.01'
            file.write(row + "}\n")
    raw = {"train": {"steps": steps}, "optim": {"lr": lr}, "parallel": {"tensor": 2}, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    if moe is not None:
        counts = [[[(step + layer) % 3 * 10 + expert for expert in range(moe[1])] for layer in range(moe[0])]
                  for step in range(10)]  # fmt: skip
        rows = [json.dumps({"step": 10 * (i + 1), "counts": table}) for i, table in enumerate(counts)]
        (folder / "experts.jsonl").write_text("".join(f"{row}\n" for row in rows))
    return folder


def add_start(folder: Path, step: int, ranks: int, **layout: Any) -> None:
    """The line of starts.jsonl of a run that begins or goes on."""
    source = {"name": f"web{SCRIPT}", "given": "web.jsonl", "rows": 1000, "slots": 4096, "documents": 77}
    record = {"step": step, "ranks": ranks, "device": "cuda", "layout": {"world": ranks, **layout}, "seq_len": 512}
    record |= {"consumed_rows": 8 * step, "parameters": 123, "sources": [source]}
    record |= {"moe_layers": ["layers.1", "layers.3"]}
    with (folder / "starts.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
