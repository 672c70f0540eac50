"""Run under torchrun: forwards of one model that overlap in time, and what each gives when it is alone."""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from llm.args import ModelArgs
from llm.model import LLM
from llm.parallel.grid import make_grid
from llm.parallel.launch import process
from llm.parallel.layout import Layout
from llm.parallel.replica import Replica
from tests.distributed.harness import TINY_MODEL

VOCAB, SEED = 64, 3
LENGTHS = 16, 24


def tokens(length: int) -> Tensor:
    return torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(length))


def loss_of(model: LLM, length: int) -> Tensor:
    """Of rows of this length, with what the router adds on this rank."""
    ids = tokens(length)
    out = model(ids, labels=ids.roll(-1, 1))
    assert out.balance_sum is not None and out.z_sum is not None
    return out.loss_sum + out.balance_sum + out.z_sum


def gradients(model: LLM, losses: list[Tensor]) -> dict[str, Tensor]:
    """Of the sum of the losses, by as many backwards, the last forward's first."""
    model.zero_grad()
    for loss in reversed(losses):
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def main() -> None:
    out = Path(sys.argv[1])
    process.quiet_libraries()
    world = process.start(60, 1)
    args = ModelArgs.model_validate({**TINY_MODEL, "vocab_size": VOCAB})
    grid = make_grid(world, Layout(world.size, tensor=2))
    model = Replica.build(args, SEED, grid).model
    model.activation_checkpointing = "full"
    alone = [gradients(model, [loss_of(model, length)]) for length in LENGTHS]
    losses = [loss_of(model, length) for length in LENGTHS]
    with torch.no_grad():  # of tokens that are not cut evenly, so no rank has a part of them
        model(tokens(15)[:1])
    together = gradients(model, losses)
    apart = max(
        float((together[name] - sum(part[name] for part in alone)).norm() / together[name].norm()) for name in together
    )
    if world.is_main:
        out.write_text(json.dumps({"parameters": len(together), "largest_difference": apart}))


if __name__ == "__main__":
    process.run(main)
