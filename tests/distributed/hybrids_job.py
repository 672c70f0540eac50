"""Run under torchrun: how far hybrids that are cut over two tensor-parallel ranks are from themselves, whole and
however their tokens come, in float64."""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from llm import LLM, ModelArgs
from llm.cache import Cache
from llm.datatypes import TransformerInput
from llm.parallel.collectives import gather_json
from llm.parallel.grid import make_grid
from llm.parallel.launch import process
from llm.parallel.layout import Layout
from llm.parallel.replica import Replica

PATTERNS = {
    "state-space": "ssm", "strides": "ssm@4,attn@3", "routed": "routed", "all": "ssm,routed,ssm@3,attn@2",
    "parts and sums": "sum,none+dense,ssm+none,attn+none",
}  # fmt: skip
LENGTH = 37
SPLITS = ([1] * LENGTH, [5, 1, 12, 19])
BOUNDS = [0, 3, 4, 20, 37]


def args_of(pattern: str) -> ModelArgs:
    return ModelArgs.model_validate(
        dict(
            dim=32, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=50, layer_pattern=pattern, ffn_hidden=48,
            ssm={"d_state": 8, "head_width": 8, "chunk": 8, "groups": 2},
            route={"rate": 0.4, "max_rate": 0.5, "burst": 2}, init_std=0.1,
        )
    )  # fmt: skip


def hidden(model: LLM, inputs: TransformerInput | Tensor, cache: Cache | None = None) -> Tensor:
    found = model(inputs, cache=cache, return_hidden=True).hidden
    assert found is not None
    return found


@torch.no_grad()
def faults(model: LLM, whole: LLM) -> dict[str, float]:
    """Largest differences, relative to the largest value."""
    tokens = torch.randint(0, 50, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    expected = hidden(whole, tokens)

    def apart(found: Tensor, right: Tensor) -> float:
        return ((found - right).abs().max() / expected.abs().max()).item()

    found = {"whole": apart(hidden(model, tokens), expected)}
    for number, splits in enumerate(SPLITS):
        cache = Cache(model.args)
        parts = [hidden(model, part, cache) for part in tokens.split(splits, dim=1)]
        found[f"in parts {number}"] = apart(torch.cat(parts, 1), expected)
    packed = hidden(model, TransformerInput(tokens, cu_seqlens=torch.tensor(BOUNDS)))
    for first, end in zip(BOUNDS, BOUNDS[1:], strict=False):
        found[f"packed {first}"] = apart(packed[:, first:end], hidden(whole, tokens[:, first:end]))
    positions = torch.cat([torch.full((1, 8), -1), torch.arange(LENGTH)[None]], 1)
    padded = TransformerInput(torch.cat([torch.zeros(1, 8, dtype=torch.int64), tokens], 1), tokens_position=positions)
    found["padded"] = apart(hidden(model, padded)[:, 8:], expected)
    return found


def main() -> None:
    process.quiet_libraries()
    world = process.start(60, 1)
    report = {}
    for name, pattern in PATTERNS.items():
        args = args_of(pattern)
        replica = Replica.build(args, 0, make_grid(world, Layout(world.size, tensor=2)))
        report[name] = gather_json(faults(replica.model.double().eval(), LLM(args, seed=0).double().eval()), world)
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(report))


if __name__ == "__main__":
    process.run(main)
