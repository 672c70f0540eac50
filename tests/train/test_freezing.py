"""What `train.freeze` may name, and where the values of what it names are found again."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llm import LLM
from llm.boxes import whole
from llm.checkpoint.frozen import Drawn, Seed, Taken
from llm.errors import UserError
from llm.parallel.layout import Layout
from llm.parameters import ParameterTable
from llm.pretrained import check_origin, taken_from
from llm.train.config import validate
from llm.train.dry_run import report
from llm.train.freezing import frozen_notes, parameter_table
from llm.train.resume.choose import origin_now
from tests.distributed.harness import tiny_config
from tests.foreign.folders import save
from tools import convert
from tools.inspection import frozen_report


def config(patterns: Any) -> Any:
    raw = tiny_config(Path("unused"), train={"freeze": patterns})
    raw["model"] = {**raw["model"], "vocab_size": 64}
    return validate(raw, "config")


def test_patterns_are_globs_over_names_in_a_list_or_by_commas() -> None:
    for patterns in (["layers.0.*", "norm.weight"], "layers.0.*,norm.weight"):
        table = parameter_table(config(patterns))
        frozen = {name for name, row in table.items() if not row.trainable}
        assert frozen == {name for name in table if name.startswith("layers.0.")} | {"norm.weight"}
    assert all(row.trainable for row in parameter_table(config([])).values())


def test_a_pattern_that_names_nothing_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(UserError, match=r"train\.freeze: .*'tok_embedding\.\*'; the nearest are tok_embeddings"):
        parameter_table(config(["norm.*", "tok_embedding.*"]))


def test_freezing_everything_is_refused() -> None:
    with pytest.raises(UserError, match="nothing is left to train"):
        parameter_table(config(["*"]))


def test_a_run_says_how_much_it_leaves_out_and_where_that_came_from() -> None:
    table = parameter_table(config(["norm.weight"]))
    total = sum(row.numel for row in table.values())
    assert frozen_notes(table, Seed(0)) == [f"train.freeze leaves out 32 of {total:,} parameters, as drawn"]
    assert frozen_notes(table, Taken("/a", "0"))[0].endswith("parameters, read from /a")
    assert frozen_notes(parameter_table(config([])), Seed(0)) == []


def test_a_dry_run_counts_what_trains_and_says_where_it_only_estimates() -> None:
    frozen = config(["layers.*"])
    whole = sum(row.numel for row in parameter_table(frozen).values())
    layers = sum(row.numel for name, row in parameter_table(frozen).items() if name.startswith("layers."))
    text = report(frozen, Layout(2))
    assert f"{whole - layers:,} of them train; train.freeze leaves out {layers:,}" in text
    assert "estimated: parameters are frozen" not in text
    train = frozen.train.model_copy(update={"activation_checkpointing": "full"})
    parallel = frozen.parallel.model_copy(update={"zero_stage": 3})
    again = frozen.model_copy(update={"train": train, "parallel": parallel})
    assert "estimated: parameters are frozen" in report(again, Layout(2, zero_stage=3))


def test_inspect_names_the_place_of_what_a_checkpoint_does_not_hold(folders: Path) -> None:
    shapes = {"norm.weight": [32], "tok_embeddings.weight": [64, 32]}
    origin = {"path": str(folders / "one"), "digest": "0"}
    found = frozen_report({"patterns": [], "shapes": shapes, "from": origin})
    assert found == {"parameters": 32 + 64 * 32, "tensors": 2, "from": origin, "there": True}
    gone = frozen_report({"patterns": [], "shapes": shapes, "from": {**origin, "path": "/nowhere"}})
    assert gone is not None and not gone["there"]
    assert frozen_report(None) is None


def test_drawn_values_are_those_of_a_new_model_in_any_box() -> None:
    args = config([]).model
    model = LLM(args, seed=5)
    name, drawn = "layers.1.attention.wq.weight", Drawn(ParameterTable.of(args), 5)
    weight = model.get_parameter(name).detach()
    assert torch.equal(drawn.read(name, whole(tuple(weight.shape)), torch.empty_like(weight)), weight)
    assert torch.equal(drawn.read(name, ((8, 24), (3, 20)), torch.empty(16, 17)), weight[8:24, 3:20])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two model folders of ours with the same shapes, and the first as Hugging Face's files."""
    folder = tmp_path_factory.mktemp("origins")
    save(folder / "one", n_layers=1)
    save(folder / "other", n_layers=1, init_std=0.2)
    convert.main(["export", str(folder / "one"), str(folder / "foreign")])
    return folder


def test_an_origin_is_known_by_its_weights_wherever_it_lies(folders: Path, tmp_path: Path) -> None:
    origin = taken_from(folders / "one")
    check_origin(origin)
    (tmp_path / "moved").symlink_to(folders / "one")
    elsewhere = Taken("/nowhere/one", origin.digest)
    assert origin_now(elsewhere, "one", str(tmp_path / "moved")) == origin
    with pytest.raises(UserError, match=r"/nowhere/one: is gone.*model\.init_from"):
        origin_now(elsewhere, "one", "one")
    other = str(folders / "other")
    with pytest.raises(UserError, match=f"model.init_from={other}: holds other weights than /nowhere/one"):
        origin_now(elsewhere, "one", other)
    with pytest.raises(UserError, match="holds other weights"):
        check_origin(Taken(str(folders / "other"), origin.digest))
    assert origin_now(Seed(3), None, str(folders / "other")) == Seed(3)


def test_a_foreign_origin_is_known_by_every_byte_of_its_weights(folders: Path, tmp_path: Path) -> None:
    origin = taken_from(folders / "foreign")
    copy = tmp_path / "copy"
    shutil.copytree(folders / "foreign", copy)
    assert taken_from(copy) == Taken(str(copy), origin.digest)
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="holds other weights"):
        check_origin(Taken(str(copy), origin.digest))
