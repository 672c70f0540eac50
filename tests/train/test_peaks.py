"""Utilisation: a share of the peaks of known devices."""

import pytest
import torch

from llm.args import ModelArgs
from llm.batch import Batch, Counts
from llm.data.batch import StepBatch
from llm.datatypes import TransformerInput
from llm.flops import token_flops
from llm.parallel.engine.step import StepResult
from llm.parallel.launch.world import World
from llm.train.metrics import StepMetrics, peak_memory_gb
from llm.train.peaks import peak_by_name, peak_flops

DENSE = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=100, ffn_hidden=48)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert peak_by_name(name) == peak


def test_a_cpu_has_a_peak_only_if_the_config_gives_it() -> None:
    assert peak_flops(None, torch.device("cpu")) is None
    assert peak_flops(1e12, torch.device("cpu")) == 1e12


@pytest.mark.parametrize("ranks", [1, 4])
def test_mfu_is_per_device_and_uses_the_steps_own_length(ranks: int) -> None:
    world = World(0, ranks, 0, torch.device("cpu"))
    tokens = torch.zeros(6, 16, dtype=torch.int64)
    counts = Counts(96 * ranks, 96 * ranks, {"lm": 96 * ranks}, {})
    batch = StepBatch([Batch(TransformerInput(tokens), {})], counts, 0, 2, wait_s=0.0)
    result = StepResult(1.0, {"lm": 1.0}, {}, 1.0, counts, routing_checksum=None)
    when = {"step": 1, "tokens": 96, "epoch": 0.1, "lr": 0.1, "seconds": 2.0}
    row = StepMetrics(DENSE, world, 1e9).row(result, batch, **when)  # type: ignore[arg-type]
    assert row["tokens_per_s_per_device"] == 48.0 and row["tokens_per_s"] == 48.0 * ranks
    assert row["mfu"] == pytest.approx(48.0 * token_flops(DENSE, 16) / 1e9)
    assert StepMetrics(DENSE, world, None).row(result, batch, **when)["mfu"] is None  # type: ignore[arg-type]


def test_the_peak_of_memory_holds_what_is_freed_again() -> None:
    block = torch.ones(64 << 20)  # 256 MiB, written to
    with_block = peak_memory_gb(torch.device("cpu"))
    del block
    assert peak_memory_gb(torch.device("cpu")) >= with_block
    assert 0.25 < with_block < 1000  # GiB
