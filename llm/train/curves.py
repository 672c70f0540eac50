"""Where the numbers of a run are drawn: TensorBoard, Weights & Biases.

A sink raises where it cannot take something; the log counts that and goes on (llm/train/log.py).
"""

import html
import secrets
import textwrap
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from llm.atomic import write_file
from llm.errors import UserError
from llm.train.reporting import Opened

CURVES = {
    "loss": "train/loss",
    "grad_norm": "optim/grad_norm",
    "lr": "optim/lr",
    "batch_size": "optim/batch_size",
    "seq_len": "optim/seq_len",
    "tokens_per_s": "throughput/tokens_per_s",
    "mfu": "throughput/mfu",
    "step_time_s": "throughput/step_time_s",
    "data_wait_s": "throughput/data_wait_s",
    "memory_gb": "memory/peak_gb",
    "epoch": "progress/epoch",
    "expert_load": "moe/expert_load",
    "expert_rank_load": "moe/expert_rank_load",
    "moe_overflow": "moe/overflow",
}
"""Fields of a row that are drawn, and under which name; beside them what a validation says, the metrics of tasks, and
the losses and measures of objectives and sources."""
WANDB_ID = "wandb_id"
"""File in the run folder with the identity of the run at Weights & Biases."""


def curve_of(field: str, measures: Collection[str] = ()) -> str | None:
    """The name under which a field of a row is drawn; None where it is not. measures: fields of objectives."""
    if field in measures:
        return f"train/{field}"
    if field.startswith("eval/"):
        return None if field.endswith("_stderr") else field
    if field.startswith("valid_"):
        return f"val/{field.removeprefix('valid_')}"
    if field.startswith("loss/") or (field.endswith("_loss") and field not in CURVES):
        return f"train/{field}"
    return CURVES.get(field)


class CurveSink(Protocol):
    """Where curves are drawn."""

    name: str
    """For messages."""

    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Points of the curves named in `values`."""

    def text(self, step: int, name: str, text: str) -> None:
        """A text sample."""

    def images(self, step: int, name: str, tiles: Tensor) -> None:
        """The images of a text sample: uint8 (n, 3, S, S)."""

    def close(self) -> None:
        """Flush."""


class TensorBoard:
    """Curves in `tb/` of the run folder. After a failure, of its writing thread too, a new file is begun there."""

    name = "tb/ (TensorBoard)"

    def __init__(self, run_dir: Path, first_step: int, config: str = "") -> None:
        """config: as YAML, shown as a text of the step before the first one."""
        self._folder, self._next_step, self._config = run_dir / "tb", first_step, config
        self._board: Opened[Any] = Opened(self._open, lambda board: board.close())

    def _open(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _without_writer_threads
        board = SummaryWriter(str(self._folder), purge_step=self._next_step)
        if self._config:  # indented, which Markdown shows as it is
            board.add_text("config", textwrap.indent(self._config, "    "), self._next_step - 1)
        return board

    def numbers(self, step: int, values: dict[str, float]) -> None:
        def add(board: Any) -> None:
            for name, value in values.items():
                board.add_scalar(name, value, step)

        self._next_step = step  # where a file that is begun now replaces the ones before
        self._board.use(add)

    def text(self, step: int, name: str, text: str) -> None:
        self._next_step = step + 1  # the numbers of this step are there
        self._board.use(lambda board: board.add_text(name, text, step))

    def images(self, step: int, name: str, tiles: Tensor) -> None:
        self._board.use(lambda board: board.add_images(name, tiles, step))

    def close(self) -> None:
        self._board.close()


def _without_writer_threads(failed: threading.ExceptHookArgs) -> None:
    """For threading.excepthook: what ends a writing thread of TensorBoard is reported by the next use of it."""
    if type(failed.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(failed)


class WeightsAndBiases:
    """Curves at Weights & Biases; WANDB_MODE, WANDB_PROJECT and the like have their usual say.

    The run's identity lies in the run folder, so that after a resume the same curves go on. Steps that are repeated are
    dropped there, as steps only grow; they would have the same values.
    """

    name = "Weights & Biases"

    def __init__(self, run_dir: Path, config: dict[str, Any], resumed: bool = False) -> None:
        """`config` is shown beside the curves. UserError where the service refuses, for want of a key or a network;
        not where a run is `resumed`, which trains on without and tries again.
        """
        self._run_dir, self._config = run_dir, config
        self._run: Opened[Any] = Opened(self._open, lambda run: run.finish())
        if not resumed:
            self._run.use(lambda run: None)

    def _open(self) -> Any:
        import wandb

        file = self._run_dir / WANDB_ID
        if not file.exists():
            write_file(file, secrets.token_hex(8).encode())
        try:
            return wandb.init(
                id=file.read_text(encoding="utf-8").strip(),
                name=self._run_dir.resolve().name,
                dir=str(self._run_dir),
                config=self._config,
                resume="allow",
            )
        except wandb.Error as error:
            raise UserError(f"log.wandb=true: {error}; try `wandb login`, or WANDB_MODE=offline") from None

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self._run.use(lambda run: run.log(values, step=step))

    def text(self, step: int, name: str, text: str) -> None:
        import wandb

        page = wandb.Html(f"<pre>{html.escape(text)}</pre>")
        self._run.use(lambda run: run.log({name: page}, step=step))

    def images(self, step: int, name: str, tiles: Tensor) -> None:
        import wandb

        pictures = [wandb.Image(tile.permute(1, 2, 0).numpy()) for tile in tiles]
        self._run.use(lambda run: run.log({f"{name}_images": pictures}, step=step))

    def close(self) -> None:
        self._run.close()
