"""Runs on pairs: trained and validated on several ranks as on one process, and gone on with bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.sample_helpers import write_rows
from tests.distributed.harness import metrics, without_timing
from tests.distributed.runs import LAYOUTS, Runs, perform

pytestmark = pytest.mark.distributed

STEPS, HALF = 4, 2
MODEL: dict[str, Any] = {
    "n_layers": 2, "encoder_layers": 2, "dropout": 0.1, "attn_dropout": 0.1, "moe": None, "attention_chunk_size": None,
    "nope_layer_interval": None,
}  # fmt: skip
RUNS = Runs(STEPS, HALF, {"model": MODEL, "optim": {"lr": 1e-2}, "eval": {"interval": 2}})
MEASURED = ("valid_loss", "valid_ppl", "valid_acc")


def item(folder: Path, name: str, **given: Any) -> dict[str, Any]:
    made = RUNS.item(folder, name, **given)
    sides = {"train": [{"path": str(folder / "pairs.jsonl"), "kind": "pair"}], "valid": 0.2, "source_len": 32}
    made["config"] |= {"task": "seq2seq", "data": made["config"]["data"] | sides}
    return made


def write_pairs(folder: Path) -> None:
    draw = np.random.default_rng(0)
    texts = ["".join(draw.choice(list("abcdefgh"), size=int(n))) for n in draw.integers(2, 28, 300)]
    write_rows(folder / "pairs.jsonl", [{"source": text, "target": text[::-1]} for text in texts])


def assert_validated_alike(folder: Path, name: str, reference: str) -> None:
    rows, expected = ([row for row in metrics(folder / run) if "valid_loss" in row] for run in (name, reference))
    assert len(rows) == len(expected) == 2
    for row, right in zip(rows, expected, strict=True):
        assert [row[key] for key in MEASURED] == pytest.approx([right[key] for key in MEASURED], rel=1e-5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder)
    perform(folder, [item(folder, "one")], nproc=1)
    tensor: dict[str, Any] = {"parallel": {"tensor": 2}, "micro": 8}
    again = item(folder, "again", **tensor, checkpoint=RUNS.half_of(folder, "tensor"))
    perform(folder, [item(folder, "tensor", **tensor), again], nproc=2)
    return folder


def test_pairs_train_and_are_validated_on_ranks_as_on_one_process(runs: Path) -> None:
    RUNS.assert_alike(runs, "tensor", "one", 1e-5)  # float32: sums in another order
    assert_validated_alike(runs, "tensor", "one")


def test_a_resume_goes_on_bit_for_bit(runs: Path) -> None:
    assert without_timing(metrics(runs / "again")) == without_timing(metrics(runs / "tensor"))[HALF:]


@pytest.mark.full
def test_pairs_train_alike_on_every_layout_of_two_ranks(runs: Path) -> None:
    dense = {name: given for name, given in LAYOUTS[2].items() if name not in ("expert", "tensor")}
    perform(runs, [item(runs, name, **given) for name, given in dense.items()], nproc=2, timeout=600)
    for name in dense:
        RUNS.assert_alike(runs, name, "one", 1e-5)
        assert_validated_alike(runs, name, "one")
