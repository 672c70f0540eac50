"""ModelArgs: what the layer pattern resolves to, and what is refused with which words."""

import pytest

from llm import LLM, ModelArgs
from llm.args.layers import attention_specs

BASE = dict(dim=64, n_layers=4, n_heads=8, vocab_size=32)


def specs(**changes):
    return ModelArgs.model_validate(BASE | changes).layer_specs()


def test_without_a_pattern_every_layer_is_global_rope_and_dense():
    assert {(a.mask, a.span, a.rope, a.qk_norm, a.temperature) for a in attention_specs(specs())} == {
        ("full", None, True, None, False)
    }
    assert {s.ffn for s in specs()} == {"dense"}


def test_llama4_rules_give_every_fourth_layer_no_rope_and_global_attention():
    resolved = specs(
        n_layers=8, nope_layer_interval=4, attention_chunk_size=16, qk_norm="l2", attn_temperature_tuning=True,
        moe={"n_experts": 4, "interleave": 2},
    )  # fmt: skip
    attention = attention_specs(resolved)
    assert [s.rope for s in attention] == [True, True, True, False] * 2
    assert [s.span for s in attention] == [16, 16, 16, None] * 2
    assert [s.qk_norm for s in attention] == ["l2" if s.rope else None for s in attention]
    assert {s.qk_norm for s in attention_specs(specs(nope_layer_interval=4, qk_norm="head"))} == {"head"}
    assert [s.temperature for s in attention] == [not s.rope for s in attention]
    assert [s.ffn for s in resolved] == ["dense", "moe"] * 4


def test_the_rules_equal_their_written_pattern():
    rules = specs(n_layers=8, nope_layer_interval=4, attention_chunk_size=16, moe={"n_experts": 4})
    written = specs(
        n_layers=8, attention_chunk_size=16, moe={"n_experts": 4},
        layer_pattern="attn:chunk+moe, attn:chunk+moe, attn:chunk+moe, attn:nope+moe",
    )  # fmt: skip
    assert rules == written


def test_a_pattern_is_tiled_and_its_flags_win_over_the_rules():
    resolved = specs(layer_pattern=["attn:nope:full+none", "attn:rope"], nope_layer_interval=2, attention_chunk_size=4)
    assert [(s.rope, s.mask) for s in attention_specs(resolved)] == [(False, "full"), (True, "chunk")] * 2
    assert [s.ffn for s in resolved] == ["none", "dense"] * 2


def test_dense_layers_stay_dense():
    assert [s.ffn for s in specs(moe={"n_experts": 2, "dense_layers": [0, 3]})] == ["dense", "moe", "moe", "dense"]


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ("ssm", "ssm needs the group model.ssm"),
        ("routed", "routed needs the group model.ssm"),
        ("none+none", "a layer is a mixer, a feed-forward or both"),
        ("none:full", "a layer without a mixer has no stride and no flags"),
        ("sum", "sum needs the group model.ssm"),
        ("sum@2", "a sum of a state and attention has no stride"),
        ("alternating", "ssm needs the group model.ssm"),
        ("ssm:full", "unknown flag :full; ssm has none"),
        ("attn@4:window", "a layer with a stride sees all chunks before"),
        ("strided_attn", "attention with a stride is written attn@STRIDE"),
        ("attn@x", "must be a positive whole number"),
        ("attn:window", "window needs model.sliding_window"),
        ("attn:chunk", "chunk needs model.attention_chunk_size"),
        ("attn+moe", r"\+moe needs the group model.moe"),
        ("attn+big", r"unknown feed-forward \+big; use dense, moe or none"),
        ("attn:full:chunk", ":full and :chunk exclude each other"),
        ("attn:global", "unknown flag :global; use full, chunk, window, rope or nope"),
        ("conv", "unknown mixer 'conv'"),
        ("", "unknown mixer ''"),
    ],
)
def test_a_pattern_item_that_cannot_be_built_is_named_with_the_reason(item, reason):
    with pytest.raises(ValueError, match=reason):
        specs(layer_pattern=item)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_kv_heads": 3}, "model.n_kv_heads=3 does not divide model.n_heads=8; use 1, 2, 4 or 8"),
        ({"dim": 60}, "model.n_heads=8 does not divide model.dim=60"),
        ({"head_dim": 7}, "model.head_dim=7: RoPE rotates pairs"),
        ({"vocab_size": 0}, "model.vocab_size=0 must be positive"),
        ({"n_head": 8}, "n_head"),
        ({"moe": {"n_experts": 2, "top_k": 3}}, "model.moe.top_k=3 exceeds model.moe.n_experts=2"),
        ({"moe": {"n_experts": 2, "dense_layers": [4]}}, "layers are 0 to 3"),
        ({"moe": {"n_experts": 2, "balance": "none", "aux_alpha": 0.1}}, "needs model.moe.balance=lag"),
        ({"rope_scaling": {"low_freq_factor": 4, "high_freq_factor": 1}}, "must be at least as large"),
        ({"layer_pattern": []}, "model.layer_pattern is empty"),
    ],
)
def test_impossible_arguments_are_refused_at_construction(changes, reason):
    with pytest.raises(ValueError, match=reason):
        ModelArgs.model_validate(BASE | changes)


def test_a_model_needs_a_vocabulary():
    with pytest.raises(ValueError, match="model.vocab_size is not set"):
        LLM(ModelArgs.model_validate(BASE | {"vocab_size": -1}))


def test_widths_follow_metas_rule():
    scout = ModelArgs(dim=5120, n_layers=48, n_heads=40, ffn_dim_multiplier=1.2, multiple_of=2048)
    assert (scout.ffn_width(), scout.moe_width()) == (16384, 16384)
    half = ModelArgs(dim=5120, n_layers=48, n_heads=40, ffn_dim_multiplier=1.2, multiple_of=2048, ffn_exp=2.0)
    assert half.moe_width() == 8192
    assert ModelArgs(dim=64, n_layers=1, n_heads=4, ffn_hidden=100).ffn_width() == 100


def test_arguments_survive_a_round_trip_through_json():
    args = ModelArgs.model_validate(
        BASE | {"moe": {"n_experts": 4, "dense_layers": [1]}, "rope_scaling": {"factor": 2}}
    )
    assert ModelArgs.model_validate(args.model_dump(mode="json")) == args
