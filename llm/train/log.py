"""What a run tells: lines on the screen and in log.txt, metrics.jsonl with one object per step, TensorBoard curves.

Only rank 0 owns one of these. After a resume, rows of steps that will be repeated are cut off first, so no curve
doubles back.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

TENSORBOARD_NAMES = {
    "loss": "train/loss",
    "lm_loss": "train/lm_loss",
    "moe_balance_loss": "train/moe_balance_loss",
    "moe_z_loss": "train/moe_z_loss",
    "grad_norm": "optim/grad_norm",
    "lr": "optim/lr",
    "tokens_per_s": "throughput/tokens_per_s",
    "data_wait_s": "throughput/data_wait_s",
    "memory_gb": "memory/peak_gb",
    "valid_loss": "val/loss",
    "valid_ppl": "val/ppl",
    "valid_bits_per_byte": "val/bits_per_byte",
}


class RunLog:
    """Screen, log.txt, metrics.jsonl and tb/ of one run folder, from step `first_step` on."""

    def __init__(self, run_dir: Path, *, first_step: int, steps: int, interval: int, tensorboard: bool) -> None:
        self.steps = steps
        self.interval = interval
        self._text = open(run_dir / "log.txt", "a", buffering=1)  # noqa: SIM115 (closed by close)
        self._metrics_path = run_dir / "metrics.jsonl"
        _cut_from(self._metrics_path, first_step)
        self._metrics = open(self._metrics_path, "a", buffering=1)  # noqa: SIM115
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tb"), purge_step=first_step)
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=first_step - 1, unit="step", dynamic_ncols=True)
        self._first_step = first_step
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        """A line for the screen and log.txt."""
        print(text, file=self._text)
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def step(self, row: dict[str, Any]) -> None:
        """Record a step: always in metrics.jsonl and the curves, every `interval` steps and at a validation on the
        screen.
        """
        step = row["step"]
        self._metrics.write(json.dumps(row) + "\n")
        if self._board is not None:
            for key, name in TENSORBOARD_NAMES.items():
                if row.get(key) is not None:
                    self._board.add_scalar(name, row[key], step)
        if self._bar is not None:
            self._bar.update(1)
            self._bar.set_postfix_str(f"loss {row['loss']:.4f}")
        if step % self.interval == 0 or step in (self._first_step, self.steps):
            self.say(self._line(row))
        if "valid_loss" in row:
            self.say(
                f"step {step}: validation loss {row['valid_loss']:.4f}, perplexity {row['valid_ppl']:.2f}, "
                f"bits per byte {row['valid_bits_per_byte']:.4f}"
            )

    def sample(self, step: int, prompt: str, text: str) -> None:
        """A text sample, on the screen, in log.txt and in TensorBoard."""
        self.say(f"--- sample at step {step}, prompt {prompt!r} ---\n{text}\n---")
        if self._board is not None:
            self._board.add_text("sample", text, step)

    def close(self) -> None:
        """Flush and close everything."""
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()
        self._metrics.close()
        self._text.close()

    def _line(self, row: dict[str, Any]) -> str:
        step = row["step"]
        per_step = (time.monotonic() - self._started) / (step - self._first_step + 1)
        left = int(per_step * (self.steps - step))
        return (
            f"step {step:>6}/{self.steps}  loss {row['loss']:.4f}  grad norm {row['grad_norm']:.3f}  "
            f"lr {row['lr']:.2e}  "
            f"{row['tokens_per_s']:,.0f} tokens/s  wait {row['data_wait_s'] / row['step_time_s']:.1%}  "
            f"memory {row['memory_gb']:.2f} GB  left {left // 60}:{left % 60:02d}"
        )


def _cut_from(path: Path, first_step: int) -> None:
    """Drop rows of `first_step` and later, and a torn last row, by writing the rest anew."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] < first_step:
                kept.append(line)
        except (ValueError, KeyError):
            break  # the row that a kill tore; nothing valid follows it
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    os.replace(temporary, path)
