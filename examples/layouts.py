"""One model, any layout, one answer: the same run on one process and on two, three ways, and its losses side by side.

    .venv/bin/python examples/layouts.py [FOLDER]

`nproc` starts processes of their own, as the commands do. All of your own config's layouts are compared by
`tools/layouts.py`; which one to choose is another question. After the runs' own lines it prints (float32; the last
digits differ between machines):

    step     one process  data 2, ZeRO-3        tensor 2      pipeline 2
       1        5.572721        5.572721        5.572721        5.572721
       2        5.486097        5.486097        5.486097        5.486097
       3        5.419860        5.419860        5.419860        5.419860
       4        5.375582        5.375582        5.375582        5.375582
       5        5.352959        5.352959        5.352959        5.352959
       6        5.350940        5.350940        5.350940        5.350940
"""

import sys
from pathlib import Path

from llm.runs import metrics, train

LAYOUTS = {
    "one process": (1, {}),
    "data 2, ZeRO-3": (2, {"parallel.zero_stage": 3}),
    "tensor 2": (2, {"parallel.tensor": 2}),
    "pipeline 2": (2, {"parallel.pipeline": 2}),
}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text("".join(f"{a} times {b} is {a * b}.\n" for a in range(30) for b in range(30)))
    config = {
        "model": {"dim": 64, "n_layers": 2, "n_heads": 4, "dropout": 0.1},
        "tokenizer": {"kind": "bytes"},
        "data": {"train": str(folder / "text.txt"), "cache_dir": str(folder / "cache")},
        "train": {"steps": 6, "seq_len": 64, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
        "log": {"interval": 3, "tensorboard": False, "report": False},
    }
    losses = {}
    for name, (nproc, keys) in LAYOUTS.items():
        run = train(config, folder / name.replace(",", "").replace(" ", "_"), overrides=keys, nproc=nproc)
        losses[name] = [row["loss"] for row in metrics(run)]
    print("step" + "".join(f"{name:>16}" for name in losses))
    for step, row in enumerate(zip(*losses.values(), strict=True), 1):
        print(f"{step:>4}" + "".join(f"{loss:>16.6f}" for loss in row))


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "runs/examples/layouts"))
