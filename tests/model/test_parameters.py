"""The table of parameters: what modules declare is what they have, and what follows from it."""

from itertools import product
from typing import Any, get_args

import pytest

from llm import LLM, ModelArgs
from llm.boxes import box_shape, whole
from llm.layers.parameter import ParameterKind
from llm.parallel.stages import split
from llm.parameters import ParameterTable
from tests.model.models import MOE

BIASES = {"qkv_bias": True, "o_bias": True, "ffn_bias": True}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "llama4": {"moe": {**MOE, "interleave": 2}, "qk_norm": "l2", "nope_layer_interval": 4},
    "everything": BIASES
    | {"moe": {**MOE, "interleave": 2}, "norm": "layer", "norm_place": "sandwich", "qk_norm": "head"},
    "norms after": {"norm_place": "post", "qk_norm": "full", "norm_offset": True, "tie_embeddings": True},
    "plain feed-forwards": {"gated": False, "act": "relu", "layer_pattern": "attn, attn+none", "norm": "layer"},
}


def args_of(name: str) -> ModelArgs:
    base = {"dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 50, "ffn_hidden": 48}
    return ModelArgs.model_validate({**base, **MODELS[name]})


@pytest.mark.parametrize("name", MODELS)
def test_what_modules_declare_is_what_they_have(name: str) -> None:
    args = args_of(name)
    built = [(key, tuple(parameter.shape)) for key, parameter in LLM(args, device="meta").named_parameters()]
    assert list(ParameterTable.of(args).shapes.items()) == built, "in the same order, as optimizers group by it"


@pytest.mark.parametrize("name", MODELS)
def test_only_matrices_decay_and_every_unit_is_the_model_s(name: str) -> None:
    args = args_of(name)
    for key, row in ParameterTable.of(args).items():
        assert row.decay == (row.kind in ("matrix", "expert", "head"))
        assert row.kind in get_args(ParameterKind)
        assert key.startswith(row.unit + "."), key
        assert all(dim is None or dim < len(row.shape) for dim in (row.tensor_dim, row.expert_dim))


@pytest.mark.parametrize(("name", "tensor", "expert"), product(MODELS, (1, 2, 4), (1, 2)))
def test_the_boxes_of_all_ranks_tile_a_parameter_or_are_whole(name: str, tensor: int, expert: int) -> None:
    for key, row in ParameterTable.of(args_of(name)).items():
        cut = row.cut(tensor)
        sizes = [0] * len(row.shape)
        for rank in range(tensor):
            box = row.box((rank, tensor), (0, 1))
            if cut is None:
                assert box == whole(row.shape), key
            else:
                assert box[cut][0] == sizes[cut], key
                sizes[cut] = box[cut][1]
        assert cut is None or sizes[cut] == row.shape[cut], key
        if row.expert_dim is not None:
            shape = box_shape(row.box((0, 1), (expert - 1, expert)))
            assert shape[row.expert_dim] * expert == row.shape[row.expert_dim]


def test_heads_that_are_fewer_than_ranks_stay_whole() -> None:
    table = ParameterTable.of(args_of("everything"))
    keys = table["layers.0.attention.wk.weight"], table["layers.0.attention.wk.bias"]
    assert [row.cut(2) for row in keys] == [0, 0] and [row.cut(4) for row in keys] == [None, None]
    assert table["layers.0.attention.wq.weight"].cut(4) == 0
    assert table["layers.0.attention.q_norm.weight"].cut(2) is None, "one weight for every head"


def test_each_parameter_is_of_one_stage() -> None:
    for name in MODELS:
        args = args_of(name)
        stages = split(args, 3)
        for key, row in ParameterTable.of(args).items():
            assert sum(stage.owns(row) for stage in stages) == 1, key


def test_an_unknown_name_is_named() -> None:
    with pytest.raises(KeyError, match="layers.0.attention.wx.weight"):
        ParameterTable.of(args_of("dense"))["layers.0.attention.wx.weight"]
