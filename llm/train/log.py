"""What a run tells: lines on the screen and in log.txt, metrics.jsonl with one object per step, curves in TensorBoard
and Weights & Biases.

Only rank 0 owns one of these. After a resume, rows of steps that will be repeated are cut off first, so no curve
doubles back.
"""

import html
import json
import os
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from llm.atomic import write_file
from llm.errors import UserError

CURVES = {
    "loss": "train/loss",
    "lm_loss": "train/lm_loss",
    "moe_balance_loss": "train/moe_balance_loss",
    "moe_z_loss": "train/moe_z_loss",
    "grad_norm": "optim/grad_norm",
    "lr": "optim/lr",
    "batch_size": "optim/batch_size",
    "seq_len": "optim/seq_len",
    "tokens_per_s": "throughput/tokens_per_s",
    "mfu": "throughput/mfu",
    "data_wait_s": "throughput/data_wait_s",
    "memory_gb": "memory/peak_gb",
    "valid_loss": "val/loss",
    "valid_loss_ema": "val/loss_ema",
    "valid_ppl": "val/ppl",
    "valid_bits_per_byte": "val/bits_per_byte",
}
"""Fields of a row that are drawn, and under which name."""
WANDB_ID = "wandb_id"
"""File in the run folder with the identity of the run at Weights & Biases."""


class CurveSink(Protocol):
    """Where curves are drawn."""

    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Points of the curves named in `values`."""

    def text(self, step: int, name: str, text: str) -> None:
        """A text sample."""

    def close(self) -> None:
        """Flush."""


class TensorBoard:
    """Curves in `tb/` of the run folder."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(run_dir / "tb"), purge_step=first_step)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._board.add_text(name, text, step)

    def close(self) -> None:
        self._board.close()


class WeightsAndBiases:
    """Curves at Weights & Biases; WANDB_MODE, WANDB_PROJECT and the like have their usual say.

    The run's identity lies in the run folder, so that after a resume the same curves go on. Steps that are repeated are
    dropped there, as steps only grow; they would have the same values.
    """

    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        """`config` is shown beside the curves. UserError where the service refuses, for want of a key or a network."""
        import wandb

        file = run_dir / WANDB_ID
        if not file.exists():
            write_file(file, secrets.token_hex(8).encode())
        try:
            self._run = wandb.init(
                id=file.read_text().strip(),
                name=run_dir.resolve().name,
                dir=str(run_dir),
                config=config,
                resume="allow",
            )
        except wandb.Error as error:
            raise UserError(f"log.wandb=true: {error}; try `wandb login`, or WANDB_MODE=offline") from None

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        import wandb

        self._run.log({name: wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def close(self) -> None:
        self._run.finish()


class RunLog:
    """Screen, log.txt and metrics.jsonl of one run folder, and curves, from step `first_step` on."""

    def __init__(
        self, run_dir: Path, *, first_step: int, steps: int, interval: int, curves: Sequence[CurveSink] = ()
    ) -> None:
        self.steps = steps
        self.interval = interval
        self._text = open(run_dir / "log.txt", "a", buffering=1)  # noqa: SIM115 (closed by close)
        self._metrics_path = run_dir / "metrics.jsonl"
        healed = cut_from(self._metrics_path, first_step)
        self._metrics = open(self._metrics_path, "a", buffering=1)  # noqa: SIM115
        self._curves = curves
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=first_step - 1, unit="step", dynamic_ncols=True)
        self._first_step = first_step
        self._started = time.monotonic()
        if healed:
            self.say(healed)

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
        points = {name: row[key] for key, name in CURVES.items() if row.get(key) is not None}
        for sink in self._curves:
            sink.numbers(step, points)
        if self._bar is not None:
            self._bar.update(1)
            self._bar.set_postfix_str(f"loss {_number(row['loss'], '.4f')}")
        if step % self.interval == 0 or step in (self._first_step, self.steps):
            self.say(self._line(row))
        if "valid_loss" in row:
            self.say(
                f"step {step}: validation loss {row['valid_loss']:.4f}, perplexity {row['valid_ppl']:.2f}, "
                f"bits per byte {row['valid_bits_per_byte']:.4f}"
                + (f"; of the averaged weights {row['valid_loss_ema']:.4f}" if "valid_loss_ema" in row else "")
            )

    def sample(self, step: int, prompt: str, text: str) -> None:
        """A text sample, on the screen, in log.txt and beside the curves."""
        self.say(f"--- sample at step {step}, prompt {prompt!r} ---\n{text}\n---")
        for sink in self._curves:
            sink.text(step, "sample", text)

    def close(self) -> None:
        """Flush and close everything."""
        if self._bar is not None:
            self._bar.close()
        for sink in self._curves:
            sink.close()
        self._metrics.close()
        self._text.close()

    def _line(self, row: dict[str, Any]) -> str:
        step = row["step"]
        per_step = (time.monotonic() - self._started) / (step - self._first_step + 1)
        left = int(per_step * (self.steps - step))
        return (
            f"step {step:>6}/{self.steps}  loss {_number(row['loss'], '.4f')}  "
            f"grad norm {_number(row['grad_norm'], '.3f')}  "
            f"lr {row['lr']:.2e}  "
            f"{row['tokens_per_s']:,.0f} tokens/s  wait {row['data_wait_s'] / row['step_time_s']:.1%}  "
            f"memory {row['memory_gb']:.2f} GB  left {left // 60}:{left % 60:02d}"
        )


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def cut_from(path: Path, first_step: int) -> str | None:
    """Drop rows of `first_step` and later, and what is no row, by writing the rest anew; a line that says what was
    dropped for being damaged, if that was more than the last row, which a kill tears."""
    if not path.exists():
        return None
    kept, damaged = [], []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            if int(json.loads(line)["step"]) < first_step:
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines):
                damaged.append(number)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    os.replace(temporary, path)
    return f"{path}: dropped damaged lines {damaged}" if damaged else None
