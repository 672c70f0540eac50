"""Tasks in the course of a training: the same answers on every layout, a run that they do not disturb, and a best and
a patience that follow them.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.harness import metrics, run, tiny_config, without_timing, write_text

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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_text(tmp_path, documents=60)
    write_tasks(tmp_path)
    return tmp_path


def plan_of(folder: Path, name: str, **sections: Any) -> dict[str, Any]:
    """A short run with the tasks, as moves_job.py reads it."""
    train = {"steps": 4, **sections.pop("train", {})}
    evaluation = {
        "tasks": [str(folder / f"{name}.yaml") for name in TASKS],
        "tasks_interval": 2,
        "rows": 8,
        "interval": 3,
        **sections.pop("eval", {}),
    }
    optim = {"lr": 0.01, "warmup_steps": 1, **sections.pop("optim", {})}
    return {"name": name, "config": tiny_config(folder, train=train, eval=evaluation, optim=optim, **sections)}


def launch(folder: Path, ranks: int, plan: list[dict[str, Any]]) -> None:
    file = folder / f"plan{ranks}.json"
    file.write_text(json.dumps(plan))
    done = run("tests/distributed/moves_job.py", str(file), str(folder), nproc=ranks, timeout=900)
    assert done.returncode == 0, done.stderr


def of_tasks(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key.startswith("eval/")}


def without_tasks(run_dir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in without_timing(metrics(run_dir))]


def test_a_run_with_tasks_is_the_run_without_and_goes_on_as_if_it_had_not_stopped(folder: Path) -> None:
    keep = {"interval": 1000, "keep": 1, "keep_best": True}
    followed = {"best": "eval/text/bits_per_byte", "at_start": True}
    early = {"best": "eval/choice/acc", "patience": 1}
    launch(
        folder,
        1,
        [
            plan_of(folder, "with", eval=followed, checkpoint=keep, log={"tensorboard": True}),
            plan_of(folder, "without", eval={"tasks": [], "tasks_interval": None}),
            plan_of(folder, "cut", eval=followed, checkpoint=keep, train={"steps": 3}, optim={"schedule": "constant"}),
            plan_of(folder, "cut", eval=followed, checkpoint=keep, optim={"schedule": "constant"}),
            plan_of(folder, "whole", eval=followed, checkpoint=keep, optim={"schedule": "constant"}),
            plan_of(folder, "early", eval=early, optim={"lr": 1e-30, "min_lr": 0.0}, train={"steps": 9}),
        ],
    )
    rows = metrics(folder / "with")
    assert without_tasks(folder / "with")[1:] == without_tasks(folder / "without"), "bitwise"
    assert [row["step"] for row in rows if of_tasks(row)] == [0, 2, 4]
    assert list(of_tasks(rows[0])) == list(of_tasks(rows[4]))
    fields = {"eval/choice/acc", "eval/choice/acc_stderr", "eval/word/f1", "eval/text/bits_per_byte"}
    assert fields <= {*of_tasks(rows[2])}
    # random words become likelier with each step, so the last one is the best
    bits = [row["eval/text/bits_per_byte"] for row in rows if of_tasks(row)]
    assert bits == sorted(bits, reverse=True) and len(set(bits)) == 3
    cut, whole = without_timing(metrics(folder / "cut")), without_timing(metrics(folder / "whole"))
    assert cut[-1] == whole[-1] and cut[-1]["step"] == 4, "resumed in between, bitwise"
    log = (folder / "early" / "log.txt").read_text()
    assert "stopped early at step 4 of train.steps=9" in log and "without eval/choice/acc above the" in log


def test_two_ranks_answer_alike_however_they_share_the_work(folder: Path) -> None:
    launch(folder, 2, [plan_of(folder, name, parallel=parallel) for name, parallel in LAYOUTS[2].items()])
    launch(folder, 1, [plan_of(folder, "one")])
    assert_equal(folder, ["one", *LAYOUTS[2]])


def assert_equal(folder: Path, names: list[str]) -> None:
    """In float32 sums in another order differ by 1e-7, which four steps hardly amplify; no choice of these is so near.
    """
    first = [of_tasks(row) for row in metrics(folder / names[0]) if of_tasks(row)]
    assert len(first) == 2 and first[0] != first[1]
    for name in names[1:]:
        found = [of_tasks(row) for row in metrics(folder / name) if of_tasks(row)]
        for row, right in zip(found, first, strict=True):
            assert row == pytest.approx(right, rel=1e-5), name


@pytest.mark.full
def test_four_ranks_answer_alike_however_they_share_the_work(folder: Path) -> None:
    train = {"micro_batch_size": 2}  # DualPipeV needs four in a step
    launch(folder, 4, [plan_of(folder, name, parallel=parallel, train=train) for name, parallel in LAYOUTS[4].items()])
    launch(folder, 1, [plan_of(folder, "one")])
    assert_equal(folder, ["one", *LAYOUTS[4]])
