"""Run on one rank or two: short runs of a mixer and for objectives that files outside of the project register, a layout
each; on one rank also what becomes of the first run's model: a text, and a folder of a family from outside and back.

Arguments: the config, the folder for the runs, and the layouts as JSON, by name; one may name a checkpoint.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from llm import LLM
from llm.generate import generate
from llm.parallel.launch import process
from llm.train.config import validate

PROMPT = [97, 98, 99, 32, 100]


def of_its_model(run: Path, out: Path) -> dict[str, Any]:
    """Greedy tokens made through the cache, and those that the whole text says; and how far the logits of the model are
    from those of the one that went out to a foreign folder and came back.
    """
    from tools.convert import export, import_

    model = LLM.from_pretrained(run)
    cached = generate(model, [PROMPT], max_new_tokens=12)[0]
    export(str(run), str(out / "foreign"), family="two_names", quiet=True)
    import_(str(out / "foreign"), str(out / "back"), quiet=True)
    back = LLM.from_pretrained(out / "back")
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + cached])).logits
        difference = float((back(torch.tensor([PROMPT + cached])).logits - logits).abs().max())
    return {
        "cached": cached,
        "whole": logits[0, len(PROMPT) - 1 : -1].argmax(-1).tolist(),
        "family": json.loads((out / "foreign" / "config.json").read_text())["model_type"],
        "difference": difference,
    }


def main() -> None:
    raw, out, layouts = yaml.safe_load(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), json.loads(sys.argv[3])
    process.quiet_libraries()
    world = process.start(60, 1)
    from llm.train.trainer import Trainer

    for name, layout in layouts.items():
        parallel = {key: value for key, value in layout.items() if key != "resume"}
        config = {**raw, "parallel": {"timeout_s": 60, **parallel}}
        config["checkpoint"] = {**raw["checkpoint"], "resume": layout.get("resume", "auto")}
        Trainer(validate(config, name), out / name, world).fit()
    if world.size == 1:
        (out / "model.json").write_text(json.dumps(of_its_model(out / next(iter(layouts)), out)))


if __name__ == "__main__":
    process.run(main)
