"""A task of your own: sums in plain text, of which only what stands behind "=" is trained.

    .venv/bin/python examples/own_task.py [FOLDER]

A task says which rows a run reads, what it is trained for, and what a validation reports. This one reads text as `lm`
does, has an objective that picks the targets, and reports how many of them were guessed. Its name stands under `task`
in the config. After the run's own lines it prints (numbers differ a little between machines):

    answers are 31% of the tokens
    held out: loss 1.44, 61.8% of the letters of answers right
"""

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llm.args import ModelArgs
from llm.batch import IGNORE, Batch, Targets
from llm.objectives import GuessedTokens, Objective
from llm.runs import metrics, train
from llm.tasks import Task, register
from llm.tasks.base import OpenedRows, RowsWanted
from llm.tasks.rows import opened_rows

EQUALS, END = ord("="), ord("\n")


class Answers(GuessedTokens):
    """Cross entropy of the letters from "=" to the end of a line, and the share of them that is guessed."""

    def targets(self, batch: Batch) -> Targets:
        tokens_BT, labels_BT = batch.inputs.tokens, batch.targets["lm"].labels
        place_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        last_equals_BT = torch.where(tokens_BT == EQUALS, place_T, -1).cummax(1).values
        last_end_BT = torch.where(tokens_BT == END, place_T, -1).cummax(1).values
        return Targets(torch.where(last_equals_BT > last_end_BT, labels_BT, IGNORE))


class Sums(Task):
    name = "sums"
    target = "lm"  # rows of text have these

    def objectives(self, options: Mapping[str, Any] | None = None) -> tuple[Objective, ...]:
        return (Answers(self.name),)

    def open_rows(self, wanted: RowsWanted, tokenizer: Any, world: Any) -> OpenedRows:
        return opened_rows(wanted, tokenizer, world, self)

    def counter(self, tokenizer: Any) -> Callable[[Batch], list[float]]:
        return lambda batch: [Answers(self.name).count(batch), batch.n_tokens]

    def metrics(self, loss_sum: float, counts: Sequence[float]) -> dict[str, float]:
        n_answers, n_tokens = counts
        return {"valid_loss": loss_sum / n_answers, "valid_share": n_answers / n_tokens}

    def fields(self, args: ModelArgs) -> tuple[str, ...]:
        return ("loss", "share", "acc")  # acc comes from the objective


register(Sums())


def sums(n: int, seed: int) -> str:
    draw = random.Random(seed)
    pairs = [(draw.randrange(10), draw.randrange(10)) for _ in range(n)]
    return "".join(f"{a}+{b}={a + b}\n" for a, b in pairs)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text(sums(4000, seed=0))
    (folder / "valid.txt").write_text(sums(400, seed=1))
    config = {
        "task": "sums",
        "model": {"dim": 64, "n_layers": 2, "n_heads": 4},
        "tokenizer": {"kind": "bytes"},
        "data": {"train": str(folder / "train.txt"), "valid": str(folder / "valid.txt"),
                 "cache_dir": str(folder / "cache")},
        "optim": {"lr": 3e-3},
        "train": {"steps": 40, "seq_len": 48, "global_batch_size": 16, "micro_batch_size": 16, "precision": "fp32"},
        "eval": {"interval": 40, "rows": None},
        "log": {"interval": 20, "tensorboard": False, "report": False},
    }  # fmt: skip
    last = metrics(train(config, folder / "run"))[-1]
    print(f"answers are {last['valid_share']:.0%} of the tokens")
    print(f"held out: loss {last['valid_loss']:.2f}, {last['valid_acc']:.1%} of the letters of answers right")


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "runs/examples/sums"))
