"""One peer of tools/benchmarks/finetune.py, in the environment of the peers: TRL's SFTTrainer in one of its modes, or a
plain loop over a model of transformers. Imports nothing of this project, which is not installed there.

    .venv-peers/bin/python tools/benchmarks/finetune_peer.py MODE FOLDER

It answers lines on stdin with JSON lines: `N` makes N steps and gives [CPU seconds, targets]; `mark` sets the
high-water mark of memory back; `peak` gives bytes resident at most since, above what was there before the model.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import numpy as np
import torch
import transformers

ROWS = 2
"""Packed rows of a step, and of an unpacked one twice as many samples."""
IGNORE = -100


def resident(field: str) -> int:
    """VmRSS or VmHWM in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


class Clock:
    """Answers the other side between steps. Whatever libraries print from then on goes to stderr."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self.before = resident("VmRSS")
        self.left = self.targets = 0
        self.started: float | None = None

    def begin(self) -> bool:
        """Called before each step: waits until one is asked for; False when none will be."""
        while not self.left:
            if self.started is not None:
                self.answer([time.process_time() - self.started, self.targets])
            self.started, self.targets = None, 0
            line = sys.stdin.readline().strip()
            if not line:
                return False
            if line == "mark":
                Path("/proc/self/clear_refs").write_text("5")
                self.answer(None)
            elif line == "peak":
                self.answer(resident("VmHWM") - self.before)
            else:
                self.left, self.started = int(line), time.process_time()
        self.left -= 1
        return True

    def answer(self, value: Any) -> None:
        print(json.dumps(value), file=self.answers, flush=True)


def model_in(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="sdpa").float()


def plain_loop(folder: Path) -> None:
    """A model of transformers, AdamW and clipping, over the rows that ours trains on, samples apart by positions."""
    rows = np.load(folder / "rows.npz")
    tokens, labels, positions = (torch.from_numpy(rows[name]) for name in ("tokens", "labels", "positions"))
    clock, model, at = Clock(), model_in(folder).train(), 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    while clock.begin():
        pick = [(at + i) % len(tokens) for i in range(ROWS)]
        at += ROWS
        targets = labels[pick]
        logits = model(input_ids=tokens[pick], position_ids=positions[pick], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.targets += int((targets != IGNORE).sum())


def trl_trainer(mode: str, folder: Path) -> None:
    """SFTTrainer over the samples."""
    import datasets
    import trl

    samples = json.loads((folder / "samples.json").read_text())
    dataset = datasets.Dataset.from_list(
        [{"input_ids": sample["tokens"], "assistant_masks": sample["trained"]} for sample in samples["samples"]]
    )
    modes: dict[str, dict[str, Any]] = {
        "bfd": {"packing": True, "packing_strategy": "bfd"},
        "wrapped": {"packing": True, "packing_strategy": "wrapped"},
        "group_by_length": {"train_sampling_strategy": "group_by_length"},
        "padded": {},
    }
    settings = modes[mode]
    rows = ROWS if settings.get("packing") else 2 * ROWS
    config = trl.SFTConfig(
        output_dir=str(folder / f"trl-{mode}"), max_length=samples["length"],
        per_device_train_batch_size=rows, learning_rate=1e-4, lr_scheduler_type="constant", max_grad_norm=1.0,
        max_steps=1_000_000, logging_strategy="no", save_strategy="no", report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, optim="adamw_torch_fused", seed=0, disable_tqdm=True, **settings,
    )  # fmt: skip
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "model")
    clock = Clock()

    class Counting(trl.SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            if not clock.begin():
                sys.exit()
            clock.targets += int((inputs["labels"][..., 1:] != IGNORE).sum())
            return super().training_step(model, inputs, *rest)

    Counting(model=model_in(folder), args=config, train_dataset=dataset, processing_class=tokenizer).train()


if __name__ == "__main__":
    chosen, where = sys.argv[1], Path(sys.argv[2])
    if chosen == "plain":
        plain_loop(where)
    else:
        trl_trainer(chosen, where)
