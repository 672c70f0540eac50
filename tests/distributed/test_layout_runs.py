"""Whole runs on four processes, cut by tensor and expert: their records repeat, resume, and equal data parallelism."""

import math
import re
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import metrics, tiny_config, without_timing, write_config, write_text
from tests.distributed.layouts_job import RUNS, SAVED_STEP
from tests.distributed.pool import run_job

pytestmark = pytest.mark.distributed

STEPS = 8
RELATIVE = 1e-5  # float32 sums in another order, as in test_equality.py
OF_THE_LAYOUT = "expert_rank_load"  # what the ranks of an expert-parallel group have to do, where there is such a group


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of layouts_job.py."""
    folder = tmp_path_factory.mktemp("runs")
    write_text(folder, documents=100)
    raw = tiny_config(
        folder,
        log={"interval": 2},
        train={"steps": STEPS},
        checkpoint={"interval": SAVED_STEP},
        eval={"interval": 2, "sample_interval": STEPS, "sample_tokens": 16, "temperature": 0.0, "prompts": ["ab", ""]},
    )
    config = write_config(folder / "config.yaml", raw)
    done = run_job("tests/distributed/layouts_job.py", str(config), str(folder), nproc=4, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


def samples(run_dir: Path) -> list[str]:
    """The sampled texts in a run's log."""
    return re.findall(r"--- sample .*?\n---", (run_dir / "log.txt").read_text(), re.DOTALL)


def loads(run_dir: Path) -> list[str]:
    """The lines of experts.jsonl."""
    return (run_dir / "experts.jsonl").read_text().splitlines()


def assert_close(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(rows) == len(expected) > 0
    for row, right in zip(rows, expected, strict=True):
        assert row.keys() == right.keys()
        for key, value in right.items():
            if key == OF_THE_LAYOUT:
                continue
            if isinstance(value, float) and math.isfinite(value):
                assert row[key] == pytest.approx(value, rel=RELATIVE), (right["step"], key)
            else:
                assert row[key] == value, (right["step"], key)


def test_the_same_layout_and_seed_give_the_same_bytes(runs: Path) -> None:
    fresh = without_timing(metrics(runs / "fresh"))
    assert len(fresh) == STEPS
    assert without_timing(metrics(runs / "again")) == fresh
    assert samples(runs / "again") == samples(runs / "fresh")
    assert loads(runs / "again") == loads(runs / "fresh") and len(loads(runs / "fresh")) == STEPS // 2


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(runs: Path) -> None:
    assert without_timing(metrics(runs / "resumed")) == without_timing(metrics(runs / "fresh"))[SAVED_STEP:]
    assert loads(runs / "resumed") == loads(runs / "fresh")[SAVED_STEP // 2 :]
    last = f"checkpoints/step_{STEPS:08d}"
    files = sorted(path.name for path in (runs / "fresh" / last).glob("rank_*.safetensors"))
    assert len(files) == 4
    for name in files:
        assert (runs / "resumed" / last / name).read_bytes() == (runs / "fresh" / last / name).read_bytes()


@pytest.mark.parametrize("other", ["data_parallel", "pipelined", "dualpipev"])
def test_cut_and_uncut_runs_record_the_same(runs: Path, other: str) -> None:
    """Validation and greedy samples too, which in a pipeline go from stage to stage, from prompts of two lengths."""
    fresh = without_timing(metrics(runs / "fresh"))
    assert sum("valid_loss" in row for row in fresh) == STEPS // 2
    assert_close(without_timing(metrics(runs / other)), fresh)
    texts = samples(runs / "fresh")
    assert len(texts) == 2 and all(len(text.splitlines()) > 2 for text in texts)
    assert samples(runs / other) == texts
    assert loads(runs / other) == loads(runs / "fresh"), "how many tokens each expert got, however the work is cut"


def test_a_cut_run_continues_on_another_layout(runs: Path) -> None:
    fresh = without_timing(metrics(runs / "fresh"))
    assert_close(without_timing(metrics(runs / "resumed_data_parallel")), fresh[SAVED_STEP:])


def test_every_run_was_looked_at(runs: Path) -> None:
    assert {path.name for path in runs.iterdir() if (path / "metrics.jsonl").exists()} == set(RUNS)
