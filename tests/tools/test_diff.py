"""tools/diff.py on run folders written by hand: which step, which metrics, which tensor, and what it takes as equal."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm.cli import run_cli
from llm.errors import UserError
from llm.train.config import validate
from tests.distributed.harness import ROOT, tiny_config
from tools.diff import diff, ranges

TENSORS = ("tok_embeddings", "layers.0.attention.wq", "layers.0", "norm")


def row(step: int, ranks: int = 1, **fields: Any) -> dict[str, Any]:
    return {
        "step": step, "loss": 5.0 / step, "grad_norm": 1.25, "routing_checksum": 100 + step, "targets": 640,
        "tokens_per_s": 1234.5 / step * ranks, "tokens_per_s_per_device": 1234.5 / step, "step_time_s": 0.1 * step,
        "memory_gb": step / 7, **fields,
    }  # fmt: skip


def record(step: int, name: str, tensor: str = "output", **fields: Any) -> dict[str, Any]:
    return {
        "step": step, "name": name, "tensor": tensor, "linear": [3.0, -2.0], "scale": 10.0,
        "norm": None if tensor == "gradient" else 2.0, "count": None if tensor == "gradient" else 64, **fields,
    }  # fmt: skip


def trace(*steps: int) -> list[dict[str, Any]]:
    tensors = [(name, "output") for name in TENSORS] + [("norm.weight", "gradient")]
    return [record(step, name, tensor) for step in steps for name, tensor in tensors]


def write(
    path: Path, rows: list[dict[str, Any]], records: list[dict[str, Any]] | None = None, **sections: dict[str, Any]
) -> str:
    path.mkdir(parents=True)
    config = validate(tiny_config(path, **sections), "test").model_dump(mode="json")
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if records is not None:
        (path / "trace.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def compare(a: str, b: str, capsys: pytest.CaptureFixture[str], **flags: Any) -> tuple[int, str]:
    """Exit status and output."""
    status = 0
    try:
        diff(a, b, **flags)
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    return status, capsys.readouterr().out


def test_equal_runs_agree_whatever_the_clock_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a", [row(1), row(2)], trace(1, 2))
    b = write(tmp_path / "b", [row(1, step_time_s=9.0, memory_gb=5.5, mfu=0.3), row(2)], trace(1, 2))
    status, out = compare(a, b, capsys)
    assert status == 0
    assert "bit by bit (same layout, fp32)" in out
    assert "all 2 common step(s), 1-2, agree" in out and "all tensors of step(s) 1-2 agree" in out


def test_how_even_the_ranks_were_is_compared_within_a_layout_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a", [row(1, expert_rank_load=1.0, tile_imbalance=1.0)])
    for ranks, status in ((1, 1), (2, 0)):
        b = write(tmp_path / f"b{ranks}", [row(1, ranks, expert_rank_load=1.9, tile_imbalance=1.1)])
        assert compare(a, b, capsys)[0] == status
    assert compare(a, b, capsys, metrics=["tile_imbalance"])[0] == 1


def test_the_first_step_and_its_metrics_are_named_with_both_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a", [row(step) for step in range(1, 6)])
    changed = [row(1), row(2), row(3, grad_norm=1.2500000000000002), row(4, loss=9.0), row(5)]
    b = write(tmp_path / "b", changed, optim={"lr": 0.5})
    status, out = compare(a, b, capsys)
    assert status == 1
    assert "steps 1-2 agree (2)" in out
    assert "step 3 is the first where they part (of 5 common steps, 2 part)" in out
    assert "  grad_norm: 1.25 | 1.2500000000000002   relative 1.8e-16" in out
    assert "loss:" not in out
    assert "configs: optim.lr: 0.001 -> 0.5" in out
    assert "run both again with --log.trace_steps=[2, 3]" in out
    assert compare(a, b, capsys, rtol=1e-9, metrics=["grad_norm"])[0] == 0
    assert compare(a, b, capsys, rtol=1e-9)[0] == 1


@pytest.mark.parametrize(
    ("difference", "train", "ranks", "status"),
    [
        (1e-14, {}, 1, 1),  # the same layout and precision: equal to the last bit
        (9e-6, {}, 2, 0),
        (2e-5, {}, 2, 1),
        (9e-6, {"micro_batch_size": 2}, 1, 0),
        (2e-5, {"micro_batch_size": 2}, 1, 1),
        (9e-6, {"threads": 2}, 1, 0),
        (9e-3, {"precision": "bf16"}, 1, 0),  # fp32 beside bf16
        (2e-2, {"precision": "bf16"}, 1, 1),
    ],
)
def test_what_counts_as_equal_follows_from_layout_and_precision(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    difference: float,
    train: dict[str, Any],
    ranks: int,
    status: int,
) -> None:
    a = write(tmp_path / "a", [row(1), row(2)], trace(1))
    b = write(tmp_path / "b", [row(1, ranks), row(2, ranks, loss=2.5 * (1 + difference))], trace(1), train=train)
    assert compare(a, b, capsys)[0] == status
    moved = trace(1)
    moved[1] = record(1, TENSORS[1], linear=[3.0, -2.0 + 10.0 * difference])  # relative to its scale
    c = write(tmp_path / "c", [row(1, ranks), row(2, ranks)], moved, train=train)
    found, out = compare(a, c, capsys)
    assert found == status
    assert (f"the first is {TENSORS[1]} output" in out) == bool(status)


def test_integers_must_be_equal_unless_the_tolerance_is_that_of_bf16(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a", [row(1)], [record(1, "moe", "expert_counts", scale=0.0, norm=None, count=None)])
    counts = [record(1, "moe", "expert_counts", scale=0.0, norm=None, count=None, linear=[3.0, -2.25])]
    b = write(tmp_path / "b", [row(1, 2, routing_checksum=7)], counts)
    status, out = compare(a, b, capsys)
    assert status == 1 and "  routing_checksum: 101 | 7\n" in out and "the first is moe expert_counts" in out
    status, out = compare(a, b, capsys, rtol=1e-2)
    assert status == 0 and "routing_checksum left out" in out
    c = write(tmp_path / "c", [row(1, 2, targets=641)])
    assert compare(a, c, capsys, rtol=1e-2)[0] == 1


def test_the_first_tensor_in_the_order_of_computation_is_named_and_the_next_follow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoiled = trace(2, 3, 4)
    for number in (6, 7, 9, 12):  # in step 3: wq, the layer and the gradient; then in step 4
        spoiled[number] = {**spoiled[number], "linear": [3.0, -1.0]}
    a = write(tmp_path / "a", [row(step) for step in range(1, 5)], trace(2, 3, 4))
    b = write(tmp_path / "b", [row(step) for step in range(1, 5)], spoiled)
    status, out = compare(a, b, capsys)
    assert status == 1, "the traces part although the metrics agree"
    assert "all 4 common step(s), 1-4, agree" in out
    assert "step 3 is the first traced one that parts; steps 2 agree" in out
    lines = out.split("3 of 5 tensors part; the first is layers.0.attention.wq output\n")[1].splitlines()
    assert lines == [
        "  layers.0.attention.wq output: -2.0 | -1.0   relative 1.0e-01",
        "  layers.0 output: -2.0 | -1.0   relative 1.0e-01",
        "  norm.weight gradient: -2.0 | -1.0   relative 1.0e-01",
    ]


def test_a_trace_that_begins_too_late_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoiled = [{**entry, "norm": 3.0} if entry["name"] == "norm" else entry for entry in trace(4)]
    a = write(tmp_path / "a", [row(step) for step in range(1, 5)], trace(4))
    b = write(tmp_path / "b", [row(1), row(2), row(3, loss=7.0), row(4)], spoiled)
    status, out = compare(a, b, capsys)
    assert status == 1 and "the first is norm output (norm)" in out
    assert "part before the first traced step; trace both runs with --log.trace_steps=[2, 3]" in out


def test_missing_rows_other_ranges_and_a_torn_line_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a", [row(1), row(2), row(3), row(4)])
    b = write(tmp_path / "b", [row(3), row(5), row(6, 2)], checkpoint={"keep": 1})
    with open(tmp_path / "b" / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    status, out = compare(a, b, capsys)
    assert status == 0
    assert "all 1 common step(s), 3, agree" in out
    assert "only A has step(s) 1-2, 4" in out and "only B has step(s) 5-6" in out
    assert "metrics.jsonl: the last line is torn, and passed over" in out
    assert "steps 3, 5-6; ranks: 1 then 2; fp32" in out
    assert "what a resume may change: checkpoint.keep: 2 -> 1" in out


def test_values_that_are_not_numbers_are_compared_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a", [row(1, loss=float("nan"), skipped=None)])
    b = write(tmp_path / "b", [row(1, loss=float("nan"), skipped=None)])
    c = write(tmp_path / "c", [row(1, 2, loss=1.0, skipped="gradient")])
    assert compare(a, b, capsys)[0] == 0
    status, out = compare(a, c, capsys, rtol=0.5)
    assert status == 1 and "  loss: nan | 1.0\n" in out and "  skipped: None | 'gradient'\n" in out


@pytest.mark.parametrize("flag", [-1.0, float("nan"), float("inf")])
def test_a_tolerance_is_a_number_from_0_up(tmp_path: Path, flag: float) -> None:
    with pytest.raises(UserError, match="--rtol="):
        diff(str(tmp_path), str(tmp_path), rtol=flag)


def test_bad_input_names_the_file_or_the_flag(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", [row(1)]), write(tmp_path / "b", [row(2)])
    late = write(tmp_path / "late", [row(1)])
    for spoil, expected in (
        (lambda: None, "no step in common: .*/a has 1, .*/b has 2"),
        (lambda: (tmp_path / "b/metrics.jsonl").write_text("{}\n" + json.dumps(row(1)) + "\n"), "jsonl: line 1: not a"),
        (lambda: (tmp_path / "b/metrics.jsonl").write_text(""), "b/metrics.jsonl: no whole row"),
        (lambda: (tmp_path / "b/metrics.jsonl").unlink(), "b/metrics.jsonl: No such file"),
        (lambda: (tmp_path / "b/config.yaml").unlink(), "b/config.yaml: No such file"),
    ):
        spoil()
        with pytest.raises(UserError, match=expected):
            diff(a, b)
    with pytest.raises(UserError, match="--run_b=.*/none: no such run folder"):
        diff(a, str(tmp_path / "none"))
    with pytest.raises(UserError, match="--metrics=los: .*possible are loss, grad_norm"):
        diff(a, late, metrics=["los"])
    (tmp_path / "late/trace.jsonl").write_text('{"step": 1}\n{"step": 1}\n')
    with pytest.raises(UserError, match="late/trace.jsonl: line 1: not a record of a trace"):
        diff(a, late)


def test_as_a_command_it_exits_with_0_1_or_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", [row(1)]), write(tmp_path / "b", [row(1, loss=6.0)])
    run_cli(diff, [a, b, "--metrics=grad_norm,targets", "--rtol=0.1"])
    assert "compared to within 0.1 (--rtol): grad_norm, targets" in capsys.readouterr().out
    with pytest.raises(SystemExit) as leaving:
        run_cli(diff, [a, b, "--rtoll=1"])
    assert leaving.value.code == 2
    assert capsys.readouterr().err == "error: unknown flag --rtoll; did you mean --rtol?\n"
    done = subprocess.run([sys.executable, "tools/diff.py", a, b], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr == ""


def test_ranges_in_short() -> None:
    assert ranges([1, 2, 3, 7, 9, 10]) == "1-3, 7, 9-10" and ranges([]) == "none"
