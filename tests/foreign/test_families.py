"""Models of every family come in with equal logits and go out with equal weights, logits and configs."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from llm import LLM, ModelArgs
from llm.args.written import model_file
from llm.cache import Cache
from llm.checkpoint.weights import ModuleWeights
from llm.errors import UserError
from llm.foreign.configs import open_config
from llm.foreign.export import choose_family, export_hf, meaning
from llm.foreign.family import family_named
from llm.foreign.files import open_foreign
from tests.foreign.models import (
    CHUNK,
    CONFIGS,
    FULL,
    LINEAR,
    LLAMA3,
    READ_ONLY,
    TABLE,
    YARN,
    config_of,
    logits_of,
    reference,
    tokens,
    transformers,
)

CUTS = [3, 1, 1, 1, 1, 1, 1, 8, 1, 1, 1, 1, 1, 1, 3]
"""Of a text past the ends of chunks (8) and windows (up to 7), by one token and by several."""
SAID = {
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "intermediate_size_mlp", "moe_intermediate_size",
    "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "hidden_act",
    "hidden_activation", "rms_norm_eps", "layer_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias",
    "sliding_window", "use_sliding_window", "layer_types", "num_experts_per_tok", "num_local_experts", "moe_layers",
    "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "no_rope_layers", "use_qk_norm", "floor_scale",
    "attn_scale", "attn_temperature_tuning", "attention_chunk_size", "query_pre_attn_scalar",
    "attn_logit_softcapping", "final_logit_softcapping", "use_parallel_residual",
}  # fmt: skip
"""Keys of configs that say the same however they are spelt."""


@dataclass
class Visit:
    """A model of transformers, its folder, and the same read by us."""

    family: str
    name: str
    folder: Path
    theirs: nn.Module
    ours: LLM
    ids: Tensor

    @property
    def tolerance(self) -> float:
        """Of the largest logit; float32 sums in another order. Gemma's normalised values are larger."""
        return 1e-4 if self.family.startswith("gemma") else 1e-5

    def check_equal(self, actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, rtol=0, atol=self.tolerance * expected.abs().max().item())


@pytest.fixture(scope="module", params=TABLE, ids=lambda entry: ": ".join(entry))
def visit(request, tmp_path_factory) -> Visit:
    theirs = reference(*request.param)
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return Visit(*request.param, folder, theirs, LLM.from_pretrained(folder), tokens(2, sum(CUTS)))


def reloaded(folder: Path) -> nn.Module:
    """As transformers reads a folder, which must hold exactly what it wants."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def export(model: LLM, folder: Path, family: str | None, **changes: Any) -> None:
    options = dict(dtype=torch.float32, max_shard_bytes=1 << 30, extra_files={}, extra_config={}) | changes
    export_hf(folder, model.args, ModuleWeights(model), choose_family(model.args, "hf", family), **options)


def test_logits_equal_those_of_transformers(visit):
    visit.check_equal(logits_of(visit.ours, visit.ids), logits_of(visit.theirs, visit.ids))


def test_both_count_as_many_parameters(visit):
    assert sum(parameter.numel() for parameter in visit.ours.parameters()) == visit.theirs.num_parameters()


def test_the_config_alone_says_the_same_and_comes_back_from_a_file(visit):
    bare = open_config(visit.folder / "config.json")
    assert bare.family.name == visit.family and bare.args == open_foreign(visit.folder).args == visit.ours.args
    assert ModelArgs.model_validate(yaml.safe_load(model_file(bare.args, "a title"))) == bare.args


def test_cached_decoding_equals_the_full_forward(visit):
    cuts, ids = CUTS, visit.ids
    scaling = visit.ours.args.rope_scaling
    if scaling is not None and scaling.kind == "dynamic":
        # only within the original context: later keys stay rotated by the base of the length they were written at
        cuts, ids = CUTS[:7], ids[:, : sum(CUTS[:7])]
        assert ids.shape[1] <= scaling.original_max_position
    cache = Cache(visit.ours.args)
    parts = [visit.ours(part, cache=cache).logits for part in ids.split(cuts, dim=1)]
    visit.check_equal(torch.cat(parts, dim=1), logits_of(visit.ours, ids))


def test_what_goes_out_is_what_came_in(visit, tmp_path):
    if visit.family in READ_ONLY:
        with pytest.raises(UserError, match=f"'{visit.family}' cannot be written as hf"):
            choose_family(visit.ours.args, "hf", visit.family)
        return
    export(visit.ours, tmp_path / "out", visit.family)
    back = reloaded(tmp_path / "out")
    assert_same_weights(back, visit.theirs)
    # the same code on the same numbers: a difference of one bit would be one of the configs
    torch.testing.assert_close(logits_of(back, visit.ids), logits_of(visit.theirs, visit.ids), rtol=0, atol=0)
    ours, theirs = (model.config.to_dict() for model in (back, visit.theirs))
    assert {key: ours[key] for key in SAID & theirs.keys()} == {key: theirs[key] for key in SAID & theirs.keys()}
    assert meaning(open_foreign(tmp_path / "out").args) == meaning(visit.ours.args)


def test_parts_and_their_index_are_read_by_both(tmp_path):
    theirs = reference("mixtral", "top 2")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    ours = LLM.from_pretrained(tmp_path / "theirs")
    export(ours, tmp_path / "out", "mixtral", max_shard_bytes=40_000)
    for folder in (tmp_path / "theirs", tmp_path / "out"):
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        files = {file: [key for key, at in index["weight_map"].items() if at == file] for file in os.listdir(folder)}
        parts = {file: keys for file, keys in files.items() if file.endswith(".safetensors")}
        assert len(parts) > 3 and all(parts.values())
        assert index["metadata"]["total_size"] == 4 * sum(weight.numel() for weight in theirs.parameters())
    largest = [(folder / file).stat().st_size for file, keys in parts.items() if len(keys) > 1]  # and their headers
    assert max(largest) < 40_000 + 4096
    assert_same_weights(reloaded(tmp_path / "out"), theirs)
    assert_same_weights(LLM.from_pretrained(tmp_path / "out"), ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_goes_through_without_a_changed_bit(dtype, tmp_path):
    theirs = reference("qwen3_moe", "tied, biases, odd width").to(dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    wide, ours = (LLM.from_pretrained(tmp_path / "theirs", d) for d in (torch.float32, dtype))
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    assert_same_weights(wide.to(dtype), ours)
    export(wide, tmp_path / "out", "qwen3_moe", dtype=dtype)
    back = reloaded(tmp_path / "out")
    assert back.dtype == dtype
    assert_same_weights(back, theirs)


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for key, weight in theirs.items():
        assert torch.equal(ours[key], weight), key


def read(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What the model of a config is, and what was reported about it."""
    reported: list[str] = []
    args = ModelArgs.model_validate(family_named(config["model_type"]).read_config(config, reported.append))
    return meaning(args), reported


def older(config: dict[str, Any]) -> dict[str, Any]:
    """A config of transformers 5 as 4 spelt it."""
    if "rope_parameters" not in config:
        if (kinds := config.get("layers_block_type")) is not None:
            letters = {"linear_attention": "M", "full_attention": "*", "mlp": "-"}
            kept = {key: value for key, value in config.items() if key not in ("layers_block_type", "layer_types")}
            config = kept | {"hybrid_override_pattern": "".join(letters[kind] for kind in kinds)}
        return {("torch_dtype" if key == "dtype" else key): value for key, value in config.items()}
    params = dict(config["rope_parameters"])
    kind, old = params.pop("rope_type"), {key: value for key, value in config.items() if key != "rope_parameters"}
    names = {"gpt_neox": ("rotary_emb_base", "rotary_pct"), "bamba": ("rope_theta", "partial_rotary_factor")}.get(
        config["model_type"], ("rope_theta", "no such key")
    )
    old[names[0]] = params.pop("rope_theta")
    if "partial_rotary_factor" in params:
        old[names[1]] = params.pop("partial_rotary_factor")
    old["rope_scaling"] = None if kind == "default" else {"type": kind, **params}
    old["torch_dtype"] = old.pop("dtype", None)
    if "num_local_experts" in old and config["model_type"] == "qwen3_moe":
        old["num_experts"] = old.pop("num_local_experts")
    if config["model_type"] == "llama4_text":
        old["attn_temperature_tuning"] = 4 if config["attn_temperature_tuning"] else 0
    return old


@pytest.mark.parametrize("entry", TABLE, ids=": ".join)
def test_the_older_spelling_of_a_config_says_the_same(entry):
    config = config_of(*entry).to_dict()
    said, _ = read(config)
    old, reported = read(older(config))
    assert old == said
    by_list = {key for key in ("layer_types", "moe_layers", "no_rope_layers") if key in CONFIGS[entry[0]][entry[1]]}
    assert bool(reported) == (bool(by_list) and entry[0] != "gemma2" and "masks" not in entry[1]), reported


@pytest.mark.parametrize("entry", [entry for entry in TABLE if "by list" not in entry[1]], ids=": ".join)
def test_lists_that_newer_configs_add_may_be_missing(entry):
    config = config_of(*entry).to_dict()
    lists = ("layer_types", "moe_layers", "no_rope_layers")
    shorter = {key: value for key, value in config.items() if key not in lists}
    assert read(shorter) == (read(config)[0], [])


def config(family: str, **changes: Any) -> dict[str, Any]:
    """The first config of a family with keys changed as they stand in a file."""
    found = config_of(family, next(iter(CONFIGS[family]))).to_dict() | changes
    return {key: value for key, value in found.items() if value is not ...}


CONTRADICTIONS = {
    "theta": (config("llama", rope_theta=5e5), "rope_theta", {}),
    "scaling's number": (
        config("llama", rope_parameters=LLAMA3, rope_scaling=LLAMA3 | {"factor": 2.0}), "factor",
        {"rope_parameters": LLAMA3 | {"factor": 2.0}},
    ),
    "scaling's kind": (
        config("llama", rope_scaling={"type": "linear", "factor": 4.0}), "rope_type", {"rope_parameters": LINEAR}
    ),
    "scaling's original length": (
        config("qwen2", rope_parameters=YARN, rope_scaling=YARN | {"original_max_position_embeddings": 8}),
        "original_max_position_embeddings", {"rope_parameters": YARN | {"original_max_position_embeddings": 8}},
    ),
    "rotated part": (config("gpt_neox", rotary_pct=1.0), "partial_rotary_factor", {}),
    "windows": (
        config("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1, layer_types=[FULL] * 3),
        "max_window_layers", {},
    ),
    "nope layers": (
        config("llama4_text", no_rope_layers=[1, 1, 1], layer_types=...), "no_rope_layers",
        {"no_rope_layers": [1, 1, 1], "no_rope_layer_interval": ..., "layer_types": [CHUNK] * 3},
    ),
    "moe layers": (
        config("llama4_text", moe_layers=[1]), "moe_layers", {"moe_layers": [1], "interleave_moe_layer_step": ...}
    ),
    "experts": (config("qwen3_moe", num_experts=8, num_local_experts=4), "num_experts", {"num_local_experts": ...,
                                                                                       "num_experts": 8}),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions_in_a_config_are_told_and_one_side_is_used(case):
    both, word, one_side = case
    said, reported = read(both)
    assert len(reported) == 1 and word in reported[0] and "contradict" in reported[0]
    assert (said, []) == read(config(both["model_type"], **one_side))


REFUSED = {
    "unknown rope": (config("llama", rope_parameters={"rope_type": "longrope", "factor": 2.0}), "longrope"),
    "no factor": (config("llama", rope_parameters={"rope_type": "linear"}), "factor"),
    "rope by kind of layer": (config("llama", rope_parameters={"full_attention": {"rope_theta": 1e4}}), "layers"),
    "partly rotated": (config("llama", partial_rotary_factor=0.5), "partial_rotary_factor"),
    "activation": (config("llama", hidden_act="quick_gelu"), "quick_gelu"),
    "experts' activation": (config("mixtral", hidden_act="gelu"), "hidden_act"),
    "both ways": (config("gemma2", use_bidirectional_attention=True), "use_bidirectional_attention"),
    "kind of layer": (config("qwen3", use_sliding_window=True, sliding_window=4, layer_types=[CHUNK] * 3), "chunked"),
    "too few kinds of layers": (config("gemma2", layer_types=[FULL]), "layer_types"),
    "too few nope flags": (config("llama4_text", no_rope_layers=[1]), "no_rope_layers"),
    "no width": (config("llama", hidden_size=None), "hidden_size"),
    "layers of experts": (config("nemotron_h", layers_block_type=..., hybrid_override_pattern="ME*-"), "experts"),
    "unknown layers": (config("nemotron_h", layers_block_type=..., hybrid_override_pattern="MX"), "X is not one of"),
    "an output of the table": (config("nemotron_h", tie_word_embeddings=True), "tie_word_embeddings"),
    "a mixer's activation": (config("nemotron_h", mamba_hidden_act="gelu"), "mamba_hidden_act"),
    "channels that are no heads": (config("falcon_h1", mamba_d_ssm=100), "mamba_n_heads"),
    "biases of one side": (config("falcon_h1", mamba_proj_bias=True), "projectors_bias"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(case):
    with pytest.raises(UserError, match=case[1]):
        read(case[0])


KNOBS: dict[str, dict[str, Any]] = {
    "plain": {},
    "pairs side by side": dict(rope_interleaved=True),
    "a half rotated": dict(rope_pct=0.5),
    "relu": dict(act="relu"),
    "gelu": dict(act="gelu"),
    "tanh gelu": dict(act="gelu_tanh"),
    "ungated": dict(gated=False),
    "ffn biases": dict(ffn_bias=True),
    "qkv biases": dict(qkv_bias=True, o_bias=False),
    "output bias": dict(o_bias=True, qkv_bias=False),
    "attention biases": dict(qkv_bias=True, o_bias=True),
    "no attention biases": dict(qkv_bias=False, o_bias=False),
    "layer norm": dict(norm="layer", norm_offset=False, norm_fp32_weight=False),
    "rms norm": dict(norm="rms"),
    "offset norms": dict(norm_offset=True),
    "wide norms": dict(norm_fp32_weight=True),
    "norms after": dict(norm_place="post", parallel_residual=False),
    "norms around": dict(norm_place="sandwich", parallel_residual=False),
    "norms before": dict(norm_place="pre"),
    "in parallel": dict(parallel_residual=True),
    "one after the other": dict(parallel_residual=False),
    "no qk norm": dict(qk_norm=None),
    "l2 qk norm": dict(qk_norm="l2"),
    "head qk norm": dict(qk_norm="head"),
    "full qk norm": dict(qk_norm="full"),
    "theta": dict(rope_theta=777.0),
    "linear": dict(rope_scaling=dict(kind="linear", factor=4)),
    "dynamic": dict(rope_scaling=dict(kind="dynamic", factor=4, original_max_position=16)),
    "llama3": dict(rope_scaling=dict(kind="llama3", original_max_position=16)),
    "yarn": dict(rope_scaling=dict(kind="yarn", factor=4, original_max_position=16, attention_factor=1.2)),
    "nope layers": dict(nope_layer_interval=2, layer_pattern=None),
    "nope by pattern": dict(layer_pattern=["attn:nope", "attn:rope"]),
    "full by pattern": dict(layer_pattern="attn:full", attention_chunk_size=8, sliding_window=4),
    "chunks": dict(attention_chunk_size=8, layer_pattern=None),
    "windows": dict(sliding_window=5, attention_chunk_size=None, layer_pattern=None),
    "some windows": dict(sliding_window=5, layer_pattern=["attn:window", "attn:full"]),
    "late window": dict(sliding_window=5, layer_pattern=["attn:full", "attn:full", "attn:window"]),
    "no mask but the causal": dict(sliding_window=None, attention_chunk_size=None, layer_pattern=None),
    "chunks on some": dict(
        attention_chunk_size=8, layer_pattern=["attn:chunk:nope", "attn:full:rope", "attn:chunk:rope"]
    ),
    "attention alone": dict(layer_pattern=["attn", "attn+none"], moe=None),
    "score scale": dict(score_scale=0.9),
    "odd score scale": dict(score_scale=20**-0.5),
    "capped scores": dict(attn_softcap=0.7),
    "capped logits": dict(logit_softcap=2.0),
    "no caps": dict(attn_softcap=None, logit_softcap=None),
    "scaled vectors": dict(embed_scale=2.0),
    "temperature": dict(attn_temperature_tuning=True, floor_scale=4, attn_scale=0.3, nope_layer_interval=2),
    "tied": dict(tie_embeddings=True),
    "untied": dict(tie_embeddings=False),
    "wide heads": dict(head_dim=20),
    "one kv head": dict(n_kv_heads=1),
    "eps": dict(norm_eps=1e-2),
    "dense": dict(moe=None, ffn_hidden=40),
    "moe as llama 4": dict(moe=dict(n_experts=4, hidden=24), act="silu"),
    "moe as mixtral": dict(
        moe=dict(n_experts=4, top_k=2, hidden=24, score="softmax", renorm=True, apply="output", shared=False),
        act="silu",
    ),
    "moe as qwen": dict(
        moe=dict(n_experts=4, top_k=2, hidden=24, score="softmax", apply="output", shared=False, dense_layers=(1,)),
        act="silu", ffn_hidden=40,
    ),
    "moe of no one": dict(moe=dict(n_experts=4, top_k=2, hidden=24, score="softmax", apply="input"), act="silu"),
    "second layer moe": dict(
        moe=dict(n_experts=4, hidden=24, interleave=2), ffn_hidden=40, act="silu", layer_pattern=None
    ),
    "moe by pattern": dict(
        moe=dict(n_experts=4, hidden=24), ffn_hidden=40, act="silu", layer_pattern=["attn+moe", "attn+dense"]
    ),
}  # fmt: skip


RICHEST = ("gemma2", "llama4_text")
"""Families that can say most; the others are for longer runs."""


@pytest.mark.parametrize(
    "family",
    [*RICHEST, *(pytest.param(name, marks=pytest.mark.full) for name in CONFIGS if name not in (*RICHEST, *READ_ONLY))],
)
def test_a_model_is_written_as_transformers_has_it_or_refused(family, tmp_path):
    """Each knob turned alone: what a family takes must be right, and what it cannot say must not be written."""
    base = family_named(family).read_config(config_of(family, next(iter(CONFIGS[family]))).to_dict(), print)
    written, ids = [], tokens(1, 26)
    for name, knob in KNOBS.items():
        try:
            args = ModelArgs.model_validate(base | knob)
        except ValueError:  # not a model of ours either
            continue
        model = LLM(args)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.2)
        try:
            export(model, tmp_path / name, family)
        except UserError:
            assert name != "plain"
            continue
        expected = logits_of(model, ids)
        torch.testing.assert_close(
            logits_of(reloaded(tmp_path / name), ids), expected, rtol=0, atol=1e-5 * expected.abs().max().item(),
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip
        torch.testing.assert_close(
            logits_of(LLM.from_pretrained(tmp_path / name), ids), expected, rtol=0,
            atol=1e-5 * expected.abs().max().item(), msg=lambda text, name=name: f"{name}, read by us: {text}",
        )  # fmt: skip
        written.append(name)
    assert {"plain", "theta", "wide heads", "tied", "untied", "eps", "linear"} - set(written) <= UNSAYABLE[family]
    assert "moe of no one" not in written or family == "nemotron_h"  # no layer of which has them by this pattern
    assert "attention alone" not in written


UNSAYABLE = dict.fromkeys(CONFIGS, frozenset[str]()) | {
    "gpt_neox": frozenset({"wide heads"}), "mamba2": frozenset({"wide heads", "linear"}),
    "nemotron_h": frozenset({"theta", "linear", "tied"}),
}  # fmt: skip


def test_a_refused_model_is_refused_by_a_key_of_its_own() -> None:
    """Not by what is wrong in a config that was only written to be compared."""
    ssm = {"d_state": 16, "head_width": 16}
    args = ModelArgs(dim=32, n_layers=4, n_heads=4, vocab_size=50, layer_pattern=["ssm", "ssm@2"], ssm=ssm)
    with pytest.raises(UserError, match=r"the nearest: .* cannot say model.layer_pattern=\['ssm', 'ssm@2'\]"):
        choose_family(args, "hf")
