"""A checkpoint saved on any layout continues on any other as if nothing had happened.

Each layout trains without interruption and saves in the middle; each layout then continues each of these checkpoints.
Against the run of one process the numbers are equal up to the order of sums; where a layout continues its own
checkpoint, the record and the files of the last checkpoint are the same bytes. The model is the one of
test_layouts.py, with everything on and no choice of a router so close that rounding could turn it.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.distributed.harness import TINY_MODEL, metrics, tiny_config, without_timing, write_text
from tests.distributed.pool import run_job
from tests.distributed.test_layouts import MARGIN
from tests.distributed.test_zero import BF16, BF16_MEAN, FP16, FP32
from tests.machine import has, needs

pytestmark = pytest.mark.distributed

Rows = list[dict[str, Any]]
BATCH = 24  # what 1, 2, 3, 4 and 8 ranks divide
CLIP_NORM = 0.5
MODEL: dict[str, Any] = {"init_std": 0.1, "moe": {**TINY_MODEL["moe"], "aux_alpha": 0.1}}
BOUND = {"fp32": FP32, "bf16": BF16, "fp16": FP16}
OF_ROUTING = ("routing_checksum", "expert_load", "expert_rank_load", "moe_balance_loss")
OF_THE_LAYOUT = "expert_rank_load"


class On(NamedTuple):
    """Ranks and how they share the work."""

    ranks: int
    micro_batch: int
    parallel: dict[str, Any] = {}


LAYOUTS: dict[str, On] = {
    "1 rank": On(1, 8),
    "2 ranks ZeRO-3": On(2, 12, {"zero_stage": 3}),
    "2 ranks ZeRO-2 offload": On(2, 12, {"zero_stage": 2, "offload_optimizer": True}),
    "2 ranks TP2": On(2, 24, {"tensor": 2}),
    "2 ranks EP2 ZeRO-2": On(2, 6, {"expert": 2, "zero_stage": 2}),
    "3 ranks ZeRO-3": On(3, 8, {"zero_stage": 3}),
    "4 ranks ZeRO-1": On(4, 6, {"zero_stage": 1}),
    "4 ranks TP2 ZeRO-3": On(4, 12, {"tensor": 2, "zero_stage": 3}),
    "4 ranks TP2 EP2 ZeRO-2": On(4, 12, {"tensor": 2, "expert": 2, "zero_stage": 2}),
    "4 ranks TP4": On(4, 12, {"tensor": 4}),  # two key and value heads
    "4 ranks EP4 ZeRO-2": On(4, 6, {"expert": 4, "zero_stage": 2}),
    "8 ranks TP2 EP2 ZeRO-2": On(8, 6, {"tensor": 2, "expert": 2, "zero_stage": 2, "sequence_parallel": False}),
    "8 ranks ZeRO-3": On(8, 3, {"zero_stage": 3}),
    "2 ranks PP2": On(2, 6, {"pipeline": 2}),
    "4 ranks PP4": On(4, 3, {"pipeline": 4}),
    "4 ranks PP2 DP2": On(4, 6, {"pipeline": 2}),
    "4 ranks PP2 TP2": On(4, 6, {"pipeline": 2, "tensor": 2}),
    "4 ranks PP2 EP2": On(4, 6, {"pipeline": 2, "expert": 2}),
    "4 ranks PP2 DP2 V": On(4, 1, {"pipeline": 2, "pipeline_schedule": "dualpipev"}),
    "8 ranks PP4 DP2": On(8, 3, {"pipeline": 4}),
    "8 ranks PP2 TP2 DP2": On(8, 3, {"pipeline": 2, "tensor": 2}),
}
PIPELINES = tuple(name for name in LAYOUTS if "PP" in name)
REFERENCE = "1 rank"
OFFLOAD = "2 ranks ZeRO-2 offload"
HALF = (REFERENCE, OFFLOAD, "2 ranks ZeRO-3", "2 ranks TP2", "4 ranks TP2 EP2 ZeRO-2")


class Family(NamedTuple):
    """Runs that may continue each other's checkpoints. `seed`: one without a close choice."""

    layouts: tuple[str, ...]
    seed: int
    sections: dict[str, dict[str, Any]] = {}
    saved: int = 10
    steps: int = 20


FEW = Family(("4 ranks TP2 EP2 ZeRO-2", "4 ranks TP2 ZeRO-3", "4 ranks ZeRO-1"), 20, saved=3, steps=8)
FAMILIES: dict[str, Family] = {
    "adamw": Family(tuple(name for name in LAYOUTS if name != OFFLOAD and name not in PIPELINES), 20),
    "pipelines": Family(
        (REFERENCE, "4 ranks TP2 EP2 ZeRO-2", *PIPELINES), 20, {"optim": {"ema_decay": 0.8}}
    ),
    "tied pipelines": Family(
        (REFERENCE, "2 ranks PP2", "4 ranks PP4", "4 ranks PP2 DP2 V"), 21, {"model": {**MODEL, "tie_embeddings": True}}
    ),
    "few steps": FEW._replace(layouts=(REFERENCE,)),
    "muon": Family(
        (REFERENCE, OFFLOAD, "3 ranks ZeRO-3", "4 ranks TP2 EP2 ZeRO-2", "4 ranks TP4"),
        4,
        {"optim": {"name": "muon", "ema_decay": 0.8}},
    ),
    # with init_std=0.02, as what rounds more has close choices turned, which then matter less
    "bf16": Family(HALF, 0, {"model": {**MODEL, "init_std": 0.02}, "train": {"precision": "bf16"}}),
    "fp16": Family(HALF, 0, {"model": {**MODEL, "init_std": 0.02}, "train": {"precision": "fp16"}}),
}
CHAINS = (
    ("2 ranks TP2", "3 ranks ZeRO-3", "4 ranks TP2 EP2 ZeRO-2", "2 ranks TP2"),
    ("4 ranks PP4", "4 ranks TP2 ZeRO-3", "4 ranks PP2 DP2", REFERENCE),
)
CHAIN_EVERY = 5


def item(folder: Path, name: str, family: Family, layout: str, interval: int, resume: Path | None) -> dict[str, Any]:
    """A run as moves_job.py reads it."""
    on, given = LAYOUTS[layout], family.sections
    train = {"global_batch_size": BATCH, "micro_batch_size": on.micro_batch, "seq_len": 32, "seed": family.seed}
    sections = {
        **given,
        "model": given.get("model", MODEL),
        "parallel": on.parallel,
        "optim": {"clip_norm": CLIP_NORM, **given.get("optim", {})},
        "train": {**train, **given.get("train", {}), "steps": family.steps},
        "checkpoint": {"interval": interval, "keep": 5, "resume": str(resume or "never")},
        "eval": {"rows": BATCH},
    }
    return {"name": name, "config": tiny_config(folder, **sections)}


def saving(folder: Path, key: str, family: Family, layout: str) -> dict[str, Any]:
    """The uninterrupted run."""
    return item(folder, f"{key}/{layout}/whole", family, layout, family.saved, None)


def continuing(folder: Path, key: str, family: Family, saved: str, layout: str) -> dict[str, Any]:
    """The run that begins with the checkpoint of another."""
    name, path = f"{key}/{layout}/of {saved}", checkpoint(folder / key / saved / "whole", family.saved)
    return item(folder, name, family, layout, family.steps, path)


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def launch(folder: Path, ranks: int, plan: list[dict[str, Any]]) -> None:
    file = folder / "plan.json"
    file.write_text(json.dumps(plan))
    done = run_job("tests/distributed/moves_job.py", str(file), str(folder), nproc=ranks, timeout=3600)
    assert done.returncode == 0, done.stderr


def assert_equal(rows: Rows, expected: Rows, precision: str) -> None:
    """Every field but those of time and layout: exactly what counts, and losses and norms up to rounding."""
    assert len(rows) == len(expected) > 0
    for row, right in zip(without_timing(rows), without_timing(expected), strict=True):
        assert row.keys() == right.keys()
        for key, value in right.items():
            if key == OF_THE_LAYOUT or (precision != "fp32" and key in OF_ROUTING):
                continue
            if isinstance(value, float):
                assert row[key] == pytest.approx(value, rel=BOUND[precision]), (right["step"], key)
            else:
                assert row[key] == value, (right["step"], key)
    off = [row["loss"] / right["loss"] - 1 for row, right in zip(rows, expected, strict=True)]
    assert abs(sum(off) / len(off)) < BF16_MEAN, "what does not average out would be a bias"


def assert_same_bytes(run_dir: Path, whole: Path, family: Family) -> None:
    assert without_timing(metrics(run_dir)) == without_timing(metrics(whole))[family.saved :]
    last, right = (checkpoint(run, family.steps) for run in (run_dir, whole))
    files = sorted(path.name for path in right.glob("rank_*.safetensors"))
    assert files == sorted(path.name for path in last.glob("rank_*.safetensors")) and files
    for name in files:
        assert (last / name).read_bytes() == (right / name).read_bytes(), name


def assert_tells(rows: Rows, steps: int) -> None:
    """A run that went on from another state, or with another batch, could not have these numbers by chance."""
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for key in ("loss", "routing_checksum", "targets", "lr"):
        assert len({row[key] for row in rows}) > steps // 3, key
    assert all(abs(a["loss"] / b["loss"] - 1) > 10 * FP32 for a, b in zip(rows, rows[1:], strict=False))
    assert min(row["grad_norm"] for row in rows if row["grad_norm"] is not None) > CLIP_NORM, "clipping must bite"


def by_ranks(layouts: Iterable[str]) -> list[int]:
    return sorted({LAYOUTS[name].ranks for name in layouts})


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layouts of four ranks, in one launch."""
    folder = tmp_path_factory.mktemp("few")
    write_text(folder)
    wholes = [saving(folder, "few", FEW, layout) for layout in FEW.layouts]
    parts = [continuing(folder, "few", FEW, saved, layout) for layout in FEW.layouts for saved in FEW.layouts]
    launch(folder, 4, wholes + parts)
    return folder / "few"


@pytest.mark.parametrize("saved", FEW.layouts)
def test_three_layouts_continue_each_others_checkpoints(few: Path, saved: str) -> None:
    """The next 5 steps; the tests marked `full` have the next 10, on more layouts."""
    whole = metrics(few / saved / "whole")
    assert_tells(whole, FEW.steps)
    for layout in FEW.layouts:
        rows = metrics(few / layout / f"of {saved}")
        assert_equal(rows, whole[FEW.saved :], "fp32")
    assert_same_bytes(few / saved / f"of {saved}", few / saved / "whole", FEW)


@pytest.fixture(scope="module")
def moves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every family: each layout's run, then on each layout the checkpoint of each; two launches a number of ranks."""
    folder = tmp_path_factory.mktemp("moves")
    write_text(folder)
    families = {key: family for key, family in FAMILIES.items() if has(precision_of(family))}
    for ranks in by_ranks(LAYOUTS):
        here = [(k, f, layout) for k, f in families.items() for layout in f.layouts if LAYOUTS[layout].ranks == ranks]
        launch(folder, ranks, [saving(folder, *case) for case in here])
    for ranks in by_ranks(LAYOUTS):
        here = [(k, f, layout) for k, f in families.items() for layout in f.layouts if LAYOUTS[layout].ranks == ranks]
        launch(folder, ranks, [continuing(folder, k, f, saved, layout) for k, f, layout in here for saved in f.layouts])
    return folder


@pytest.mark.full
@pytest.mark.parametrize("key", FAMILIES)
def test_one_process_tells_a_wrong_run_from_a_right_one(moves: Path, key: str) -> None:
    family, run_dir = FAMILIES[key], moves / key / REFERENCE / "whole"
    needs(precision_of(family))
    rows = metrics(run_dir)
    assert_tells(rows, family.steps)
    if precision_of(family) == "fp32":
        assert json.loads((run_dir / "margin.json").read_text()) > MARGIN
    if precision_of(family) == "fp16":
        scales = [math.log2(row["loss_scale"]) for row in rows]
        assert len(set(scales[: family.saved])) > 1 and len(set(scales[family.saved :])) > 1


def precision_of(family: Family) -> str:
    return str(family.sections.get("train", {}).get("precision", "fp32"))


CASES = [(key, layout) for key, family in FAMILIES.items() for layout in family.layouts]


@pytest.mark.full
@pytest.mark.parametrize(("key", "saved"), CASES)
def test_every_layout_continues_its_checkpoint(moves: Path, key: str, saved: str) -> None:
    family, precision = FAMILIES[key], precision_of(FAMILIES[key])
    needs(precision)
    expected = metrics(moves / key / REFERENCE / "whole")
    assert_equal(metrics(moves / key / saved / "whole"), expected, precision)
    for layout in family.layouts:
        assert_equal(metrics(moves / key / layout / f"of {saved}"), expected[family.saved :], precision)
    assert_same_bytes(moves / key / saved / f"of {saved}", moves / key / saved / "whole", family)


def test_a_pipeline_goes_on_to_the_bit_and_on_one_process(tmp_path: Path) -> None:
    write_text(tmp_path)
    tied = FEW._replace(sections={"model": {**MODEL, "tie_embeddings": True}, "optim": {"ema_decay": 0.8}})
    saved, one = "2 ranks PP2", REFERENCE
    launch(tmp_path, 2, [saving(tmp_path, "few", tied, saved), continuing(tmp_path, "few", tied, saved, saved)])
    launch(tmp_path, 1, [continuing(tmp_path, "few", tied, saved, one)])
    folder = tmp_path / "few"
    whole = folder / saved / "whole"
    assert_tells(metrics(whole), tied.steps)
    assert_same_bytes(folder / saved / f"of {saved}", whole, tied)
    assert_equal(metrics(folder / one / f"of {saved}"), metrics(whole)[tied.saved :], "fp32")


@pytest.mark.full
@pytest.mark.parametrize("chain", CHAINS, ids=" ".join)
def test_a_run_may_move_again_and_again(tmp_path: Path, moves: Path, chain: tuple[str, ...]) -> None:
    write_text(tmp_path)
    family = FAMILIES["adamw"]
    resume = None
    for number, layout in enumerate(chain):
        name = f"{number}"
        launch(tmp_path, LAYOUTS[layout].ranks, [item(tmp_path, name, family, layout, CHAIN_EVERY, resume)])
        resume = checkpoint(tmp_path / name, CHAIN_EVERY * (number + 1))
        rows = metrics(tmp_path / name)
        assert_equal(rows, metrics(moves / "adamw" / REFERENCE / "whole")[CHAIN_EVERY * number :], "fp32")


def test_the_full_matrix_has_every_kind_of_layout() -> None:
    layouts = [LAYOUTS[name] for name in FAMILIES["adamw"].layouts]
    assert {on.ranks for on in layouts} == {1, 2, 3, 4, 8} and len(layouts) >= 12
    for key, values in {"tensor": {2, 4}, "expert": {2, 4}, "zero_stage": {1, 2, 3}}.items():
        assert values <= {on.parallel.get(key) for on in layouts}, key
    assert any(on.parallel.get("tensor", 1) > TINY_MODEL["n_kv_heads"] for on in layouts)
