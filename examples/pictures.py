"""Pictures: a small model learns to say what colour a square has, and is asked about squares that it has not seen.

    .venv/bin/python examples/pictures.py [FOLDER]

Rows are a picture and its caption, which is trained; the picture passes a tower of two layers, and its vectors stand
among those of the text. Tiles of real models, their recipes and kinds of rows: docs/vision.md. After the run's own
lines it prints (losses differ a little between machines):

    loss 5.53 -> 0.26
    a red square, a green square, a blue square, a white square
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from llm import LLM
from llm.runs import metrics, train

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200), "white": (200, 200, 200)}


def squares(folder: Path, n: int, seed: int) -> list[dict[str, str]]:
    """n pictures of each colour, with noise of their own, and what they show."""
    draw, rows = np.random.default_rng(seed), []
    for i in range(n):
        for name, colour in COLOURS.items():
            levels = np.clip(np.array(colour) + draw.integers(-40, 40, (8, 8, 3)), 0, 255).astype(np.uint8)
            file = f"{name}_{seed}_{i}.png"
            Image.fromarray(levels).save(folder / file)
            rows.append({"image": file, "text": f" a {name} square"})
    return rows


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = squares(folder, 16, seed=0)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tower = {"image_size": 8, "patch_size": 2, "dim": 32, "n_layers": 2, "n_heads": 2, "output_dim": 32}
    config = {
        "model": {"dim": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "vision": tower},
        "tokenizer": {"kind": "bytes"},
        "data": {"train": [{"path": str(folder / "train.jsonl"), "kind": "image_text"}],
                 "cache_dir": str(folder / "cache")},
        "chat": {"add_tokens": True},  # the marks of pictures, which the tokenizer of bytes has not
        "optim": {"lr": 3e-3},
        "train": {"steps": 60, "seq_len": 64, "global_batch_size": 8, "micro_batch_size": 8, "precision": "fp32"},
        "log": {"interval": 20, "tensorboard": False, "report": False},
    }  # fmt: skip
    run = train(config, folder / "run")
    losses = [row["loss"] for row in metrics(run)]
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    unseen = squares(folder, 1, seed=1)
    model = LLM.from_pretrained(run)
    answers = model.generate(["<image>"] * len(unseen), images=[[folder / row["image"]] for row in unseen])
    print(", ".join(answer.strip() for answer in answers))


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "runs/examples/squares"))
