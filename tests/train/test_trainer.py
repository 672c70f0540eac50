"""A run's length in epochs, its batch and sequence length by plan, and early stopping, in one process."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.harness import metrics, tiny_config, without_timing, write_config, write_text
from tests.distributed.pool import run_job

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    write_text(folder, documents=80)
    config = tiny_config(folder, optim={"schedule": "constant", "warmup_steps": 2})  # does not see a run's length
    words = [str(write_config(folder / "config.yaml", config)), str(folder)]
    done = run_job("tests/train/trainer_job.py", *words, nproc=1)
    assert done.returncode == 0, done.stderr
    return folder


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return without_timing(metrics(run_dir))


def test_batch_and_sequence_length_follow_the_rows_seen(runs: Path) -> None:
    rows = rows_of(runs / "whole")
    seen = [0]
    for row in rows:
        seen.append(seen[-1] + row["batch_size"])
    assert [(at, row["batch_size"], row["seq_len"]) for at, row in zip(seen, rows, strict=False)][:6] == [
        (0, 8, 12), (8, 8, 12), (16, 16, 12), (32, 16, 24), (48, 16, 48), (64, 12, 48),
    ]  # fmt: skip
    assert all(row["tokens"] == 48 * at for at, row in zip(seen[1:], rows, strict=True)), "same tokens per row"


def test_epochs_end_with_the_step_that_completes_them(runs: Path) -> None:
    rows = rows_of(runs / "whole")
    assert rows[-2]["epoch"] < 0.5 <= rows[-1]["epoch"]
    resolved = yaml.safe_load((runs / "whole" / "config.yaml").read_text())["train"]
    assert resolved["steps"] == len(rows) and resolved["epochs"] is None


def test_a_run_resumed_within_its_plan_is_the_uninterrupted_one(runs: Path) -> None:
    whole, resumed = rows_of(runs / "whole"), rows_of(runs / "cut")
    for row in resumed[:-1]:  # a step that was the last one then has a validation
        for key in [key for key in row if key.startswith("valid_")]:
            del row[key]
    assert resumed == whole  # bitwise: same layout, same threads


def test_epochs_count_rows_also_where_the_batch_size_changed_on_resume(runs: Path) -> None:
    rows = rows_of(runs / "doubled")
    assert [row["batch_size"] for row in rows] == [8] * 3 + [16] * (len(rows) - 3)
    assert rows[-2]["epoch"] < 0.5 <= rows[-1]["epoch"]


def test_a_run_stops_early_saves_and_a_resumed_one_says_so_until_it_has_more_patience(runs: Path) -> None:
    stopped = "stopped early at step {} of train.steps=6, after {} validations (eval.patience={})"
    log = (runs / "early" / "log.txt").read_text()
    assert "\n" + stopped.format(3, 2, 2) in log, "the first run ended"
    assert "(step 3, " in log and "nothing to do: " + stopped.format(3, 2, 2) in log, "the second resumed that"
    assert "\n" + stopped.format(5, 4, 4) in log, "the third had more patience"
    assert [row["step"] for row in rows_of(runs / "early")] == [1, 2, 3, 4, 5]
    checkpoints = sorted(path.name for path in (runs / "early" / "checkpoints").iterdir())
    assert checkpoints == ["step_00000003", "step_00000005"]
