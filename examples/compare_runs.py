"""Several runs side by side: the same text and steps, another key in each, and a table of what came of them.

    .venv/bin/python examples/compare_runs.py [FOLDER]

Order of rows, initial values and held-out rows come from the seed alone, so that the runs differ in nothing else. The
same with files and a resumable table from the shell: tools/sweep.py. After the runs' own lines it prints (numbers
differ a little between machines, the order does not):

    run            parameters    first    last   held out
    wide              590,976    5.602   1.179      1.142
    plain             164,416    5.593   2.494      2.473
    slow              164,416    5.593   4.763      4.740
"""

import sys
from pathlib import Path

from llm import LLM
from llm.runs import metrics, train

TEXT = "".join(f"{a} times {b} is {a * b}.\n" for a in range(20) for b in range(20))
RUNS = {
    "plain": {},
    "slow": {"optim.lr": 3e-4},
    "wide": {"model.dim": 128},
}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(TEXT)
    config = {
        "model": {"dim": 64, "n_layers": 2, "n_heads": 4},
        "tokenizer": {"kind": "bytes"},
        "data": {"train": [{"path": str(folder / "text.txt"), "separator": "\n"}], "valid": 0.1,
                 "cache_dir": str(folder / "cache")},
        "optim": {"lr": 3e-3},
        "train": {"steps": 24, "seq_len": 32, "global_batch_size": 8, "micro_batch_size": 8, "precision": "fp32"},
        "eval": {"interval": 24, "rows": None},
        "checkpoint": {"interval": 24},
        "log": {"interval": 12, "tensorboard": False, "report": False},
    }  # fmt: skip
    table = []
    for name, overrides in RUNS.items():
        run = train(config, folder / name, overrides=overrides)
        rows, model = metrics(run), LLM.from_pretrained(run)
        table.append((rows[-1]["valid_loss"], name, sum(p.numel() for p in model.parameters()), rows))
    print(f"{'run':<12}{'parameters':>13}{'first':>9}{'last':>8}{'held out':>11}")
    for held_out, name, n_parameters, rows in sorted(table, key=lambda row: row[0]):
        print(f"{name:<12}{n_parameters:>13,}{rows[0]['loss']:>9.3f}{rows[-1]['loss']:>8.3f}{held_out:>11.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "runs/examples/compared"))
