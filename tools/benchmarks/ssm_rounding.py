"""What it costs that decays, skips and biases of time steps (A_log, D, dt_bias) of state-space layers are bf16 in a
bf16 model, beside all that is: distance of final hidden states from those of the same weights in float64.

    python tools/benchmarks/ssm_rounding.py

Their masters are float32 in every run; it is what the forward reads that is rounded.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from llm import LLM, ModelArgs
from llm.cache import Cache
from llm.cli import run_cli
from tools.benchmarks.harness import RESULTS, table, write_result

KEPT = ("A_log", "attention.D", "dt_bias")
DECODED, EDGE = 256, 64
"""Tokens that are made one by one behind the others; tokens that are first and last."""


def benchmark(length: int = 2048, output: str = str(RESULTS)) -> None:
    """Measure and write a dated result file.

    length: tokens of the text
    output: folder of the result file
    """
    torch.manual_seed(0)
    args = ModelArgs(
        dim=256, n_layers=4, n_heads=4, vocab_size=256, layer_pattern="ssm,ssm,ssm,attn", ssm={"d_state": 64}
    )
    tokens, exact = torch.randint(0, 256, (1, length)), LLM(args, seed=1).double().eval()
    right = _hidden(exact, tokens)
    rounded = {
        "float64, these three rounded": _rounded(args, _is_kept).double(),
        "float64, all others rounded": _rounded(args, lambda name: not _is_kept(name)).double(),
        "bf16, all": LLM(args, seed=1).bfloat16(),
        "bf16, these three float32": _kept_wide(args),
    }
    rows = []
    for name, model in rounded.items():
        found = _hidden(model.eval(), tokens)
        decoded = _decoded(model, tokens)
        parts = slice(None), slice(EDGE), slice(-EDGE, None)
        apart = [_apart(found[:, part], right[:, part]) for part in parts]
        rows.append([name, *(f"{one:.2e}" for one in (*apart, _apart(decoded, right[:, -DECODED:])))])
    head = ["forward", "all tokens", f"first {EDGE}", f"last {EDGE}", f"last {DECODED}, decoded one by one"]
    lines = [
        "## Mean over tokens of |difference| / |hidden state|", f"{length:,} tokens, initial weights.",
        table(head, rows),
    ]  # fmt: skip
    how = "Nothing is timed"
    title = "Decays, skips and time steps in bf16"
    file = write_result("ssm-rounding", title, ["\n\n".join(lines)], Path(output), how)
    print("\n\n".join(lines), f"\nwritten to {file}")


def _is_kept(name: str) -> bool:
    return name.endswith(KEPT)


@torch.no_grad()
def _rounded(args: ModelArgs, which: Callable[[str], bool]) -> LLM:
    """A model in which some parameters have what bf16 leaves of them."""
    model = LLM(args, seed=1)
    for name, parameter in model.named_parameters():
        if which(name):
            parameter.copy_(parameter.bfloat16())
    return model


def _kept_wide(args: ModelArgs) -> LLM:
    """A bf16 model whose three are not rounded."""
    model, whole = LLM(args, seed=1).bfloat16(), LLM(args, seed=1)
    for name, parameter in model.named_parameters():
        if _is_kept(name):
            parameter.data = whole.get_parameter(name).data
    return model


@torch.inference_mode()
def _hidden(model: LLM, tokens: Tensor) -> Tensor:
    found = model(tokens, return_hidden=True).hidden
    assert found is not None
    return found.double()


@torch.inference_mode()
def _decoded(model: LLM, tokens: Tensor) -> Tensor:
    cache = Cache(model.args)
    model(tokens[:, :-DECODED], cache=cache)
    parts = [model(token, cache=cache, return_hidden=True).hidden for token in tokens[:, -DECODED:].split(1, 1)]
    return torch.cat([part for part in parts if part is not None], 1).double()


def _apart(found: Tensor, right: Tensor) -> float:
    return ((found - right).norm(dim=-1) / right.norm(dim=-1)).mean().item()


if __name__ == "__main__":
    run_cli(benchmark)
