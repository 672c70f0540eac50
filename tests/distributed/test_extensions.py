"""The examples of docs/extend, each a file outside of the project: a mixer, objectives and a family, which a config
names. A run with all of them is the same on every layout, goes on from its checkpoint, generates, and goes out and in.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import ROOT, metrics, tiny_config, without_timing, write_config, write_text
from tests.distributed.pool import run_job

pytestmark = pytest.mark.distributed

EXAMPLES = [str(ROOT / "docs/extend" / name) for name in ("moving_average.py", "two_ahead.py", "two_names.py")]
MODEL = {
    "dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64, "ffn_hidden": 48, "rope_theta": 10000.0,
    "layer_pattern": ["attn", "average"],
}  # fmt: skip
LAYOUTS: dict[str, Any] = {"tensor": {"tensor": 2}, "pipeline": {"pipeline": 2}, "zero3": {"zero_stage": 3}}
KEYS = ("loss", "lm_loss", "two_ahead_loss", "small_hidden_loss", "loss/first", "loss/second", "grad_norm")
SAVED, STEPS = 2, 4
RELATIVE = 1e-5  # float32 sums in another order, as in test_equality.py


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extensions")
    write_text(folder, documents=120)
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("first", lines[:40]), ("second", lines[40:])):
        (folder / f"{name}.jsonl").write_text("".join(part))
    sources = [{"path": str(folder / f"{name}.jsonl"), "name": name} for name in ("first", "second")]
    raw = tiny_config(
        folder,
        data={"train": sources},
        train={"steps": STEPS, "objectives": {"two_ahead": {"weight": 0.3}, "small_hidden": {"weight": 0.1}}},
        checkpoint={"interval": SAVED, "keep": 9},
    )
    config = write_config(folder / "config.yaml", {**raw, "model": MODEL, "extensions": EXAMPLES})
    saved = str(folder / "one" / "checkpoints" / f"step_{SAVED:08d}")
    resumed = {"resumed": {"tensor": 2, "resume": saved}}
    for nproc, layouts in ((1, {"one": {}}), (2, LAYOUTS | resumed)):
        done = run_job(
            "tests/distributed/extensions_job.py", str(config), str(folder), json.dumps(layouts), nproc=nproc
        )
        assert done.returncode == 0, done.stderr
    return folder


def assert_close(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(rows) == len(expected) > 0
    for row, right in zip(rows, expected, strict=True):
        assert row.keys() == right.keys()
        assert {key: row[key] for key in KEYS} == pytest.approx({key: right[key] for key in KEYS}, rel=RELATIVE)
        assert (row["targets"], row["tokens"], row["lr"]) == (right["targets"], right["tokens"], right["lr"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_of_objectives_and_sources_are_the_same_on_every_layout(runs: Path, layout: str) -> None:
    assert_close(without_timing(metrics(runs / layout)), without_timing(metrics(runs / "one")))


def test_a_checkpoint_goes_on_on_another_layout(runs: Path) -> None:
    assert_close(without_timing(metrics(runs / "resumed")), without_timing(metrics(runs / "one"))[SAVED:])


def test_a_steps_loss_is_the_sum_of_its_objectives_and_lies_between_its_sources(runs: Path) -> None:
    for row in metrics(runs / "one"):
        parts = [value for key, value in row.items() if key.endswith("_loss") and not key.startswith("valid")]
        assert len(parts) == 5 and row["loss"] == pytest.approx(sum(parts), rel=1e-12)
        low, high = sorted([row["loss/first"], row["loss/second"]])
        assert low <= row["lm_loss"] <= high


def test_weights_are_in_the_losses_that_are_recorded(runs: Path) -> None:
    """Before the first update a token and the one after it are as hard to foresee: about the logarithm of the
    vocabulary, times the weight. Final hidden states are normed: their mean square is 1, but for norm_eps, times the
    weight.
    """
    first = metrics(runs / "one")[0]
    assert first["two_ahead_loss"] == pytest.approx(0.3 * first["lm_loss"], rel=0.05)
    assert first["small_hidden_loss"] == pytest.approx(0.1, rel=0.05)


def test_its_model_generates_through_the_state_of_the_mixer_as_from_the_whole_text(runs: Path) -> None:
    found = json.loads((runs / "model.json").read_text())
    assert len(found["cached"]) > 0 and found["cached"] == found["whole"]


def test_its_model_goes_out_to_the_family_and_comes_back_as_it_was(runs: Path) -> None:
    found = json.loads((runs / "model.json").read_text())
    assert (found["family"], found["difference"]) == ("two_names", 0.0)
