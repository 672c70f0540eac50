"""Configs of released models: made from the config.json of each, as many parameters as it has; and what a bare
config.json must not say.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llm import LLM, ModelArgs
from llm.foreign.files import open_foreign
from llm.parameters import ParameterTable
from tests.foreign import test_bart, test_muse_glimmer
from tests.foreign.folders import refused
from tests.foreign.models import BAMBA, BASE, transformers
from tests.foreign.multimodal import saved
from tests.foreign.released import RELEASED
from tools import convert

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "model"
PARAMETERS = {
    "llama3_1_8b": 8_030_261_248, "llama3_1_70b": 70_553_706_496, "llama3_1_405b": 405_853_388_800,
    "mixtral_8x7b": 46_702_792_704, "qwen3_8b": 8_190_735_360, "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_235b_a22b": 235_093_634_560, "olmo2_7b": 7_298_617_344, "gemma2_9b": 9_241_705_984,
}  # fmt: skip
"""As their publishers count them."""
COUNTED_BY_TRANSFORMERS = ("llama4_scout", "llama4_maverick", "muse_glimmer_30b", "mamba2_2_7b")


def committed(name: str) -> ModelArgs:
    return ModelArgs.model_validate(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))


def count(args: ModelArgs) -> int:
    return sum(row.numel for row in ParameterTable.of(args).values())


def test_every_released_model_is_counted() -> None:
    assert sorted(RELEASED) == sorted([*PARAMETERS, *COUNTED_BY_TRANSFORMERS])


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_that_the_model_is_known_to_have(name: str) -> None:
    assert count(committed(name)) == PARAMETERS[name]


@pytest.mark.parametrize("name", COUNTED_BY_TRANSFORMERS)
def test_parameters_are_as_many_as_in_transformers(name: str) -> None:
    config = transformers.AutoConfig.for_model(**RELEASED[name])
    with torch.device("meta"):
        theirs = getattr(transformers, RELEASED[name]["architectures"][0])(config)
    assert count(committed(name)) == theirs.num_parameters()


def test_the_model_itself_has_as_many() -> None:
    built = LLM(committed("llama4_scout"), device="meta")
    assert sum(parameter.numel() for parameter in built.parameters()) == count(committed("llama4_scout"))


@pytest.mark.parametrize("name", RELEASED)
def test_the_file_is_what_inspect_makes_of_the_config(name: str, tmp_path: Path, capsys: Any) -> None:
    """But for its first line, which says who published the model."""
    (tmp_path / "config.json").write_text(json.dumps(RELEASED[name]))
    convert.main(["inspect", str(tmp_path / "config.json"), "--yaml"])
    made = capsys.readouterr()
    assert (CONFIGS / f"{name}.yaml").read_text().partition("\n")[2] == made.out
    assert made.err == "", "what a config leaves open or contradicts"


def test_the_text_model_alone_is_one_without_the_tower(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED["llama4_scout"]))
    convert.main(["inspect", str(tmp_path), "--yaml", "--text_only"])
    args = ModelArgs.model_validate(yaml.safe_load(capsys.readouterr().out))
    assert args == committed("llama4_scout").model_copy(update={"vision": None})


def read_both(folder: Path, capsys: Any) -> None:
    """A config alone says what it does beside weights."""
    capsys.readouterr()  # of libraries
    convert.main(["inspect", str(folder / "config.json"), "--yaml"])
    assert ModelArgs.model_validate(yaml.safe_load(capsys.readouterr().out)) == open_foreign(folder).args


def test_a_config_with_a_tower_says_as_much_as_beside_weights(tmp_path: Path, capsys: Any) -> None:
    saved(tmp_path / "llama4")
    read_both(tmp_path / "llama4", capsys)


def test_and_one_of_muse_glimmer(tmp_path: Path, capsys: Any) -> None:
    test_muse_glimmer.reference({}).save_pretrained(tmp_path)
    read_both(tmp_path, capsys)


def test_and_one_of_an_encoder_decoder(tmp_path: Path, capsys: Any) -> None:
    test_bart.theirs().save_pretrained(tmp_path)
    read_both(tmp_path, capsys)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a key of nobody": ({"multi_head_latent": 64}, "not known of llama: multi_head_latent"),
    "several": (dict.fromkeys("abcdef", 1), "not known of llama: a, b, c, d and 2 more"),
    "a key of RoPE": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "bent": True}}, "not known of llama: rope_scaling.bent"
    ),
    "a kind of RoPE": ({"rope_scaling": {"rope_type": "bent", "factor": 2.0}}, "rope_type=bent is not one of default"),
    "an activation": ({"hidden_act": "mish"}, "hidden_act=mish is not one of silu"),
    "a family": ({"model_type": "yacht"}, "model_type: family 'yacht' is not known; known are"),
    "none": ({"model_type": None}, "model_type is missing; give --family"),
    "weights of another library": ({"quantization_config": {"quant_method": "awq"}}, "quantised weights are not read"),
    "images": ({"vision_config": {"hidden_size": 8}}, "vision_config makes it a multimodal model, which llama is not"),
    "a size that is no number": ({"hidden_size": "wide"}, "its config makes no model: dim"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_a_bare_config_must_not_say_is_refused_by_name(case: str, tmp_path: Path, capsys: Any) -> None:
    changes, said = WRONG[case]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(RELEASED["llama3_1_8b"] | changes))
    line = refused(capsys, "inspect", file, "--yaml")
    assert said in line and str(tmp_path) in line


def test_a_key_of_a_group_is_refused_by_its_whole_name(tmp_path: Path, capsys: Any) -> None:
    for group in ("text_config", "vision_config"):
        changed = RELEASED["llama4_scout"][group] | {"bent": 1}
        (tmp_path / "config.json").write_text(json.dumps(RELEASED["llama4_scout"] | {group: changed}))
        assert f"not known of llama4: {group}.bent" in refused(capsys, "inspect", tmp_path, "--yaml")


def test_dropout_of_a_config_is_told_and_not_taken(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED["llama3_1_8b"] | {"attention_dropout": 0.25}))
    convert.main(["inspect", str(tmp_path), "--yaml"])
    assert "note: config.json: attention_dropout=0.25 is not taken" in capsys.readouterr().err


def test_what_is_no_config_of_hugging_face_is_refused(tmp_path: Path, capsys: Any) -> None:
    assert "no such file" in refused(capsys, "inspect", tmp_path / "config.json", "--yaml")
    assert "holds no config.json" in refused(capsys, "inspect", tmp_path, "--yaml")
    (tmp_path / "params.json").write_text(json.dumps({"dim": 8, "n_layers": 1}))
    assert "is Meta's params.json" in refused(capsys, "inspect", tmp_path / "params.json", "--yaml")
    (tmp_path / "config.json").write_text(json.dumps(RELEASED["llama3_1_8b"]))
    assert "is not of Hugging Face's" in refused(capsys, "inspect", tmp_path, "--yaml", "--family=meta_llama")


def test_a_limit_without_bound_is_read_from_either_spelling(tmp_path: Path, capsys: Any) -> None:
    for limit in (math.inf, {"__float__": "Infinity"}):
        config = {"model_type": "bamba", **BASE, **BAMBA, "time_step_limit": [0.5, limit]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        convert.main(["inspect", str(tmp_path), "--yaml"])
        args = ModelArgs.model_validate(yaml.safe_load(capsys.readouterr().out))
        assert args.ssm is not None and args.ssm.dt_limit == (0.5, None)
