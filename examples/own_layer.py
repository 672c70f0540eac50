"""A layer of your own: a mixer that hands each token a part of the one before it, registered, trained, sampled.

    .venv/bin/python examples/own_layer.py [FOLDER]

The layer pattern [shift, attn] names it: three layers of Shift, and one of attention. Nothing else is needed for its
checkpoints, for tensor and pipeline parallelism, or ZeRO. Commands that read the run get the class by
`--extensions=examples/own_layer.py`. docs/extend/moving_average.py is a mixer with a state in float32 and the reasons
why. After the run's own lines it prints (losses differ a little between machines):

    layers: shift, shift, shift, attn
    loss 5.50 -> 1.97; 3 layers of Shift with 36,864 parameters
    'ab ba ab' goes on ' ba ab ba ab ba'
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llm import LLM
from llm.args import LayerSpec, ModelArgs
from llm.args.layers import LayerItem, MixerSpec, refuse
from llm.layers.context import Context
from llm.layers.linear import Linear
from llm.layers.mixers import register
from llm.layers.parameter import Rows, under, weights
from llm.layers.region import InRegion
from llm.runs import metrics, train


@dataclass
class Last:
    """What generation keeps between two calls: the last token's vector of each row, (B, D)."""

    x_BD: Tensor

    @property
    def nbytes(self) -> int:
        return self.x_BD.nbytes

    def reorder(self, rows: Tensor) -> None:
        self.x_BD = self.x_BD[rows.to(self.x_BD.device)]


class Shift(nn.Module, InRegion):
    """out(silu(now(x_t) + before(x_{t-1}))); a document's first token has nothing before it."""

    def __init__(self, args: ModelArgs, spec: LayerSpec) -> None:
        super().__init__()
        self.layer = spec.index
        self.now, self.before = Linear(args.dim, args.dim), Linear(args.dim, args.dim)
        self.out = Linear(args.dim, args.dim)

    @staticmethod
    def resolve(args: ModelArgs, item: LayerItem) -> MixerSpec:
        if item.flags:
            refuse(item.text, f"unknown flag :{item.flags[0]}; shift has none")
        return MixerSpec(item.mixer)

    @staticmethod
    def declare(args: ModelArgs, spec: LayerSpec) -> Rows:
        into = Linear.declare(args.dim, args.dim, False, weights(args), tensor_dim=0)
        out = Linear.declare(args.dim, args.dim, False, weights(args, writes_residual=True), tensor_dim=1)
        return {**under("now", into), **under("before", into), **under("out", out)}

    @staticmethod
    def flops(args: ModelArgs, spec: LayerSpec, seq_len: int) -> int:
        return 0  # its weights are counted by themselves

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        x_BTD = self.region.enter(x_BTD, ctx.cut_sequence).view(*ctx.shape, -1)
        first_BD = torch.zeros_like(x_BTD[:, 0])
        if ctx.states is not None:  # rows that are being continued
            last = ctx.states.state(self.layer, lambda: Last(first_BD))
            first_BD = last.x_BD
        valid_BT = x_BTD.new_ones(ctx.shape, dtype=torch.bool) if ctx.valid_BT is None else ctx.valid_BT
        joined = torch.cat([first_BD[:, None], x_BTD], dim=1)
        place_T = torch.arange(1, ctx.shape[1] + 1, device=x_BTD.device)
        latest_BT = torch.where(valid_BT, place_T, 0).cummax(1).values  # padding hands nothing on
        before_BTD = joined.gather(1, nn.functional.pad(latest_BT[:, :-1], (1, 0))[..., None].expand_as(x_BTD))
        if ctx.states is not None:
            last.x_BD = joined[torch.arange(len(joined)), latest_BT[:, -1]]
        elif ctx.starts_BT is not None:
            before_BTD = before_BTD.masked_fill(ctx.starts_BT[..., None], 0)
        mixed = nn.functional.silu(self.now(x_BTD) + self.before(before_BTD))
        return self.region.leave(self.out(mixed), ctx.cut_sequence)


register("shift", Shift)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text("ab ba " * 2000)
    config = {
        "model": {"dim": 64, "n_layers": 4, "n_heads": 4, "layer_pattern": ["shift", "shift", "shift", "attn"]},
        "tokenizer": {"kind": "bytes"},
        "data": {"train": str(folder / "text.txt"), "cache_dir": str(folder / "cache")},
        "optim": {"lr": 3e-3},
        "train": {"steps": 20, "seq_len": 32, "global_batch_size": 8, "micro_batch_size": 8, "precision": "fp32"},
        "log": {"interval": 10, "tensorboard": False, "report": False},
    }
    run = train(config, folder / "run")
    losses = [row["loss"] for row in metrics(run)]
    model = LLM.from_pretrained(run)
    own = [module for module in model.modules() if isinstance(module, Shift)]
    n_parameters = sum(p.numel() for module in own for p in module.parameters())
    print(f"layers: {', '.join(spec.mixer.name for spec in model.args.layer_specs())}")
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; {len(own)} layers of Shift with {n_parameters:,} parameters")
    print(f"'ab ba ab' goes on {model.generate('ab ba ab', max_new_tokens=15)!r}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "runs/examples/layer"))
