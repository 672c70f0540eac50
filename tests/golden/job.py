"""Run under torchrun, or by plain python: golden cases of so many ranks, one after the other, each through the Trainer
and into its own run folder.

Arguments: a JSON object {name of the case: run config}, and the folder for the runs. Beside each run folder, NAME.json
gets what the folder does not say; machine.json says on what machine it was.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from llm import LLM
from llm.generate import generate
from llm.parallel.launch import process
from llm.parallel.precision import has_arithmetic
from llm.tokenizer import load_tokenizer
from llm.train.config import RunConfig, validate
from llm.train.trainer import Trainer
from tests.golden.cases import PROMPTS
from tests.golden.machine import machine
from tests.golden.trace import digest_of
from tools.layouts_job import RouterMargins

NEW_TOKENS = 24


@torch.no_grad()
def greedy(run_dir: Path, config: RunConfig) -> dict[str, Any]:
    """The greedy continuations of the prompts by a trained run, and how near another choice came: the smallest distance
    of the two largest logits, relative to the largest."""
    model, tokenizer = LLM.from_pretrained(run_dir), load_tokenizer(config.tokenizer)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in PROMPTS]
    continuations = generate(model, prompts, max_new_tokens=NEW_TOKENS)
    margins = []
    for prompt, ids in zip(prompts, continuations, strict=True):
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        best = logits.topk(2, dim=-1).values
        margins.append(float((best[:, 0] - best[:, 1]).min() / logits.abs().max()))
    return {"ids": continuations, "margin": min(margins)}


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    configs = {name: validate(raw, name) for name, raw in cases.items()}
    (threads,) = {config.train.threads for config in configs.values()}
    process.quiet_libraries()
    world = process.start(300, threads)
    if world.is_main:
        (out / "machine.json").write_text(json.dumps(machine()))
    for name, config in configs.items():
        found: dict[str, Any] = {"ran": has_arithmetic(config.train.precision)}
        if found["ran"]:
            trainer = Trainer(config, out / name, world)
            margins = None
            if world.size == 1:
                found["initial_weights"] = digest_of(trainer.run.engine.model.named_parameters())
                margins = RouterMargins(trainer.run.engine.model)
            trainer.fit()
            if margins is not None:
                found["router_margin"] = margins.take()
                if config.train.precision == "fp32":
                    found["greedy"] = greedy(out / name, config)
        if world.is_main:
            (out / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    process.run(main)
