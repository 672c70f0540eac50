"""Planted faults: tools/diff.py names the step, the layer and the tensor, on the same layout and across layouts."""

from pathlib import Path

import pytest

from tests.distributed.diff_job import CASES, SPOILED_STEP, STEPS
from tests.distributed.harness import tiny_config, write_config, write_text
from tests.distributed.pool import run_job
from tools.diff import diff

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diff")
    write_text(folder, documents=100)
    traced = {"interval": 10, "tensorboard": False, "trace_steps": [1, STEPS]}
    config = write_config(folder / "config.yaml", tiny_config(folder, train={"steps": STEPS}, log=traced))
    for nproc, cases in ((2, list(CASES)), (1, ["sound"])):
        done = run_job("tests/distributed/diff_job.py", str(config), str(folder / "runs"), *cases, nproc=nproc)
        assert done.returncode == 0, done.stderr
    return folder / "runs"


def compare(runs: Path, a: str, b: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = 0
    try:
        diff(str(runs / a), str(runs / b))
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    return status, capsys.readouterr().out


@pytest.mark.parametrize(
    ("a", "b", "how"),
    [
        ("sound-2", "again-2", "bit by bit"),
        ("sound-2", "recomputing-2", "bit by bit"),
        ("sound-2", "zero_3-2", "to within 1e-05"),
        ("sound-1", "sound-2", "to within 1e-05"),
    ],
)
def test_sound_runs_agree(runs: Path, capsys: pytest.CaptureFixture[str], a: str, b: str, how: str) -> None:
    status, out = compare(runs, a, b, capsys)
    assert status == 0, out
    assert f"compared {how}" in out
    assert f"all {STEPS} common step(s), 1-{STEPS}, agree" in out
    assert f"all tensors of step(s) 1-{STEPS} agree" in out


@pytest.mark.parametrize("reference", ["sound-2", "sound-1"])
@pytest.mark.parametrize(
    ("case", "step", "tensor"),
    [
        ("norm", 1, "layers.2.ffn_norm output"),
        ("one_rank", 1, "layers.1.attention.wk output"),
        ("gradient", 1, "layers.3.feed_forward.experts.w2 gradient"),
        ("weight", SPOILED_STEP, "layers.1.attention_norm.weight weight"),
    ],
)
def test_a_planted_fault_is_named(
    runs: Path, capsys: pytest.CaptureFixture[str], reference: str, case: str, step: int, tensor: str
) -> None:
    status, out = compare(runs, reference, f"{case}-2", capsys)
    assert status == 1, out
    assert f"trace: step {step} is the first traced one that parts" in out
    assert f"the first is {tensor}" in out
