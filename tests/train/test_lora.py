"""The section `lora` of a run config: what it makes of a model, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest

from llm.errors import UserError
from llm.train.config import validate
from llm.train.freezing import parameter_table
from tests.distributed.harness import tiny_config


def config(section: dict[str, Any] | None, **model: Any) -> Any:
    raw = tiny_config(Path("unused"))
    raw["model"] = {**raw["model"], "vocab_size": 64, **model}
    return validate(raw if section is None else {**raw, "lora": section}, "config")


def test_only_adapters_train() -> None:
    table = parameter_table(config({"rank": 4}))
    assert {name for name, row in table.items() if row.trainable} == {name for name in table if "lora" in name}
    assert "layers.1.feed_forward.experts.w3_lora_b" in table and "layers.1.feed_forward.router.lora_a" not in table
    assert all(row.trainable for row in parameter_table(config(None)).values())


def test_the_usual_targets_are_those_that_the_model_has() -> None:
    dense = parameter_table(config({}, moe=None, gated=False))
    trained = {name.split(".")[-2] for name, row in dense.items() if row.trainable}
    assert trained == {"wq", "wk", "wv", "wo", "w1", "w2"}


@pytest.mark.parametrize(
    ("targets", "model", "wrong"),
    [
        (["wq", "wz"], {}, "wz"),
        ("wq,experts", {"moe": None}, "experts"),
        (["w3"], {"gated": False, "moe": None}, "w3"),
        (["output"], {"tie_embeddings": True}, "output"),
        (["router"], {}, "router"),
    ],
)
def test_a_target_that_names_nothing_is_refused_also_among_good_ones(targets: Any, model: Any, wrong: str) -> None:
    with pytest.raises(UserError, match=rf"^lora\.targets: no weight of this model is named '{wrong}'; it has .*wq"):
        parameter_table(config({"targets": targets}, **model))


def test_freeze_names_further_parameters_that_stay() -> None:
    raw = tiny_config(Path("unused"), train={"freeze": ["layers.[01].*"]})
    raw["model"] = {**raw["model"], "vocab_size": 64}
    table = parameter_table(validate({**raw, "lora": {}}, "config"))
    assert {row.unit for row in table.values() if row.trainable} == {"layers.2", "layers.3"}


def test_no_targets_and_a_rank_of_zero_are_refused_in_a_line_with_the_key() -> None:
    with pytest.raises(UserError, match=r"lora\.targets is empty"):
        config({"targets": []})
    with pytest.raises(UserError, match=r"lora\.rank=0: "):
        config({"rank": 0})


def test_what_the_model_says_of_adapters_is_what_the_section_says() -> None:
    made = config({"rank": 4})
    again = validate(made.model_dump(mode="json"), "again")
    assert again.model.lora == made.model.lora == made.lora.args
    with pytest.raises(UserError, match=r"model\.lora\.rank=4: the section lora says this"):
        config({"rank": 8}, lora={"rank": 4})
