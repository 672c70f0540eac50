"""The benchmark of saving: its arithmetic, and that every contestant brings back the state that it saved."""

import pytest

from llm.errors import UserError
from tests.machine import needs
from tools.benchmarks import saving

BLOCKING = ("ours, blocking", "DCP, blocking", "DeepSpeed, blocking")
BEHIND = ("ours, behind, first, unprepared", "ours, behind, first", "ours, behind, later", "DCP, behind")
SMALL = {
    "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_hidden": 48, "vocab_size": 64, "max_seq_len": 256,
}  # fmt: skip


def found(stall: float, written: float):
    """A job in which a memory copy takes 1 s, a blocking save 10 s and a step 2 s, on a machine twice as slow in every
    other round."""
    slow = [1.0, 2.0, 1.0]
    saves = {"training alone": {"step": [2 * s for s in slow]}, "memory copy": {"stall": slow}}
    for name in BLOCKING:
        saves[name] = {"stall": [10 * s for s in slow], "bytes": [written] * 3, "flushed": [12 * s for s in slow]}
    for name in BEHIND:
        saves[name] = {
            "stall": [stall * s for s in slow],
            "step": [2.5 * s for s in slow],
            "steps": [4, 4, 4],
            "elapsed": [(stall + 10) * s for s in slow],
            "preparing": [0.01] * 3,
        }
    loads = {name: {"stall": [3 * s for s in slow]} for name in ("ours", "DCP", "DeepSpeed")}
    return {"state": 100.0, "saves": saves, "loads": loads}


def test_a_save_delays_training_by_what_its_steps_do_not_explain():
    behind = found(stall=1.0, written=100)["saves"]["ours, behind, later"]
    assert saving.delays(behind, [2.0, 4.0, 2.0]) == [3.0, 6.0, 3.0]


def test_bars_compare_within_a_round():
    """A stall of a tenth of a blocking save is one memory copy long here, in slow rounds and fast ones."""
    lines = saving.section("one process", found(stall=1.0, written=101)).splitlines()
    bars = [line for line in lines if "expected" in line]
    assert len(bars) == 5 and all(line.endswith(": met") for line in bars)
    lines = saving.section("one process", found(stall=1.4, written=103)).splitlines()
    bars = [line for line in lines if "expected" in line]
    assert len(bars) == 5 and all(line.endswith("NOT MET") for line in bars)


def test_the_worst_tensor_of_any_rank_decides_what_is_read_too_much():
    def ranks(*most: float):
        return [{"share": 1e6, "read": 2e6, "most": blocks} for blocks in most]

    assert saving.reading_section(["a"], {"x": [ranks(0.2, 0.9)]}).endswith("came 0.9: met")
    assert saving.reading_section(["a"], {"x": [ranks(0.2)], "y": [ranks(0.1, 1.1)]}).endswith("NOT MET")


def test_bad_flags_are_named():
    with pytest.raises(UserError, match="--rounds=3: at least 7"):
        saving.benchmark(rounds=3)
    with pytest.raises(UserError, match="--dir=/nowhere: no such folder"):
        saving.benchmark(dir="/nowhere")


@pytest.mark.full
@pytest.mark.distributed
def test_everyone_loads_what_it_saved_and_a_rank_reads_little_more_than_its_share(tmp_path, monkeypatch):
    """The job itself refuses a state that comes back changed. Two rounds: quartiles need no more."""
    needs("bf16")
    monkeypatch.setattr(saving, "MODEL", SMALL)
    task = {"config": saving.run_config("bf16", 2, {}), "folder": str(tmp_path), "kept": str(tmp_path / "kept")}
    result = saving.run_job("compare", task | {"rounds": 2}, 2, tmp_path)
    assert "Saves behind the training" in saving.section("two processes", result)
    written = {name: metrics["bytes"] for name, metrics in result["saves"].items() if "bytes" in metrics}
    assert all(n >= result["state"] for times in written.values() for n in times)
    task = {"config": saving.run_config("bf16", 2, {"tensor": 2}), "folder": str(tmp_path)}
    (ranks,) = saving.run_job("read", task | {"checkpoints": [str(tmp_path / "kept")]}, 2, tmp_path)
    assert all(rank["share"] <= rank["read"] and 0 <= rank["most"] <= 1 for rank in ranks)
