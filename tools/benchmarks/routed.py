"""Hybrids: what attention for some tokens costs beside attention for all, and what decoding takes by the length of the
text, for HYDRA's three models and one of attention alone.

    python tools/benchmarks/routed.py                                  # one result file and one picture
    python tools/benchmarks/routed.py --contexts 1024,4096 --rounds 9  # a part

The attention part is that of a routed layer without its state: scores of tokens, choice, attention of the chosen and
what is spread back; forward and backward, with the same weights, at a rate of 0.15 and with all tokens chosen. What is
remembered of a text is counted in bytes and must be what the formula says. One thread, float32, batch 1, CPU time.
"""

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from llm import LLM, ModelArgs
from llm.atomic import write_file
from llm.cache import Cache
from llm.cli import run_cli
from llm.datatypes import TransformerInput
from llm.errors import UserError
from llm.evaluate.charts import Series, curves
from llm.layers.attention import Attention
from llm.layers.routed import Routed, RoutedKeys
from tools.benchmarks.harness import RESULTS, Bar, Contestant, Spread, Timing, interleave, table, write_result

RATE, LENGTH, BAR = 0.15, 8192, 1.5
"""Share of tokens that attend, tokens of the text, and how many times faster their attention is to be than all's."""
DIM, HEADS, STATE, LAYERS = 256, 4, 64, 4
MODELS = {
    "plain": "attn", "v1": "ssm,attn", "v2": "ssm,routed", "v3": "ssm,ssm@4,ssm@16,attn@16",
}  # fmt: skip
CONTEXTS = "1024,2048,4096,8192,16384,32768"
FLOAT, COUNT = 4, 8
"""Bytes of a float32 and of a count."""
TOKENS = 8
"""That are made one after the other in a round."""
STYLE = (
    "text{font:10px sans-serif;fill:#444}.grid{stroke:#ddd;fill:none}.axis{stroke:#888;fill:none}.band{display:none}"
    ".line{fill:none;stroke-width:1.5}.c0{stroke:#222}.c1{stroke:#d33}.c2{stroke:#38c}.c3{stroke:#393}.dot{display:none}"
)


def benchmark(
    contexts: str = CONTEXTS, rounds: int = 7, length: int = LENGTH, only: str = "", output: str = str(RESULTS)
) -> None:
    """Measure both and write a dated result file, with a picture beside it.

    contexts: tokens of the texts after which a token is made, with commas
    rounds: rounds that count
    length: tokens of the text of the attention part
    only: attention or decoding; empty = both
    output: folder of the result file
    """
    if only not in ("", "attention", "decoding"):
        raise UserError(f"--only={only}: use attention or decoding")
    try:
        lengths = [int(part) for part in contexts.split(",")]
    except ValueError:
        raise UserError(f"--contexts={contexts}: expected numbers with commas between them") from None
    torch.manual_seed(0)
    sections: list[str] = []
    drawn: list[Series] = []
    if only != "decoding":
        sections.append(of_attention(length, rounds))
    if only != "attention":
        section, drawn = of_decoding(lengths, rounds)
        sections.append(section)
    how = f"Contestants took turns in one process with one thread; CPU time; {rounds} rounds"
    file = write_result("routed", "Routed attention, and decoding by length", sections, Path(output), how)
    if drawn:
        svg = curves(drawn, "tokens of the text, log2", "milliseconds a token")
        svg = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        svg = svg.replace("<title>", f"<style>{STYLE}</style><title>", 1)
        picture = file.with_name(f"{file.stem}-decoding.svg")
        write_file(picture, svg.encode() + b"\n")
        said = "plain black, v1 red, v2 blue, v3 green"
        text = f"\n\n![Milliseconds a token against the length of the text]({picture.name})\n\nColours: {said}.\n"
        write_file(file, file.read_bytes().rstrip(b"\n") + text.encode())
    print("\n\n".join(sections), f"\nwritten to {file}")


def args_of(pattern: str, layers: int = LAYERS, every: bool = False) -> ModelArgs:
    """every: all tokens attend; else RATE of them, as scores of random vectors are normal."""
    count = layers // 2 if "," in pattern else layers
    threshold = -1e9 if every else NormalDist().inv_cdf(1 - RATE)
    route = {"rate": RATE, "max_rate": 1.0 if every else 2 * RATE, "thresholds": (threshold,) * count}
    return ModelArgs(
        dim=DIM, n_layers=layers, n_heads=HEADS, vocab_size=256, max_seq_len=1 << 16, layer_pattern=pattern,
        ssm={"d_state": STATE}, route=route if "routed" in pattern else None,
    )  # fmt: skip


def of_attention(length: int, rounds: int) -> str:
    """A section about the attention part."""
    x, gradient = torch.randn(2, 1, length, DIM).unbind()
    tokens = TransformerInput(torch.zeros(1, length, dtype=torch.int64))
    parts: dict[str, Callable[[Tensor], Tensor]] = {}
    realised: dict[str, float] = {}
    for name, every in (("some", False), ("all", True)):
        model = LLM(args_of("routed+none", 1, every))
        layer, ctx = model.layers[0].attention, model.context(tokens)
        assert isinstance(layer, Routed)
        realised[name] = layer._attended(x, ctx)[1].float().mean().item()
        parts[name] = lambda y, layer=layer, ctx=ctx: layer._attended(y, ctx)[0]  # type: ignore[misc]
        parts[f"{name}, with the state"] = lambda y, layer=layer, ctx=ctx: layer(y, ctx)  # type: ignore[misc]
    plain = LLM(args_of("attn+none", 1))
    mixer, of_plain = plain.layers[0].attention, plain.context(tokens)
    assert isinstance(mixer, Attention)
    parts["plain attention"] = lambda y: mixer(y, of_plain)

    def step(forward: Callable[[Tensor], Tensor]) -> Callable[[], float]:
        def once() -> float:
            y = forward(x.clone().requires_grad_())
            y.backward(gradient)
            return y.sum().item()

        return once

    timing = interleave([Contestant(name, step(part)) for name, part in parts.items()], rounds=rounds, warmup=1)
    rows = [[name, seconds.text(), timing.cpu_speedup(name, "all").text(2)] for name, seconds in _spreads(timing)]
    bar = Bar(f"attention part at {length:,} tokens", timing.cpu_speedup("some", "all").median, BAR)
    lines = [
        f"## Attention part of a routed layer, width {DIM}, {HEADS} heads, {length:,} tokens, forward and backward",
        f"Chosen: {realised['some']:.1%} of the tokens, and {realised['all']:.0%}.",
        table(["what", "seconds", "times the speed of all"], rows),
        f"* {bar.text()}",
    ]
    return "\n\n".join(lines)


@dataclass
class Decoding:
    """A text that goes on token by token."""

    model: LLM
    cache: Cache

    @torch.inference_mode()
    def __call__(self) -> float:
        token = torch.zeros(1, 1, dtype=torch.int64)
        return self.model(token, cache=self.cache).logits.sum().item()


@torch.inference_mode()
def read(name: str, length: int) -> tuple[Decoding, int]:
    """A model that has read a text, and the bytes that it keeps of it. SystemExit where they are not the formula's."""
    model = LLM(args_of(MODELS[name])).eval()
    cache = Cache(model.args)
    model(torch.randint(0, 256, (1, length)), cache=cache)
    expected = formula(model.args, length, cache)
    if cache.nbytes != expected:
        raise SystemExit(f"{name} keeps {cache.nbytes} bytes of {length} tokens, not {expected}")
    return Decoding(model, cache), expected


def formula(args: ModelArgs, length: int, cache: Cache) -> int:
    """Bytes that are kept of a text. A routed layer's depend on how many tokens attended, which its cache counts."""
    ssm = args.ssm
    assert ssm is not None
    inner, heads = ssm.widths(args.dim)
    keys = 2 * args.kv_heads * args.head_width * FLOAT
    state = ((ssm.d_conv - 1) * (inner + 2 * ssm.groups * ssm.d_state) + inner * ssm.d_state) * FLOAT
    found = 0
    for spec in args.layer_specs():
        name, s = spec.mixer.name, spec.stride
        found += (s - 1) * args.dim * FLOAT  # of an open chunk
        if name in ("ssm", "routed"):
            found += state + (inner * FLOAT if s > 1 else 0)  # with a stride, what was said of the last chunk
        if name == "routed":
            kept = cache.state(~spec.index, _missing)
            found += COUNT + int(kept.count_B) * keys
        if name in ("attn", "strided_attn"):
            found += length // s * keys
    return found


def _missing() -> RoutedKeys:
    raise KeyError("a routed layer has read nothing")


def of_decoding(contexts: list[int], rounds: int) -> tuple[str, list[Series]]:
    """A section about tokens after texts so long, and what is drawn of it."""
    rows: list[list[str]] = []
    drawn: dict[str, list[float]] = {name: [] for name in MODELS}
    for length in contexts:
        held = {name: read(name, length) for name in MODELS}
        timing = interleave([Contestant(name, one) for name, (one, _) in held.items()], rounds=rounds, block=TOKENS)
        for name, spread in _spreads(timing):
            drawn[name].append(spread.median * 1e3)
            of_plain = timing.cpu_speedup(name, "plain").text(2)
            rows.append([f"{length:,}", name, f"{held[name][1]:,}", f"{spread.median * 1e3:.2f}", of_plain])
    head = ["tokens of the text", "model", "bytes kept", "ms a token", "times the speed of plain"]
    patterns = ", ".join(f"{name} `{pattern}`" for name, pattern in MODELS.items())
    lines = [
        f"## Decoding, {LAYERS} layers, width {DIM}, {HEADS} heads, state {STATE}",
        f"{patterns}. Bytes are those of the formula in each case, to the byte.",
        table(head, rows),
    ]
    axis = [math.log2(length) for length in contexts]
    return "\n\n".join(lines), [Series(name, axis, y, [None] * len(y)) for name, y in drawn.items()]


def _spreads(timing: Timing) -> list[tuple[str, Spread]]:
    return [(name, Spread.of(seconds)) for name, seconds in timing.cpu_seconds.items()]


if __name__ == "__main__":
    run_cli(benchmark)
