"""A run that begins with weights from elsewhere has them, on every layout, and goes on alone from there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llm import LLM
from llm.args import ModelArgs
from llm.boxes import whole
from llm.checkpoint.reader import resolve
from llm.checkpoint.weights import ModuleWeights
from llm.foreign.export import choose_family, export_hf
from llm.parameters import ParameterTable
from llm.train.config import load_config
from llm.train.init_from import read_range
from tests.distributed.harness import TINY_MODEL, metrics, run, tiny_config, write_config, write_text
from tests.distributed.pool import run_job

pytestmark = pytest.mark.distributed

STEPS = 3
RELATIVE = 1e-5  # float32 sums in another order, as in test_equality.py
ARGS = ModelArgs.model_validate({**TINY_MODEL, "init_std": 0.1, "vocab_size": 259, "attn_scale": 0.05})
LAYOUTS: dict[str, dict[str, Any]] = {
    "native": {"tensor": 2},
    "foreign": {"tensor": 2, "expert": 2},
    "zero3": {"zero_stage": 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("begin")
    write_text(folder, documents=80)
    model = LLM(ARGS, seed=9)
    model.save_pretrained(folder / "native")
    family = choose_family(ARGS, "hf")
    export_hf(
        folder / "foreign", ARGS, ModuleWeights(model), family,
        dtype=torch.float32, max_shard_bytes=100_000, extra_files={}, extra_config={"auto_map": {"AutoModel": "a.B"}},
    )  # fmt: skip
    return folder


def config_of(folder: Path, source: str, parallel: dict[str, Any]) -> dict[str, Any]:
    train = {"steps": STEPS, "global_batch_size": 16, "micro_batch_size": 4}
    raw = tiny_config(folder, train=train, parallel={"timeout_s": 60, **parallel})
    losses = {key: TINY_MODEL["moe"][key] for key in ("aux_alpha", "z_alpha")}  # which a foreign config does not say
    raw["model"] = {"init_from": str(folder / source), "moe": losses}
    file = write_config(folder / f"{source}.yaml", raw)
    resolved = load_config(file)
    assert resolved.model.init_from == str(folder / source) and resolved.model.moe == ARGS.moe
    return dict(resolved.model_dump(mode="json"))


def test_every_layout_begins_with_the_given_weights(folder: Path) -> None:
    runs = [
        (name, config_of(folder, "native" if name == "zero3" else name, parallel)) for name, parallel in LAYOUTS.items()
    ]
    (folder / "runs.json").write_text(json.dumps(runs))
    done = run_job("tests/distributed/init_from_job.py", str(folder / "runs.json"), str(folder / "out"), nproc=4)
    assert done.returncode == 0, done.stderr
    for name in LAYOUTS:
        source = "native" if name == "zero3" else name
        said = (folder / "out" / name / "log.txt").read_text()
        assert f"began with the weights of {folder / source}" in said
        assert (f"note: {folder / 'foreign'}: config.json: auto_map" in said) == (name == "foreign")
    rows = {name: metrics(folder / "out" / name) for name in LAYOUTS}
    drawn = LLM(ARGS, seed=0)  # of the runs' own seed
    for found in rows.values():
        assert len(found) == STEPS
        for row, first in zip(found, rows["native"], strict=True):
            assert row["loss"] == pytest.approx(first["loss"], rel=RELATIVE)
            assert row["grad_norm"] == pytest.approx(first["grad_norm"], rel=RELATIVE)
    trained = resolve(folder / "out" / "foreign")
    name = "layers.1.attention.wo.weight"
    began, ended = LLM(ARGS, seed=9).get_parameter(name).detach(), trained.read(name).view(32, 32)
    assert (ended - began).norm() < 0.1 * (ended - drawn.get_parameter(name).detach()).norm()


def test_the_run_needs_the_folder_no_more_once_it_has_begun(folder: Path, tmp_path: Path) -> None:
    raw = config_of(folder, "native", {})
    raw["model"]["init_from"] = str(tmp_path / "gone")
    file = write_config(tmp_path / "c.yaml", raw)
    assert load_config(file).model.dim == ARGS.dim
    missing = run("launch/pretrain.py", "--config", str(file), "--run_dir", str(tmp_path / "run"))
    assert missing.returncode == 2
    (line,) = missing.stderr.splitlines()
    assert line.startswith("error:") and str(tmp_path / "gone") in line, line


def test_keys_beside_init_from_hold_instead_of_the_models_own(folder: Path, tmp_path: Path) -> None:
    raw = tiny_config(folder)
    raw["model"] = {"init_from": str(folder / "foreign"), "max_seq_len": 4096}
    del raw["tokenizer"]
    file = write_config(tmp_path / "c.yaml", raw)
    with pytest.raises(Exception, match="model.init_from: .*foreign: holds no tokenizer"):
        load_config(file)
    raw["tokenizer"] = {"kind": "bytes"}
    model = load_config(write_config(file, raw)).model
    assert model.max_seq_len == 4096 and model.qk_norm == "l2" and model.moe is not None
    assert yaml.safe_load(file.read_text())["model"]["max_seq_len"] == 4096


@pytest.mark.parametrize("name", ["layers.1.feed_forward.experts.w2", "norm.weight", "layers.0.attention.wo.weight"])
def test_any_range_of_any_box_is_read(name: str) -> None:
    weights, shape = ModuleWeights(LLM(ARGS, seed=9)), ParameterTable.of(ARGS)[name].shape
    box = tuple((n // 4, n - n // 3) for n in shape)
    tensor = weights.read(name, whole(shape), torch.empty(shape))
    flat = tensor[tuple(slice(a, b) for a, b in box)].flatten()
    for start in range(0, len(flat), 7):
        for count in (0, 1, 13, len(flat) - start):
            if start + count <= len(flat):
                assert torch.equal(read_range(weights, name, box, start, count), flat[start : start + count])
