"""`load_state_dict` takes foreign names, of whole models and of modules alone, and refuses what fits by half."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llm import LLM, ModelArgs
from llm.boxes import box_shape
from llm.errors import UserError
from llm.layers.attention import Attention
from llm.layers.ffn import FeedForward
from llm.layers.moe import MoE
from llm.layers.summed import Summed
from llm.model import Block
from llm.parameters import ParameterTable
from tests.foreign.models import CONFIGS, reference, tokens

State = dict[str, Tensor]
MIXERS = ("self_attn", "attention", "mixer", "mamba")
"""What transformers calls what mixes the tokens of a block."""
FIRST = [(family, next(iter(configs))) for family, configs in CONFIGS.items()]
PARTLY_MOE = [
    ("qwen3_moe", "top 2, every second layer, renormalised"),
    ("llama4_text", "moe by list, no qk norm, biases, one kv head"),
]
LLAMA4 = ModelArgs(
    dim=24, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=31, ffn_hidden=40, qk_norm="l2",
    moe={"n_experts": 3, "hidden": 16, "interleave": 2},
)  # fmt: skip


@pytest.fixture(scope="module", params=[*FIRST, *PARTLY_MOE, ("llama", "one kv head, tied")], ids=": ".join)
def both(request, tmp_path_factory) -> tuple[nn.Module, State, LLM]:
    """A model of transformers, its tensors as they are on disk, and ours as it should be after loading either."""
    theirs = reference(*request.param)
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return theirs, load_file(folder / "model.safetensors"), LLM.from_pretrained(folder)


def fresh(model: LLM) -> LLM:
    return LLM(model.args, seed=7)


def assert_same(module: nn.Module, expected: nn.Module | Mapping[str, Tensor]) -> None:
    wanted = expected.state_dict() if isinstance(expected, nn.Module) else expected
    ours = module.state_dict()
    assert ours.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(ours[name], weight), name


@pytest.mark.parametrize("strict", [True, False])
def test_a_whole_state_dict_is_taken_as_it_is_in_memory_and_on_disk(both, strict):
    theirs, on_disk, ours = both
    for state in (theirs.state_dict(), on_disk):
        model, given = fresh(ours), dict(state)
        missing, unexpected = model.load_state_dict(state, strict=strict)
        assert not missing and not unexpected
        assert_same(model, ours)
        assert state.keys() == given.keys()  # what was given is left alone


def without(key: str) -> Callable[[State], State]:
    return lambda state: {name: tensor for name, tensor in state.items() if name != key}


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict_that_lacks_or_has_one_more_is_refused_strict_or_not(both, strict):
    theirs, on_disk, ours = both
    model = fresh(ours)
    before = copy.deepcopy(model.state_dict())
    for state in (theirs.state_dict(), on_disk):
        for key in sorted(state)[:: max(1, len(state) // 4)]:
            if ours.args.tie_embeddings and key == "lm_head.weight":  # held twice
                continue
            faulty: list[State] = [
                without(key)(state),
                {("odd_" + name if name == key else name): tensor for name, tensor in state.items()},
                {name: (tensor[:-1] if name == key else tensor) for name, tensor in state.items()},
            ]
            for bad in faulty:
                with pytest.raises(UserError, match="not the weights of this"):
                    model.load_state_dict(bad, strict=strict)
        for name in ("model.layers.0.self_attn.rotary.weight", "layers.0.attention.wq.weight", "extra"):
            with pytest.raises(UserError, match="does not know|not the weights"):
                model.load_state_dict(state | {name: torch.zeros(3)}, strict=strict)
    assert_same(model, before)  # none of it was taken


def test_buffers_of_old_checkpoints_are_dropped(both):
    theirs, _, ours = both
    model, state = fresh(ours), dict(theirs.state_dict())
    block = "gpt_neox.layers.0.attention" if "gpt_neox.embed_in.weight" in state else "model.layers.0.self_attn"
    for name in ("rotary_emb.inv_freq", "masked_bias", "bias") if "neox" in block else ("rotary_emb.inv_freq",):
        state[f"{block}.{name}"] = torch.zeros(3)
    model.load_state_dict(state)
    assert_same(model, ours)


def test_a_tied_head_must_be_the_token_table():
    theirs = reference("llama", "one kv head, tied")
    state = theirs.state_dict()
    assert "lm_head.weight" in state
    model = LLM(read_args(theirs))
    model.load_state_dict(state)
    assert torch.equal(model.tok_embeddings.weight, theirs.lm_head.weight)
    model.load_state_dict(without("lm_head.weight")(state))
    with pytest.raises(UserError, match="lm_head.weight holds the same weights as tok_embeddings.weight, but differs"):
        model.load_state_dict(state | {"lm_head.weight": state["lm_head.weight"] * 1.5}, strict=False)


def read_args(theirs: nn.Module) -> ModelArgs:
    from llm.foreign.family import family_named

    config = theirs.config.to_dict()
    return ModelArgs.model_validate(family_named(config["model_type"]).read_config(config, print))


def theirs_and_ours(both: Any) -> list[tuple[nn.Module, nn.Module, nn.Module]]:
    """Modules of transformers, an empty one of ours for each, and one filled right."""
    theirs, _, ours = both
    stem = next(name for name in ("gpt_neox", "backbone", "model") if hasattr(theirs, name))
    found = []
    for i, block in enumerate(getattr(theirs, stem).layers):
        empty, filled = fresh(ours).layers[i], ours.layers[i]
        mixer = next((getattr(block, name) for name in MIXERS if hasattr(block, name)), None)
        found += [(block, copy.deepcopy(empty), filled)]
        if filled.spec.mixes and not isinstance(filled.attention, Summed):  # of whose two parts theirs has no module
            found += [(mixer, empty.attention, filled.attention)]
        if hasattr(empty, "feed_forward"):
            named = (getattr(block, name, None) for name in ("mlp", "feed_forward"))
            found += [(next(filter(None, named), mixer), empty.feed_forward, filled.feed_forward)]
    return found


@pytest.mark.parametrize("strict", [True, False])
def test_blocks_attentions_and_feed_forwards_take_theirs_alone(both, strict):
    for foreign, empty, filled in theirs_and_ours(both):
        empty.load_state_dict(foreign.state_dict(), strict=strict)
        assert_same(empty, filled)


@pytest.mark.parametrize("strict", [True, False])
def test_modules_alone_refuse_what_fits_by_half(both, strict):
    for foreign, empty, _ in theirs_and_ours(both)[:3]:
        state = foreign.state_dict()
        for key in state:
            if len(state) > 1:
                with pytest.raises(UserError, match="not the weights of this"):
                    empty.load_state_dict(without(key)(state), strict=strict)
            with pytest.raises(UserError, match="not the weights of this"):
                empty.load_state_dict(state | {"more.weight": torch.zeros(1)}, strict=strict)
            with pytest.raises(UserError, match="not the weights of this"):
                empty.load_state_dict(state | {key: state[key][:-1]}, strict=strict)


@pytest.mark.parametrize(
    ("entry", "stem"),
    [(("mixtral", "top 2"), "model.layers.2.block_sparse_moe."), (PARTLY_MOE[0], "model.layers.1.mlp.")],
    ids=["mixtral", "qwen3_moe"],
)
def test_experts_apart_are_stacked_and_a_missing_one_is_named(entry, stem, tmp_path):
    reference(*entry).save_pretrained(tmp_path / "theirs")
    on_disk, ours = load_file(tmp_path / "theirs/model.safetensors"), LLM.from_pretrained(tmp_path / "theirs")
    layer = int(stem.split(".")[2])
    state = under(stem, on_disk)
    moe = fresh(ours).layers[layer].feed_forward
    assert isinstance(moe, MoE)
    moe.load_state_dict(state)
    assert_same(moe, ours.layers[layer].feed_forward)
    last = max(name for name in state if name.startswith("experts."))
    with pytest.raises(UserError, match=last):
        moe.load_state_dict(without(last)(state), strict=False)
    with pytest.raises(UserError, match=stem + last):
        fresh(ours).load_state_dict(without(stem + last)(on_disk), strict=False)


def as_meta_writes(args: ModelArgs, native: Mapping[str, Tensor]) -> State:
    """A state dict of ours in the fused spelling of Meta's Llama 4."""
    found = {name: native[f"{name}.weight"] for name in ("tok_embeddings", "norm", "output")}
    found = {f"{name}.weight": tensor for name, tensor in found.items()}
    for spec in args.layer_specs():
        found |= {f"layers.{spec.index}.{name}": tensor for name, tensor in meta_block(native, spec.index).items()}
    return found


def meta_block(native: Mapping[str, Tensor], layer: int) -> State:
    at = {name.removeprefix(f"layers.{layer}."): t for name, t in native.items() if name.startswith(f"layers.{layer}.")}
    found = {
        "attention.wqkv.weight": torch.cat([at[f"attention.{w}.weight"] for w in ("wq", "wk", "wv")]),
        "attention.wqkv.layer_norm_weight": at["attention_norm.weight"],
        "attention.wo.weight": at["attention.wo.weight"],
    }
    if "feed_forward.w1.weight" in at:
        return found | {
            "feed_forward.mlp.layer_norm_weight": at["ffn_norm.weight"],
            "feed_forward.mlp.fc1_weight": torch.cat([at["feed_forward.w1.weight"], at["feed_forward.w3.weight"]]),
            "feed_forward.mlp.fc2_weight": at["feed_forward.w2.weight"],
        }
    return found | {
        "feed_forward.norm.weight": at["ffn_norm.weight"],
        "feed_forward.router_DE": at["feed_forward.router.weight"].t(),
        "feed_forward.experts.moe_w_in_eD_F": at["feed_forward.experts.w1"].flatten(0, 1),
        "feed_forward.experts.moe_w_swiglu_eD_F": at["feed_forward.experts.w3"].flatten(0, 1),
        "feed_forward.experts.moe_w_out_eF_D": at["feed_forward.experts.w2"].flatten(0, 1),
        "feed_forward.w_in_shared_FD.weight": at["feed_forward.shared_expert.w1.weight"],
        "feed_forward.w_swiglu_FD.weight": at["feed_forward.shared_expert.w3.weight"],
        "feed_forward.w_out_shared_DF.weight": at["feed_forward.shared_expert.w2.weight"],
    }


def under(prefix: str, state: State) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


NORMS_INSIDE = ("attention.wqkv.layer_norm_weight", "feed_forward.mlp.layer_norm_weight", "feed_forward.norm.weight")


@pytest.mark.parametrize("strict", [True, False])
def test_meta_llama4_is_taken_whole_by_blocks_and_by_modules(strict):
    source = LLM(LLAMA4, seed=1)
    native = source.state_dict()
    model = LLM(LLAMA4, seed=2)
    model.load_state_dict(as_meta_writes(LLAMA4, native), strict=strict)
    assert_same(model, source)
    other = LLM(LLAMA4, seed=3)
    for i, (block, wanted) in enumerate(zip(other.layers, source.layers, strict=True)):
        state = meta_block(native, i)
        copied = copy.deepcopy(block)
        copied.load_state_dict(state, strict=strict)
        assert_same(copied, wanted)
        outside = {name: tensor for name, tensor in state.items() if name not in NORMS_INSIDE}
        block.attention.load_state_dict(under("attention.", outside), strict=strict)
        block.feed_forward.load_state_dict(under("feed_forward.", outside), strict=strict)
        assert_same(block.attention, wanted.attention)
        assert_same(block.feed_forward, wanted.feed_forward)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "moe"])
def test_meta_llama4_that_fits_by_half_is_refused(layer, strict):
    native = LLM(LLAMA4, seed=1).state_dict()
    state, block = meta_block(native, layer), LLM(LLAMA4, seed=2).layers[layer]
    before = copy.deepcopy(block.state_dict())
    for key, tensor in state.items():
        for bad in (without(key)(state), state | {key: tensor[:-1]}, without(key)(state) | {key + "_": tensor}):
            with pytest.raises(UserError, match="not the weights of this meta_llama4 model"):
                block.load_state_dict(bad, strict=strict)
    for bad in ({"wqkv.weight": state["attention.wqkv.weight"][1:], "wo.weight": state["attention.wo.weight"]},
                {"wqkv.weight": state["attention.wqkv.weight"]}):  # fmt: skip
        with pytest.raises(UserError, match="not the weights of this meta_llama4 model"):
            block.attention.load_state_dict(bad, strict=strict)
    assert_same(block, before)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "name", ["model.layers.1.block_sparse_moe.experts.0.w1.weight", "model.layers.1.mlp.experts.2.down_proj.weight"]
)
def test_one_expert_of_several_is_not_passed_over_beside_native_names(name, strict):
    """No parameter can be filled from it, but it is no stranger either."""
    model = LLM(LLAMA4, seed=1)
    with pytest.raises(UserError, match="not the weights of this"):
        model.load_state_dict(model.state_dict() | {name: torch.zeros(16, 24)}, strict=strict)
    inside = name.partition("experts.")
    with pytest.raises(UserError, match="not the weights of this"):
        moe = model.layers[1].feed_forward
        moe.load_state_dict(moe.state_dict() | {inside[1] + inside[2]: torch.zeros(16, 24)}, strict=strict)


def test_a_native_state_dict_loads_as_ever():
    source, model = LLM(LLAMA4, seed=1), LLM(LLAMA4, seed=2)
    native = source.state_dict()
    model.load_state_dict(native)
    assert_same(model, source)
    for name, module in LLM(LLAMA4, seed=3).named_modules():
        if isinstance(module, Block | Attention | FeedForward | MoE):
            module.load_state_dict(under(name + ".", native))
            assert_same(module, source.get_submodule(name))


def test_a_part_of_a_native_state_dict_loads_where_strict_is_off():
    source, model, untouched = LLM(LLAMA4, seed=1), LLM(LLAMA4, seed=2), LLM(LLAMA4, seed=2)
    native = source.state_dict()
    part = {name: tensor for name, tensor in native.items() if ".attention." in name or name == "norm.weight"}
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(part)
    model = LLM(LLAMA4, seed=2)
    missing, unexpected = model.load_state_dict(part | {"a_probe.weight": torch.zeros(1)}, strict=False)
    assert set(missing) == native.keys() - part.keys() and unexpected == ["a_probe.weight"]
    assert_same(model, untouched.state_dict() | part)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        LLM(LLAMA4).load_state_dict(native | {"a_probe.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        LLM(LLAMA4).load_state_dict(native | {"norm.weight": torch.zeros(5)}, strict=False)


def test_nothing_of_ours_in_a_state_dict_is_refused_strict_or_not():
    with pytest.raises(UserError, match="none of its 1 tensors is a parameter, as encoder.weight"):
        LLM(LLAMA4).load_state_dict({"encoder.weight": torch.zeros(2)}, strict=False)


def test_a_copy_of_a_model_loads_into_itself(both):
    theirs, _, ours = both
    empty = fresh(ours)
    copied = copy.deepcopy(empty)
    copied.load_state_dict(theirs.state_dict())
    assert_same(copied, ours)
    assert_same(empty, fresh(ours))
    ids = tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(copied(ids).logits, ours(ids).logits)


def test_a_rank_that_holds_a_part_loads_its_part_by_our_names():
    args = LLAMA4
    shares = {n: box_shape(box) for n, box in ParameterTable.of(args).boxes((1, 2), (0, 3)).items()}
    model = LLM(args, device="meta")
    for name, shape in shares.items():
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, nn.Parameter(torch.zeros(shape)))
    state = {name: torch.randn(shape) for name, shape in shares.items()}
    model.load_state_dict(state)
    assert_same(model, state)


def test_a_refusal_names_every_family_that_fits_no_worse():
    model = LLM(ModelArgs(dim=16, n_layers=1, n_heads=2, vocab_size=32))
    with pytest.raises(UserError, match=r"not the weights of this \w+( or \w+)* model: it misses") as refused:
        model.load_state_dict({"model.embed_tokens.weight": torch.zeros(32, 16)})
    named = str(refused.value).split("of this ")[1].split(" model")[0].split(" or ")
    assert {"llama", "mistral", "qwen2"} <= set(named) and "gpt_neox" not in named
