"""What a cache of keys and values buys, and what it takes: a token of a text so long, with and without one, for models
whose heads have keys of their own (MHA), share them by four (GQA) or share one (MQA).

    python tools/benchmarks/caches.py                                         # one result file
    python tools/benchmarks/caches.py --contexts 128,512 --rounds 7          # a part

A step makes one more token after the text: with a cache from the newest token alone, without one from all of it. Speeds
are of CPU time, so that what else runs on the machine counts less.
"""

import copy
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from llm.args import ModelArgs
from llm.cache import Cache
from llm.cli import run_cli
from llm.errors import UserError
from llm.model import LLM
from tools.benchmarks.harness import RESULTS, Timing, check_same_work, interleave, table, wait_for_device, write_result

HEADS = 8
KINDS = {"MHA": HEADS, "GQA": HEADS // 4, "MQA": 1}
"""Heads of keys and values."""
CACHED_TOKENS = 16
"""That are made one after the other where a token is timed with a cache; without one, each takes so long that one does.
"""
SAME = 1e-3
"""Of the largest logit, relative: float32 sums in another order."""
MIB = 2**20


def args_of(kv_heads: int, dim: int, layers: int, longest: int) -> ModelArgs:
    """A Llama of this width with so many heads of keys and values."""
    return ModelArgs(
        dim=dim, n_layers=layers, n_heads=HEADS, n_kv_heads=kv_heads, vocab_size=4096, max_seq_len=longest,
        rope_interleaved=False, init_std=0.02,
    )  # fmt: skip


def cache_bytes(args: ModelArgs, n_tokens: int) -> int:
    """2 (keys, values) x layers x tokens x heads of keys x width of a head x 4 (float32), of one text."""
    return 2 * args.n_layers * n_tokens * args.kv_heads * args.head_width * 4


@dataclass(frozen=True)
class Making:
    """Tokens that follow a text, with a cache or without."""

    name: str
    model: LLM
    text_1T: Tensor
    filled: Cache | None
    """what a cache has of all tokens but the last; None = without"""

    @property
    def step(self) -> Callable[[], float]:
        """The largest logit of the next token."""
        return lambda: self._make(copy.deepcopy(self.filled), 1)

    def timed(self, block: int) -> tuple[float, float]:
        """Seconds of `block` tokens, by the clock and of a core; with a cache the mean of several."""
        times = 1 if self.filled is None else CACHED_TOKENS
        cache = copy.deepcopy(self.filled)
        wait_for_device()
        started, cpu_started = time.perf_counter(), time.process_time()
        self._make(cache, block * times)
        wait_for_device()
        return (time.perf_counter() - started) / times, (time.process_time() - cpu_started) / times

    @torch.no_grad()
    def _make(self, cache: Cache | None, n_tokens: int) -> float:
        ids = self.text_1T
        for _ in range(n_tokens):
            given = ids if cache is None else ids[:, -1:]
            hidden = self.model(given, cache=cache, return_hidden=True).hidden
            largest = self.model.logits(hidden[:, -1:])[0, 0].max(-1)
            ids = torch.cat([ids, largest.indices.view(1, 1)], dim=1)
        return float(largest.values)


@dataclass(frozen=True)
class Counted:
    """Bytes that a cache takes."""

    formula: int
    counted: int


def contestants(context: int, dim: int, layers: int) -> tuple[list[Making], dict[str, Counted]]:
    """With and without a cache, of every kind; and what the caches of whole texts take."""
    found, sizes = [], {}
    for kind, kv_heads in KINDS.items():
        args = args_of(kv_heads, dim, layers, context + CACHED_TOKENS)
        model = LLM(args, seed=0).eval()
        text_1T = torch.randint(0, args.vocab_size, (1, context), generator=torch.Generator().manual_seed(1))
        filled = Cache(args, context + CACHED_TOKENS)
        model(text_1T[:, :-1], cache=filled, return_hidden=True)
        whole = Cache(args)
        model(text_1T, cache=whole, return_hidden=True)
        sizes[kind] = Counted(cache_bytes(args, context), whole.nbytes)
        found += [
            Making(f"{kind}, cached", model, text_1T, filled),
            Making(f"{kind}, not cached", model, text_1T, None),
        ]
    return found, sizes


def benchmark(
    contexts: tuple[int, ...] = (128, 512, 2048),
    rounds: int = 9,
    dim: int = 256,
    layers: int = 4,
    output: str = str(RESULTS),
) -> None:
    """Time a token with and without a cache in turn and write a dated result file.

    contexts: tokens of the text that the token comes after
    rounds: rounds that count
    dim: width of the model, of 8 heads
    layers: of the model
    output: folder of the result file
    """
    if min(contexts, default=0) < 2:
        raise UserError(f"--contexts={list(contexts)}: numbers of at least 2 tokens are needed")
    torch.set_num_threads(1)
    sections = [section(context, rounds, dim, layers) for context in contexts]
    path = write_result("caches", "A token with and without a cache of keys and values", sections, Path(output))
    print("\n\n".join(sections), f"\nwritten to {path}")


def section(context: int, rounds: int, dim: int, layers: int) -> str:
    """One section of the result: a text of this length."""
    makers, sizes = contestants(context, dim, layers)
    for kind in KINDS:
        check_same_work({m.name: m.step() for m in makers if m.name.startswith(kind)}, rtol=SAME)
    for kind, size in sizes.items():
        if size.formula != size.counted:
            raise UserError(f"the cache of {kind} takes {size.counted:,} bytes; by the formula {size.formula:,}")
    timing = interleave(makers, rounds=rounds)
    rows = [row(kind, timing, sizes[kind]) for kind in KINDS]
    head = [
        "heads", "tokens/s, cached", "tokens/s, not cached", "times", "times MHA's speed, cached", "MiB by formula",
        "MiB counted",
    ]  # fmt: skip
    return (
        f"## {context:,} tokens\n\nWidth {dim}, {layers} layers, {HEADS} heads, float32, one text; {rounds} rounds; "
        f"CPU time. Without a cache nothing is kept.\n\n{table(head, rows)}"
    )


def row(kind: str, timing: Timing, size: Counted) -> list[str]:
    """Speeds of one kind, and what its cache takes."""
    cached, other = f"{kind}, cached", f"{kind}, not cached"
    speeds = [f"{1 / _median(timing.cpu_seconds[name]):.3g}" for name in (cached, other)]
    times = timing.cpu_speedup(cached, other).text(1)
    over_mha = timing.cpu_speedup(cached, "MHA, cached").text(2)
    return [kind, *speeds, times, over_mha, *(f"{n / MIB:.3f}" for n in (size.formula, size.counted))]


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    run_cli(benchmark)
