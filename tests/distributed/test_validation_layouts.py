"""A validation reads the same rows on every layout and micro-batch, and a run that goes on otherwise says so."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import metrics, tiny_config, write_text
from tests.distributed.pool import run_job

pytestmark = pytest.mark.distributed

VALIDATED = ("valid_loss", "valid_ppl", "valid_bits_per_byte", "valid_loss_ema")
LAYOUTS: dict[int, dict[str, tuple[int, dict[str, Any]]]] = {
    1: {"one": (4, {}), "one by one": (1, {})},
    2: {
        "data": (4, {}),
        "data, another micro-batch": (8, {}),
        "ZeRO-3": (2, {"zero_stage": 3}),
        "tensor": (8, {"tensor": 2}),
        "pipeline": (4, {"pipeline": 2}),
        "expert": (1, {"expert": 2}),
    },
    4: {
        "data": (4, {}),
        "ZeRO-3": (1, {"zero_stage": 3}),
        "tensor": (2, {"tensor": 2}),
        "pipeline": (2, {"pipeline": 2}),
        "tensor, expert": (4, {"tensor": 2, "expert": 2}),
    },
}
"""Ranks, and by name: micro-batch and `parallel`."""
ROWS = 13
"""Of the held-out text: no layout divides it, so some ranks have less than others."""


def launch(folder: Path, ranks: int, plan: list[dict[str, Any]]) -> None:
    file = folder / f"plan{ranks}.json"
    file.write_text(json.dumps(plan))
    done = run_job("tests/distributed/moves_job.py", str(file), str(folder), nproc=ranks, timeout=900)
    assert done.returncode == 0, done.stderr


def on(folder: Path, ranks: int, name: str, **sections: Any) -> dict[str, Any]:
    """A short run of one layout, as moves_job.py reads it."""
    micro_batch, parallel = LAYOUTS[ranks][name]
    train = {"steps": 4, "micro_batch_size": micro_batch, **sections.pop("train", {})}
    evaluation = {"interval": 1, "rows": ROWS, **sections.pop("eval", {})}
    optim = {"ema_decay": 0.5, "warmup_steps": 2, **sections.pop("optim", {})}
    config = tiny_config(folder, parallel=parallel, train=train, eval=evaluation, optim=optim, **sections)
    return {"name": f"{ranks} {name}", "config": config}


def validations(run_dir: Path) -> list[list[float]]:
    return [[row[key] for key in VALIDATED] for row in metrics(run_dir)]


def assert_equal(folder: Path, names: list[str]) -> None:
    """In float32 sums in another order differ by 1e-7, which four steps hardly amplify; other rows by 1e-3."""
    expected = validations(folder / names[0])
    assert len(expected) == 4 and expected[0] != expected[-1]
    for name in names[1:]:
        for found, right in zip(validations(folder / name), expected, strict=True):
            assert found == pytest.approx(right, rel=1e-5), name


def test_two_ranks_read_the_same_rows_however_they_share_the_work_and_changes_are_said(tmp_path: Path) -> None:
    write_text(tmp_path, documents=60)
    backwards = (json.loads(line)["text"][::-1] for line in (tmp_path / "train.jsonl").read_text().splitlines())
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in backwards))
    plan = [on(tmp_path, 2, name) for name in LAYOUTS[2]]
    begun = on(tmp_path, 2, "tensor", checkpoint={"interval": 2}) | {"name": "changed"}
    changed = on(
        tmp_path,
        2,
        "data",
        train={"steps": 6, "global_batch_size": 8},
        data={"valid": str(tmp_path / "other.jsonl")},
        eval={"patience": 2},
    ) | {"name": "changed"}
    launch(tmp_path, 2, [*plan, begun, changed])
    assert_equal(tmp_path, [f"2 {name}" for name in LAYOUTS[2]])
    log = (tmp_path / "changed" / "log.txt").read_text()
    for line in (
        "changed: parallel.tensor 2 -> 1",
        "changed: train.global_batch_size 16 -> 8",
        "changed: train.micro_batch_size 8 -> 4",
        "changed: train.steps 4 -> 6: learning rate 1.00e-04 at step 4, ",
        f"changed: a validation reads other rows now: {ROWS} rows -> {ROWS} of ",
    ):
        assert sum(found.startswith(line) for found in log.splitlines()) == 1, line
    assert f"a validation reads {ROWS} of " in log and f"held-out rows (eval.rows={ROWS})" in log
    assert [row["step"] for row in metrics(tmp_path / "changed")] == [1, 2, 3, 4, 5, 6], "no early stop on another text"


@pytest.mark.full
def test_one_two_and_four_ranks_read_the_same_rows(tmp_path: Path) -> None:
    write_text(tmp_path, documents=60)
    for ranks, layouts in LAYOUTS.items():
        launch(tmp_path, ranks, [on(tmp_path, ranks, name) for name in layouts])
    assert_equal(tmp_path, [f"{ranks} {name}" for ranks, layouts in LAYOUTS.items() for name in layouts])


@pytest.mark.full
def test_the_last_step_of_a_run_with_patience_is_the_same_on_every_layout(tmp_path: Path) -> None:
    write_text(tmp_path, documents=60)
    steps = {"train": {"steps": 12}, "optim": {"lr": 0.3, "min_lr": 0.3, "schedule": "constant"}}
    keep = {"interval": 100, "keep_best": True}
    ends = {}
    for ranks, layouts in LAYOUTS.items():
        plan = [on(tmp_path, ranks, name, eval={"patience": 2}, checkpoint=keep, **steps) for name in layouts]
        launch(tmp_path, ranks, plan)
        for item in plan:
            folder = tmp_path / item["name"]
            kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
            ends[item["name"]] = (metrics(folder)[-1]["step"], kept)
    assert len(set(map(str, ends.values()))) == 1 and ends["1 one"][0] < 12, ends
