"""Tasks in the course of a training: the same answers on every layout, a run that they do not disturb, and a best and
a patience that follow them.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm.checkpoint.reader import newest_valid
from tests.distributed.harness import metrics, tiny_config, without_timing, write_text
from tests.distributed.pool import run_job
from tools.inspection import inspect

pytestmark = pytest.mark.distributed

DOCUMENTS = 11
"""No number of ranks divides it."""
TASKS: dict[str, dict[str, Any]] = {
    "choice": {"kind": "multiple_choice", "prompt": "{{ a }} then", "choices": "{{ choices }}", "gold": "{{ gold }}",
               "metrics": ["acc", "acc_norm"]},
    "word": {"kind": "generate", "prompt": "{{ a }} {{ a }}", "gold": "{{ choices[0] }}", "max_new_tokens": 5,
             "stop": ["e"], "metrics": ["f1"]},
    "text": {"kind": "perplexity", "prompt": "{{ a * 9 }}", "metrics": ["bits_per_byte"]},
}  # fmt: skip
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {"ZeRO-2": {"zero_stage": 2}, "tensor": {"tensor": 2}},
    4: {
        "ZeRO-3": {"zero_stage": 3},
        "tensor, ZeRO-1": {"tensor": 2},
        "pipeline": {"pipeline": 2},
        "DualPipeV": {"pipeline": 2, "pipeline_schedule": "dualpipev"},
        "tensor, expert": {"tensor": 2, "expert": 2},
        "expert": {"expert": 4},
    },
}
"""Ranks, and by name: `parallel`."""


def write_tasks(folder: Path) -> None:
    """Tasks over one file of words."""
    rows = [
        {"a": f"{'abcdefgh'[i % 8]}ab {i}", "choices": ["dab", "ge ac", "c"][: 2 + i % 2], "gold": i % 2}
        for i in range(DOCUMENTS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "data": {"path": "rows.jsonl"}, **task}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of one process have been."""
    folder = tmp_path_factory.mktemp("tasks")
    write_text(folder, documents=60)
    write_tasks(folder)
    early = {"best": "eval/choice/acc", "patience": 1}
    launch(
        folder,
        1,
        [
            plan_of(folder, "with", log={"tensorboard": True}),
            plan_of(folder, "without", eval={"tasks": [], "tasks_interval": None, "best": "valid_loss"}),
            plan_of(folder, "cut", train={"steps": 3}),
            plan_of(folder, "cut"),
            plan_of(folder, "early", eval=early, optim={"lr": 1e-30, "min_lr": 0.0}, train={"steps": 9}),
        ],
    )
    return folder


def plan_of(folder: Path, name: str, **sections: Any) -> dict[str, Any]:
    """A short run with the tasks, as moves_job.py reads it."""
    train = {"steps": 4, **sections.pop("train", {})}
    evaluation = {
        "tasks": [str(folder / f"{task}.yaml") for task in TASKS],
        "tasks_interval": 2,
        "best": "eval/text/bits_per_byte",
        "at_start": True,
        "rows": 8,
        "interval": 3,
        **sections.pop("eval", {}),
    }
    optim = {"lr": 0.01, "schedule": "constant", "warmup_steps": 1, **sections.pop("optim", {})}
    keep = {"interval": 3, "keep": 1, "keep_best": True}
    config = tiny_config(folder, train=train, eval=evaluation, optim=optim, checkpoint=keep, **sections)
    return {"name": name, "config": config}


def launch(folder: Path, ranks: int, plan: list[dict[str, Any]]) -> None:
    file = folder / f"plan{ranks}.json"
    file.write_text(json.dumps(plan))
    done = run_job("tests/distributed/moves_job.py", str(file), str(folder), nproc=ranks, timeout=900)
    assert done.returncode == 0, done.stderr


def of_tasks(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key.startswith("eval/")}


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    return [of_tasks(row) for row in metrics(run_dir) if of_tasks(row)]


def without_tasks(run_dir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in without_timing(metrics(run_dir))]


def test_a_run_with_tasks_is_bitwise_the_run_without(folder: Path) -> None:
    assert without_tasks(folder / "with") == without_tasks(folder / "without")
    rows = metrics(folder / "with")
    assert [row["step"] for row in rows if of_tasks(row)] == [0, 2, 4]
    fields = {f"eval/{name}/{metric}" for name, task in TASKS.items() for metric in task["metrics"]}
    for row in (rows[0], rows[2], rows[4]):
        assert fields | {f"{field}_stderr" for field in fields} == {*of_tasks(row)}


def test_a_run_goes_on_as_if_it_had_not_stopped_also_in_what_is_best(folder: Path) -> None:
    cut, whole = without_timing(metrics(folder / "cut")), without_timing(metrics(folder / "with"))
    assert cut[-1] == whole[-1] and cut[-1]["step"] == 4, "bitwise"
    best = {name: newest_valid(folder / name / "checkpoints")[0] for name in ("with", "cut")}
    states = {name: found.meta_with("best")["best"] for name, found in best.items() if found is not None}
    assert states["with"] == states["cut"] and states["with"]["metric"] == "eval/text/bits_per_byte"


def test_the_best_checkpoint_and_patience_are_those_of_the_followed_metric(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bits = {row["step"]: row["eval/text/bits_per_byte"] for row in metrics(folder / "with") if of_tasks(row)}
    best = min(bits, key=lambda step: bits[step])
    kept = {int(path.name.split("_")[-1]) for path in (folder / "with" / "checkpoints").iterdir()}
    assert len(set(bits.values())) == 3 and kept == {best, 4} - {0}
    inspect(str(folder / "with"))
    assert f"the best, eval/text/bits_per_byte {bits[best]:.4f}" in capsys.readouterr().out
    log = (folder / "early" / "log.txt").read_text()
    assert "stopped early at step 2 of train.steps=9" in log and "without eval/choice/acc above the" in log


def test_two_ranks_answer_alike_however_they_share_the_work(folder: Path) -> None:
    launch(folder, 2, [plan_of(folder, name, parallel=parallel) for name, parallel in LAYOUTS[2].items()])
    assert_equal(folder, ["with", *LAYOUTS[2]])


def assert_equal(folder: Path, names: list[str]) -> None:
    """In float32 sums in another order differ by 1e-7, which four steps hardly amplify; no choice of these is so near.
    """
    first = evaluations(folder / names[0])
    assert len(first) == 3 and first[0] != first[1] != first[2]
    for name in names[1:]:
        for found, right in zip(evaluations(folder / name), first, strict=True):
            assert found == pytest.approx(right, rel=1e-5), name


@pytest.mark.full
def test_four_ranks_answer_alike_however_they_share_the_work(folder: Path) -> None:
    train = {"micro_batch_size": 2}  # DualPipeV needs four in a step
    launch(folder, 4, [plan_of(folder, name, parallel=parallel, train=train) for name, parallel in LAYOUTS[4].items()])
    assert_equal(folder, ["with", *LAYOUTS[4]])
