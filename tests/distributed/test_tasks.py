"""Hidden tokens, and several tasks in one run, are learned alike on every layout, from rows of which some see both ways
and some do not in one micro-batch; and after a resume bit for bit.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from llm import LLM
from tests.distributed.harness import metrics, without_timing, write_text
from tests.distributed.runs import LAYOUTS, Runs, perform

pytestmark = pytest.mark.distributed

STEPS, HALF = 4, 2
RELATIVE = 1e-5
"""float32: sums in another order."""
RUNS = Runs(STEPS, HALF, {"model": {"vocab_size": -1}, "optim": {"lr": 1e-2}, "chat": {"add_tokens": True}})
MIXED = [{"task": "lm", "source": "plain"}, {"task": "mlm", "weight": 0.5, "source": "hidden"}]
KEYS = {"mlm": ("mlm_loss",), "mixed": ("lm_loss", "mlm_loss", "loss/plain", "loss/hidden")}
"""Fields of metrics.jsonl beside the loss, its parts among them."""


def item(folder: Path, kind: str, name: str, **sections: Any) -> dict[str, Any]:
    """A run of one kind, `mlm` or `mixed`; its sources are the same texts."""
    text = str(folder / "train.jsonl")
    made = RUNS.item(folder, f"{kind} {name}", **{"data": {"valid": None}, **sections})
    made["config"]["task"] = "mlm"
    if kind == "mixed":
        sources = [{"path": text, "name": name, "weight": weight} for name, weight in (("plain", 1), ("hidden", 2))]
        made["config"] |= {"task": MIXED, "data": {**made["config"]["data"], "train": sources}}
    return made


def assert_alike(folder: Path, kind: str, name: str) -> None:
    rows, expected = (metrics(folder / f"{kind} {run}") for run in (name, "one process"))
    assert len(rows) == len(expected) == STEPS
    for row, right in zip(rows, expected, strict=True):
        for key in ("loss", "grad_norm", *KEYS[kind]):
            assert row[key] == pytest.approx(right[key], rel=RELATIVE), (name, row["step"], key)
        assert (row["targets"], row["routing_checksum"]) == (right["targets"], right["routing_checksum"])


QUICK = ("ZeRO-3", "tensor")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_text(folder, documents=80)
    perform(folder, [item(folder, "mixed", "one process")], nproc=1)
    again = {**LAYOUTS[2]["tensor"], "checkpoint": RUNS.half_of(folder, "mixed tensor")}
    cut = [item(folder, "mixed", name, **LAYOUTS[2][name]) for name in QUICK]
    perform(folder, [*cut, item(folder, "mixed", "again", **again)], nproc=2)
    return folder


@pytest.mark.parametrize("name", QUICK)
def test_several_tasks_are_learned_alike_on_two_ranks(runs: Path, name: str) -> None:
    assert_alike(runs, "mixed", name)


def test_the_loss_is_the_sum_of_the_tasks_each_over_its_own_targets(runs: Path) -> None:
    first = metrics(runs / "mixed one process")[0]
    assert first["lm_loss"] == pytest.approx(first["loss/plain"], rel=1e-6)  # float32: sums in another order
    assert first["mlm_loss"] == pytest.approx(first["loss/hidden"] / 2, rel=1e-6), "its weight"
    parts = [first[key] for key in ("lm_loss", "mlm_loss", "moe_balance_loss", "moe_z_loss")]
    assert first["loss"] == pytest.approx(sum(parts), rel=1e-12)


def test_a_resume_hides_the_same_tokens_bit_for_bit(runs: Path) -> None:
    assert without_timing(metrics(runs / "mixed again")) == without_timing(metrics(runs / "mixed tensor"))[HALF:]
    first, second = (dict(LLM.from_pretrained(runs / f"mixed {n}").named_parameters()) for n in ("tensor", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.full
@pytest.mark.parametrize("kind", KEYS)
def test_every_layout_learns_alike(tmp_path: Path, kind: str) -> None:
    write_text(tmp_path, documents=80)
    for ranks, layouts in LAYOUTS.items():
        items = [item(tmp_path, kind, name, **sections) for name, sections in layouts.items()]
        perform(tmp_path, items, nproc=ranks, timeout=900)
        for name in layouts:
            assert_alike(tmp_path, kind, name)
