"""What a run reports: lines on the screen and in log.txt, metrics.jsonl with one object per step, and curves. Beside
them samples.jsonl has its text samples, experts.jsonl how many tokens each expert got, and starts.jsonl what the run
was each time that it began or went on.

Only rank 0 owns one of these. After a resume, rows of steps that will be repeated are cut off first, so no curve
doubles back. Nothing of it ever ends a run: what a place cannot take is counted, and the others hear of it
(llm/train/reporting.py).
"""

import json
import os
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from llm import screen
from llm.errors import UserError
from llm.train.curves import CurveSink, curve_of
from llm.train.reporting import Channel, LineFile, reason_of


class RunLog:
    """Screen, log.txt and metrics.jsonl of one run folder, and curves, from step `first_step` on."""

    def __init__(
        self,
        run_dir: Path,
        *,
        first_step: int,
        steps: int,
        interval: int,
        curves: Sequence[CurveSink] = (),
        measures: Collection[str] = (),
    ) -> None:
        """measures: fields of a row that objectives add, beside their losses."""
        self.steps = steps
        self._measures = measures
        self.interval = interval
        self._text, self._metrics = LineFile(run_dir / "log.txt"), LineFile(run_dir / "metrics.jsonl")
        self._screen_channel = Channel("the screen", "lines")
        self._text_channel = Channel(str(run_dir / "log.txt"), "lines")
        self._metrics_channel = Channel(str(run_dir / "metrics.jsonl"), "rows")
        self._more = {name: LineFile(run_dir / f"{name}.jsonl") for name in ("starts", "samples", "experts")}
        self._more_channels = {name: Channel(str(run_dir / f"{name}.jsonl"), "rows") for name in self._more}
        self._experts_every = max(interval, -(-steps // MOST_EXPERT_ROWS))
        self._curves = [(sink, Channel(sink.name, "points of steps")) for sink in curves]
        healed = [cut_from(run_dir / f"{name}.jsonl", first_step) for name in ("metrics", "samples", "experts")]
        self._bar = None
        with suppress(OSError, ValueError):  # a terminal that is gone
            if sys.stderr is not None and sys.stderr.isatty():
                self._bar = tqdm(total=steps, initial=first_step - 1, unit="step", dynamic_ncols=True)
        self._first_step = first_step
        self._started = time.monotonic()
        for line in filter(None, healed):
            self.say(line)

    def say(self, text: str) -> None:
        """A line for the screen and log.txt."""
        lines = text.count("\n") + 1
        self._pass_on(
            self._text_channel.send(lambda: self._text.write(text), lines),
            self._screen_channel.send(lambda: self._show(text), lines),
        )

    def failed(self, error: Exception) -> None:
        """What ends the run, for log.txt alone: the process prints it as its last line when the run has been closed."""
        why = str(error) if isinstance(error, UserError) else reason_of(error)
        self._pass_on(self._text_channel.send(lambda: self._text.write("error: " + " ".join(why.split()))))

    def _pass_on(self, *notes: str | None) -> None:
        """Say what became of one place on those that work; what is lost of this is not counted."""
        for note in notes:
            for action in (self._text.write, self._show) if note else ():
                with suppress(Exception):
                    action(note)  # type: ignore[arg-type]

    def _show(self, text: str) -> None:
        """A line on the screen. OSError where it is gone."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)
        lost = screen.complaint()  # a protected one does not raise
        if lost is not None:
            raise lost

    def begin(self, record: str) -> None:
        """Record what the run is as it begins or goes on: JSON on one line."""
        self._write("starts", record)

    def _write(self, name: str, line: str) -> None:
        self._pass_on(self._more_channels[name].send(lambda: self._more[name].write(line)))

    def experts(self, step: int, counts_ME: Tensor | None) -> None:
        """Record how many tokens each expert of each MoE layer got: every `interval` steps, in a long run at fewer."""
        if counts_ME is not None and step % self._experts_every == 0:
            self._write("experts", json.dumps({"step": step, "counts": counts_ME.tolist()}, separators=(",", ":")))

    def step(self, row: dict[str, Any]) -> None:
        """Record a step: always in metrics.jsonl and the curves, every `interval` steps and at a validation on the
        screen.
        """
        step = row["step"]
        self._pass_on(self._metrics_channel.send(lambda: self._metrics.write(json.dumps(row))))
        named = {curve_of(key, self._measures): value for key, value in row.items() if value is not None}
        points = {name: value for name, value in named.items() if name is not None}
        self._draw(lambda sink: sink.numbers(step, points))
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.update(1)
                self._bar.set_postfix_str(f"loss {_number(row, 'loss', '.4f')}")
        if step % self.interval == 0 or step in (self._first_step, self.steps):
            self.say(self._line(row))
        for line in measured_lines(row):
            self.say(line)

    def first(self, row: dict[str, Any]) -> None:
        """Record a validation before the first step: row 0, which has nothing of a step."""
        self._pass_on(self._metrics_channel.send(lambda: self._metrics.write(json.dumps(row))))
        named = {curve_of(key): value for key, value in row.items() if value is not None}
        points = {name: value for name, value in named.items() if name is not None}
        self._draw(lambda sink: sink.numbers(0, points))
        for line in measured_lines(row):
            self.say(line)

    def sample(self, step: int, prompt: str, text: str, images: Tensor | None = None) -> None:
        """A text sample, on the screen, in log.txt and beside the curves; there also the images that it is about, uint8
        tiles (n, 3, S, S)."""
        self.say(f"--- sample at step {step}, prompt {prompt!r} ---\n{text}\n---")
        self._write("samples", json.dumps({"step": step, "prompt": prompt, "text": text}))
        self._draw(lambda sink: sink.text(step, "sample", text))
        if images is not None:
            self._draw(lambda sink: sink.images(step, "sample", images))

    def _draw(self, action: Callable[[CurveSink], None]) -> None:
        self._pass_on(*(channel.send(partial(action, sink)) for sink, channel in self._curves))

    def close(self) -> None:
        """Flush and close everything."""
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.close()
        self._pass_on(*(channel.end(sink.close) for sink, channel in self._curves))
        self._pass_on(self._metrics_channel.end(self._metrics.close), self._screen_channel.end(_nothing))
        for name, file in self._more.items():
            self._pass_on(self._more_channels[name].end(file.close))
        self._pass_on(self._text_channel.end(self._text.close))

    def _line(self, row: dict[str, Any]) -> str:
        step = row["step"]
        per_step = (time.monotonic() - self._started) / (step - self._first_step + 1)
        left = int(per_step * (self.steps - step))
        return (
            f"step {step:>6}/{self.steps}  loss {_number(row, 'loss', '.4f')}  "
            f"grad norm {_number(row, 'grad_norm', '.3f')}  "
            f"lr {row['lr']:.2e}  "
            f"{row['tokens_per_s']:,.0f} tokens/s  wait {row['data_wait_s'] / row['step_time_s']:.1%}  "
            f"memory {row['memory_gb']:.2f} GB  left {left // 60}:{left % 60:02d}"
        )


MOST_EXPERT_ROWS = 1000
"""Of experts.jsonl, whatever the length of the run: a row may have thousands of numbers, and a map no more columns."""
SAID = {
    "valid_loss": ("validation loss", ".4f"),
    "valid_ppl": ("perplexity", ".2f"),
    "valid_bits_per_byte": ("bits per byte", ".4f"),
    "valid_target_share": ("share of targets", ".1%"),
    "valid_labels_without_both": ("labels without both", ".0f"),
}
"""How some fields of a validation read; the others read as they are called."""


def measured_lines(row: dict[str, Any]) -> list[str]:
    """What a validation and the tasks found, if the row has them: a line each."""
    tasks: dict[str, list[str]] = {}
    for key, value in row.items():
        if key.startswith("eval/") and not key.endswith("_stderr"):
            task, _, metric = key.removeprefix("eval/").rpartition("/")
            error = row.get(f"{key}_stderr")
            said = "no value" if value is None else f"{value:.4f}" + ("" if error is None else f" +- {error:.4f}")
            tasks.setdefault(task, []).append(f"{metric} {said}")
    lines = [f"step {row['step']}: {task}: {', '.join(metrics)}" for task, metrics in tasks.items()]
    return [validation_line(row), *lines] if "valid_loss" in row else lines


def validation_line(row: dict[str, Any]) -> str:
    """What a validation found, in words."""
    parts = []
    for key, value in row.items():
        if key.startswith("valid_") and key != "valid_loss_ema":
            words, form = SAID.get(key, (key.removeprefix("valid_").replace("_", " "), ".4f"))
            parts.append(f"{words} {'has no value' if value is None else format(value, form)}")
    averaged = f"; of the averaged weights {row['valid_loss_ema']:.4f}" if "valid_loss_ema" in row else ""
    return f"step {row['step']}: {', '.join(parts)}{averaged}"


def _number(row: dict[str, Any], key: str, form: str) -> str:
    if row[key] is not None:
        return format(row[key], form)
    return "not computed" if row.get("skipped") == "passed over" else "not finite"


def _nothing() -> None:
    return None


def cut_from(path: Path, first_step: int) -> str | None:
    """Drop rows of `first_step` and later, and what is no row; a line that says what was dropped for being damaged, if
    that was more than the last row, which a kill tears, or why nothing could be dropped.
    """
    try:
        if not path.exists() or path.is_char_device() or path.is_fifo():
            return None  # nothing is kept there
        content = path.read_bytes()
    except OSError as error:
        return f"{path}: rows of repeated steps stay in it ({reason_of(error)})"
    kept: list[bytes] = []
    damaged: list[int] = []
    offset = end = 0  # of a line; behind the last one that is kept
    lines = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        offset += len(line) + 1
        try:
            if int(json.loads(line)["step"]) < first_step:
                kept.append(content[offset - len(line) - 1 : offset])
                end = offset
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            if number < len(lines):
                damaged.append(number)
    try:
        if end < len(content):
            os.truncate(path, end)  # which needs no space on the disk
        if (wanted := b"".join(kept)) != content[:end]:
            _replace(path, wanted)
    except OSError as error:
        return f"{path}: damaged lines and rows of repeated steps stay in it ({reason_of(error)})"
    return f"{path}: dropped damaged lines {damaged}" if damaged else None


def _replace(path: Path, content: bytes) -> None:
    """Write a file anew, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
