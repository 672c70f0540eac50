"""Train a small model from Python, from nothing, and continue a text with it: half a minute on one CPU core.

    .venv/bin/python examples/train_in_30_lines.py [FOLDER]

The text is the Zen of Python, letter by letter, until the model knows it by heart. Everything is one dict, the same as
a YAML file of `launch/pretrain.py`; the run goes into FOLDER/run (default: runs/examples/zen), and the same command
again goes on with it. It prints the run's own lines, then:

    loss 5.56 -> 0.24
    Beautiful is better than ugly.
    Explicit is better than implicit.
"""

import contextlib
import io
import sys
from pathlib import Path

from llm import LLM
from llm.runs import metrics, train

folder = Path(sys.argv[1] if sys.argv[1:] else "runs/examples/zen")
folder.mkdir(parents=True, exist_ok=True)
with contextlib.redirect_stdout(io.StringIO()) as zen:
    import this  # noqa: F401  (importing it prints it)
(folder / "zen.txt").write_text(zen.getvalue() * 30)  # so that rows begin at every letter of it

config = {
    "model": {"dim": 64, "n_layers": 1, "n_heads": 4, "max_seq_len": 128},
    "tokenizer": {"kind": "bytes"},
    "data": {"train": str(folder / "zen.txt"), "cache_dir": str(folder / "cache")},
    "optim": {"lr": 5e-3, "min_lr": 5e-4, "warmup_steps": 10},
    "train": {"steps": 200, "seq_len": 64, "global_batch_size": 8, "micro_batch_size": 8, "precision": "fp32"},
    "log": {"interval": 50, "tensorboard": False, "report": False},
}
run = train(config, folder / "run")
losses = [row["loss"] for row in metrics(run)]
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
print("Beautiful is" + LLM.from_pretrained(run).generate("Beautiful is", max_new_tokens=52))
