"""What a config leaves out, or says twice, is what transformers takes: its own config of the same keys, written out in
full, must read the same."""

import copy
from typing import Any

import pytest
from pydantic import ValidationError

from llm.args import ModelArgs
from llm.errors import UserError
from llm.foreign.export import meaning
from llm.foreign.family import family_named
from tests.foreign.models import CONFIGS, LLAMA3, OF_ATTENTION, YARN, config_of, transformers
from tests.foreign.test_families import older, read

errors = pytest.importorskip("huggingface_hub.errors")


def in_full(config: dict[str, Any]) -> dict[str, Any] | None:
    """All that transformers makes of the keys of a config; None where it refuses them."""
    keys = {key: value for key, value in copy.deepcopy(config).items() if key != "model_type"}
    try:
        return transformers.AutoConfig.for_model(config["model_type"], **keys).to_dict()
    except (errors.StrictDataclassError, KeyError):  # the second where a family has no default for a key of scaling
        return None


def outcome(config: dict[str, Any]) -> dict[str, Any] | str:
    """The model, or why it is none: the default number of heads may not divide, or experts have another activation."""
    try:
        return read(config)[0]
    except ValidationError as error:
        return str(error.errors()[0]["msg"])
    except UserError as error:
        return str(error)


def agree(config: dict[str, Any]) -> bool:
    full = in_full(config)
    return full is None or outcome(config) == outcome(full)


@pytest.mark.parametrize("family", CONFIGS)
def test_each_key_that_is_left_out_is_what_transformers_takes(family):
    base = config_of(family, next(iter(CONFIGS[family]))).to_dict()
    for config in (base, older(base)):
        for key in config.keys() - {"model_type"}:
            rest = {name: value for name, value in config.items() if name != key}
            assert agree(rest), key


@pytest.mark.parametrize("family", CONFIGS)
def test_a_config_of_its_family_alone_is_the_default_model_and_its_sizes_are_told(family):
    assert agree({"model_type": family})
    if family == "nemotron_h":  # which has layers of experts, unless it says its layers
        assert "layers of experts" in str(outcome({"model_type": family}))
        return
    _, notes = read({"model_type": family})
    words = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
    expected = [word for word in words if family != "mamba2" or word not in OF_ATTENTION]
    assert [line.split()[1] for line in notes] == expected and all("is missing, taken as" in line for line in notes)


BARE = {
    "vocab_size": 97, "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 32, "intermediate_size": 80,
}  # fmt: skip
"""Keys that say no kind of attention or norm."""
SPELLINGS: dict[str, dict[str, Any]] = {
    "scaling beside parameters": {"rope_scaling": LLAMA3 | {"factor": 2.0}, "rope_parameters": LLAMA3},
    "scaling and a theta in parameters": {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
    },
    "scaling and a theta beside": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
    "parameters and a theta beside": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 5e5},
    "parameters with their own theta": {"rope_parameters": YARN, "rope_theta": 5e5},
    "both names of the kind": {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
    "scaling of none": {"rope_scaling": {}, "rope_theta": 5e5},
    "scaling of null": {"rope_scaling": None, "rope_theta": 5e5},
    "yarn without its old length": {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 64},
    "window that is not used": {"sliding_window": 5, "use_sliding_window": False, "max_window_layers": 0},
    "window from the first layer": {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 0},
    "window of the default length": {"use_sliding_window": True, "max_window_layers": 1},
    "no window": {"sliding_window": None, "use_sliding_window": True},
    "heads of null": {"num_key_value_heads": None},
    "heads and their width": {"num_key_value_heads": 2, "head_dim": 8},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "a part rotated": {"rotary_pct": 0.5},
    "a part rotated, by its name of today": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    "early gemma": {"hidden_act": "gelu"},
    "gemma between": {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"},
    "another activation": {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu"},
    "experts by either name": {"num_experts": 6, "num_experts_per_tok": 2},
}  # fmt: skip
PARTLY = {"a part rotated, by its name of today": ("gpt_neox",)}
"""Spellings that only these families can honour; others refuse them."""


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_the_field_mean_what_they_mean_to_transformers(spelling):
    for family in PARTLY.get(spelling, CONFIGS):
        assert agree({"model_type": family, **BARE, **SPELLINGS[spelling]}), family
    llama = outcome({"model_type": PARTLY.get(spelling, ("llama",))[0], **BARE, **SPELLINGS[spelling]})
    assert isinstance(llama, dict)  # not all are refused


def test_a_width_of_heads_of_null_is_the_models_width_over_its_heads():
    for family in ("llama", "mistral", "mixtral"):
        args = {"model_type": family, **BARE, "head_dim": None, "num_key_value_heads": 2}
        assert read(args) == read(args | {"head_dim": 16})


def test_layer_types_are_said_to_be_nothing_where_the_family_reads_none():
    said, notes = read({"model_type": "llama", **BARE, "layer_types": ["full_attention", "sliding_attention"]})
    assert said == read({"model_type": "llama", **BARE})[0] and "layer_types" in notes[0]


def test_llama3_scaling_without_its_ramp_says_what_it_assumes():
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
    args, notes = read({"model_type": "llama", **BARE, "rope_parameters": scaling})
    assert args == meaning(
        ModelArgs.model_validate(
            family_named("llama").read_config({"model_type": "llama", **BARE, "rope_parameters": LLAMA3}, notes.append)
        )
    )
    assert len(notes) == 2 and all("taken as" in line for line in notes)
