"""Hidden tokens, and three tasks in one run, are learned alike on every layout, from micro-batches in which some rows
see both ways and some do not; and after a resume bit for bit.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from llm import LLM
from tests.distributed.harness import metrics, run, without_timing, write_config, write_text
from tests.distributed.runs import LAYOUTS, Runs, perform
from tests.distributed.test_kill_and_resume import kill_one_rank_after

pytestmark = pytest.mark.distributed

STEPS, HALF = 4, 2
RELATIVE = 1e-5
"""float32: sums in another order."""
HEAD = {"n_prediction": 2, "prediction": "regression"}
RUNS = Runs(STEPS, HALF, {"model": {"vocab_size": -1}, "optim": {"lr": 1e-2}, "chat": {"add_tokens": True}})
JOINT = [
    {"task": "lm", "source": "plain"},
    {"task": "mlm", "weight": 0.5, "source": "hidden"},
    {"task": "prediction", "weight": 2.0, "source": "labels"},
]
PARTS = {"mlm": ("mlm_loss",), "joint": ("lm_loss", "mlm_loss", "prediction_loss")}
DROPOUT = {"dropout": 0.1, "ffn_dropout": 0.1, "head_dropout": 0.1}


def write_rows(folder: Path) -> None:
    """Texts, and texts with how often they have two letters, of which some are not known."""
    write_text(folder, documents=80)
    draw = random.Random(5)
    texts = ["".join(draw.choices("abcdefgh ", k=draw.randint(4, 40))) for _ in range(150)]
    rows = [
        {"text": text, **{key: text.count(key) if draw.random() < 0.8 else None for key in "ab"}} for text in texts
    ]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def item(folder: Path, kind: str, name: str, *, model: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    """A run of one kind, `mlm` or `joint`; sources of texts are the same texts."""
    own = (model or {}) | (HEAD if kind == "joint" else {})
    made = RUNS.item(folder, f"{kind} {name}", model=own, **{"data": {"valid": None}, **sections})
    made["config"]["task"] = "mlm"
    if kind == "joint":
        text = str(folder / "train.jsonl")
        columns = {"text": "text", "label": ["a", "b"]}
        sources = [
            {"path": text, "name": "plain"},
            {"path": text, "name": "hidden", "weight": 2},
            {"path": str(folder / "labels.jsonl"), "name": "labels", "kind": "labelled", "columns": columns},
        ]
        made["config"] |= {"task": JOINT, "data": {**made["config"]["data"], "train": sources}}
    return made


def assert_alike(folder: Path, kind: str, name: str) -> None:
    rows, expected = (metrics(folder / f"{kind} {of}") for of in (name, "one process"))
    assert len(rows) == len(expected) == STEPS
    for row, right in zip(rows, expected, strict=True):
        for key in ("loss", "grad_norm", *PARTS[kind]):
            assert row[key] == pytest.approx(right[key], rel=RELATIVE), (name, row["step"], key)
        assert (row["targets"], row["routing_checksum"]) == (right["targets"], right["routing_checksum"])


QUICK = ("ZeRO-3", "tensor")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_rows(folder)
    perform(folder, [item(folder, "joint", "one process")], nproc=1)
    again = {**LAYOUTS[2]["tensor"], "checkpoint": RUNS.half_of(folder, "joint tensor")}
    cut = [item(folder, "joint", name, **LAYOUTS[2][name]) for name in QUICK]
    perform(folder, [*cut, item(folder, "joint", "again", **again)], nproc=2)
    return folder


@pytest.mark.parametrize("name", QUICK)
def test_several_tasks_are_learned_alike_on_two_ranks(runs: Path, name: str) -> None:
    assert_alike(runs, "joint", name)


def test_the_loss_is_the_sum_of_the_tasks_each_over_its_own_targets(runs: Path) -> None:
    first = metrics(runs / "joint one process")[0]
    assert first["lm_loss"] == pytest.approx(first["loss/plain"], rel=1e-6)  # float32: sums in another order
    assert first["mlm_loss"] == pytest.approx(first["loss/hidden"] / 2, rel=1e-6), "its weight"
    parts = [first[key] for key in (*PARTS["joint"], "moe_balance_loss", "moe_z_loss")]
    assert first["loss"] == pytest.approx(sum(parts), rel=1e-12)


def test_a_resume_reads_the_same_rows_of_every_task_bit_for_bit(runs: Path) -> None:
    assert without_timing(metrics(runs / "joint again")) == without_timing(metrics(runs / "joint tensor"))[HALF:]
    first, second = (dict(LLM.from_pretrained(runs / f"joint {n}").named_parameters()) for n in ("tensor", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.full
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("kind", PARTS)
def test_every_layout_learns_alike(tmp_path: Path, kind: str, dropout: bool) -> None:
    write_rows(tmp_path)
    model = DROPOUT if dropout else {}
    for ranks, layouts in LAYOUTS.items():
        items = [item(tmp_path, kind, name, model=model, **sections) for name, sections in layouts.items()]
        perform(tmp_path, items, nproc=ranks, timeout=900)
        for name in layouts:
            assert_alike(tmp_path, kind, name)


@pytest.mark.full
def test_a_killed_run_of_several_tasks_is_bitwise_the_uninterrupted_one(tmp_path: Path) -> None:
    write_rows(tmp_path)
    rates = {"ffn_dropout": 0.1, "head_dropout": 0.1}
    sections = {"train": {"steps": 14}, "checkpoint": {"interval": 3}, "model": rates}
    config = write_config(tmp_path / "config.yaml", item(tmp_path, "joint", "killed", **sections)["config"])
    base = ["--config", str(config), "--parallel.zero_stage=2"]
    whole, victim = tmp_path / "whole", tmp_path / "killed"
    assert run("launch/pretrain.py", *base, "--run_dir", str(whole), nproc=2).returncode == 0
    arguments = [*base, "--run_dir", str(victim)]
    for i, step in enumerate((5, 10)):
        kill_one_rank_after(step, arguments, victim, rank=i % 2)
    done = run("launch/pretrain.py", *arguments, nproc=2)
    assert done.returncode == 0 and f"resumed from {victim}/checkpoints/step_" in done.stdout, done.stderr
    assert without_timing(metrics(victim)) == without_timing(metrics(whole))
    last = Path("checkpoints/step_00000014/rank_00000.safetensors")
    assert (victim / last).read_bytes() == (whole / last).read_bytes()


@pytest.mark.full
def test_a_replayed_step_of_several_tasks_says_the_loss_of_each_token_by_its_own_task(tmp_path: Path) -> None:
    write_rows(tmp_path)
    made = item(tmp_path, "joint", "replayed")
    config, folder = write_config(tmp_path / "config.yaml", made["config"]), tmp_path / "run"
    words = ["--config", str(config), "--run_dir", str(folder)]
    assert run("launch/pretrain.py", *words).returncode == 0
    done = run("launch/pretrain.py", *words, "--replay_step=3")
    assert done.returncode == 0 and "bit for bit as recorded" in done.stdout, done.stderr
    found = json.loads((folder / "replay" / "step_00000003.json").read_text())
    row = metrics(folder)[2]
    losses = row["lm_loss"] + row["mlm_loss"]
    assert found["documents_loss"] == pytest.approx(losses, rel=1e-6)  # float32: sums in another order
    with_targets = {of_row["source"] for of_row in found["rows"] if of_row["n_targets"]}
    assert with_targets == {"plain", "hidden"} and len(found["rows"]) == 16
    shares = [document["grad_norm"] for of_row in found["rows"] for document in of_row["documents"]]
    assert sum(share is not None and share > 0 for share in shares) == 5
