"""State-space mixer against transformers' Mamba-2: CPU time of forward and backward on one thread, in float32.

    python tools/benchmarks/ssm.py

Both have the same weights and take turns; the peer's pieces are its own in plain PyTorch, as no CPU has others, with
its default chunk of 256 tokens and with whichever of {32, 64, 128} is the fastest. Ours has its default.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor, nn

from llm import LLM, ModelArgs
from llm.cli import run_cli
from llm.datatypes import TransformerInput
from llm.layers.ssm import SSM
from tools.benchmarks.harness import RESULTS, Bar, Contestant, Spread, interleave, table, write_result

SHAPES = ((256, 64), (768, 128))
"""Model width and width of the state."""
LENGTHS = (1024, 4096)
DEFAULT, CHUNKS = 256, (32, 64, 128)
"""Of the peer."""
BARS = {256: 2.2, 768: 1.6}
"""Times the peer's speed with its default chunk, by model width."""
FASTEST_BAR = 1.2
"""With its fastest one."""
SAME = 1e-5
"""Largest difference of results, relative to the largest result: float32 sums in other orders."""
OURS = "ours"


def benchmark(rounds: int = 7, output: str = str(RESULTS)) -> None:
    """Time the mixers in turn and write a dated result file.

    rounds: rounds that count
    output: folder of the result file
    """
    rows, bars = [], []
    for dim, state in SHAPES:
        for length in LENGTHS:
            found, errors, ratios = measure(dim, state, length, rounds)
            fastest = min((f"HF {chunk}" for chunk in CHUNKS), key=lambda name: found[name].median)
            of_default, of_fastest = (ratios(f"HF {DEFAULT}"), ratios(fastest))
            theirs = {name.removeprefix("HF "): one.median for name, one in found.items() if name != OURS}
            times = ", ".join(f"{chunk}: {seconds:.3f}" for chunk, seconds in theirs.items())
            over = f"{of_fastest.text(2)} ({fastest.removeprefix('HF ')})"
            sizes = [f"{dim}", f"{state}", f"{length:,}"]
            rows.append([*sizes, found[OURS].text(), times, of_default.text(2), over, f"{errors:.1e}"])
            bars.append(Bar(f"{dim} at {length:,}: over the default chunk", of_default.median, BARS[dim]))
            bars.append(Bar(f"{dim} at {length:,}: over the fastest chunk", of_fastest.median, FASTEST_BAR))
    head = ["width", "state", "tokens", "ours, s", "HF by chunk, s", "over default", "over fastest", "difference"]
    lines = ["## Forward and backward of a layer's mixer", table(head, rows), "\n".join(f"* {b.text()}" for b in bars)]
    section, title = "\n\n".join(lines), "State-space mixer against transformers"
    how = f"Contestants took turns in one process with one thread; CPU time; {rounds} rounds"
    print(section, f"\nwritten to {write_result('ssm', title, [section], Path(output), how)}")


def measure(
    dim: int, state: int, length: int, rounds: int
) -> tuple[dict[str, Spread], float, Callable[[str], Spread]]:
    """CPU seconds of each contestant, the largest relative difference of what they make, and how many times faster ours
    is than one."""
    torch.manual_seed(0)
    x, gradient = torch.randn(2, 1, length, dim).unbind()
    ssm = {"d_state": state}
    model = LLM(ModelArgs(dim=dim, n_layers=1, n_heads=1, vocab_size=8, layer_pattern="ssm+none", ssm=ssm))
    mixer = model.layers[0].attention
    assert isinstance(mixer, SSM)
    ctx = model.context(TransformerInput(torch.zeros(1, length, dtype=torch.int64)))
    forwards: dict[str, Callable[[Tensor], Tensor]] = {OURS: lambda x: mixer(x, ctx)}
    for chunk in (*CHUNKS, DEFAULT):
        forwards[f"HF {chunk}"] = peer(mixer, dim, state, chunk)
    with torch.no_grad():
        made = {name: forward(x) for name, forward in forwards.items()}
    largest = max((one - made[OURS]).abs().max().item() for one in made.values()) / made[OURS].abs().max().item()
    if largest > SAME:
        raise SystemExit(f"the mixers differ by {largest:.1e}")

    def step(forward: Callable[[Tensor], Tensor]) -> Callable[[], float]:
        def once() -> float:
            y = forward(x.clone().requires_grad_())
            y.backward(gradient)
            return y.sum().item()

        return once

    contestants = [Contestant(name, step(forward)) for name, forward in forwards.items()]
    timing = interleave(contestants, rounds=rounds, warmup=1)
    spreads = {name: Spread.of(seconds) for name, seconds in timing.cpu_seconds.items()}
    return spreads, largest, lambda name: timing.cpu_speedup(OURS, name)


def peer(mixer: SSM, dim: int, state: int, chunk: int) -> nn.Module:
    """transformers' mixer with the same weights."""
    import transformers
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    transformers.logging.set_verbosity_error()
    norm = mixer.norm
    assert norm is not None
    config: Any = transformers.Mamba2Config(
        hidden_size=dim, state_size=state, head_dim=64, num_heads=dim // 32, n_groups=1, chunk_size=chunk,
        layer_norm_epsilon=norm.eps,
    )  # fmt: skip
    found = Mamba2Mixer(config, layer_idx=0)
    pairs = {
        found.in_proj.weight: torch.cat([mixer.wz.weight, mixer.wx.weight, mixer.wbc.weight, mixer.wdt.weight]),
        found.conv1d.weight: torch.cat([mixer.conv_x.weight, mixer.conv_bc.weight]),
        found.conv1d.bias: torch.cat([mixer.conv_x.bias, mixer.conv_bc.bias]),  # type: ignore[list-item]
        found.A_log: mixer.A_log, found.D: mixer.D, found.dt_bias: mixer.dt_bias,
        found.norm.weight: norm.weight, found.out_proj.weight: mixer.wo.weight,
    }  # fmt: skip
    with torch.no_grad():
        for theirs, ours in pairs.items():
            theirs.copy_(ours)
    return found


if __name__ == "__main__":
    run_cli(benchmark)
