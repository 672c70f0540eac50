"""Meta's files: parts of tensor-parallel ranks become the model that was cut, bit for bit, and the other way.

The cutting here follows Meta's layouts by hand; it shares nothing with llm/foreign.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm import LLM, ModelArgs
from llm.checkpoint.weights import ModuleWeights
from llm.errors import UserError
from llm.foreign.export import choose_family, export_hf, export_meta
from llm.foreign.families import meta_llama, meta_llama4
from llm.foreign.files import open_foreign

VOCAB, D, HEADS, WIDTH = 64, 32, 4, 8
FFN, EXPERT = 88, 48
"""By Meta's rule from a width of 32 and multiple_of 8: 2/3 of 128, rounded up; for experts halved before."""
LLAMA: dict[str, Any] = dict(dim=D, n_layers=2, n_heads=HEADS, n_kv_heads=2, vocab_size=VOCAB, ffn_hidden=FFN)
LLAMA4: dict[str, Any] = LLAMA | dict(
    n_layers=4, qk_norm="l2", nope_layer_interval=4, attention_chunk_size=8,
    moe={"n_experts": 3, "hidden": EXPERT, "interleave": 2},
)  # fmt: skip
PARAMS: dict[str, Any] = {
    "dim": D, "n_layers": 2, "n_heads": HEADS, "n_kv_heads": 2, "vocab_size": VOCAB, "multiple_of": 8,
    "norm_eps": 1e-5, "rope_theta": 500000.0,
}  # fmt: skip
PARAMS4: dict[str, Any] = PARAMS | {
    "n_layers": 4, "use_qk_norm": True, "nope_layer_interval": 4, "attention_chunk_size": 8,
    "moe_args": {"num_experts": 3, "top_k": 1, "interleave_moe_layer_step": 2, "capacity_factor": 1.0},
}  # fmt: skip
Weights = dict[str, Tensor]


def model(raw: dict[str, Any], seed: int = 0) -> LLM:
    """A model in which no two numbers are equal by construction, norms and biases included."""
    made = LLM(ModelArgs.model_validate({"init_std": 0.1} | raw), seed=seed)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    return made.eval()


def weights_of(made: LLM) -> Weights:
    return {name: parameter.detach().bfloat16() for name, parameter in made.named_parameters()}


def heads_of(weight: Tensor, rank: int, ranks: int, kv_heads: int) -> Tensor:
    """Rows of keys or values on a rank: its share of the heads, or the one that it shares with its neighbours."""
    if ranks <= kv_heads:
        return weight.chunk(ranks)[rank]
    return weight.view(kv_heads, WIDTH, D)[rank // (ranks // kv_heads)]


def cut_llama(weights: Weights, ranks: int, table_dim: int, kv_heads: int = 2) -> list[Weights]:
    """Files of Llama 2 (table_dim 1) or 3 (0)."""
    dims = {"wq": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1, "tok_embeddings": table_dim}
    shards: list[Weights] = [{"rope.freqs": torch.ones(WIDTH // 2)} for _ in range(ranks)]
    for name, weight in weights.items():
        kind = name.split(".")[-2]
        for rank, shard in enumerate(shards):
            if kind in ("wk", "wv"):
                shard[name] = heads_of(weight, rank, ranks, kv_heads).clone()
            else:
                shard[name] = weight.chunk(ranks, dims[kind])[rank].clone() if kind in dims else weight.clone()
    return shards


def cut_llama4(weights: Weights, ranks: int, kv_heads: int = 2) -> list[Weights]:
    """Files of Llama 4 as they were released: fused, with norms inside, experts as flat matrices."""
    shards = []
    for rank in range(ranks):

        def part(name: str, dim: int, rank: int = rank) -> Tensor:
            return weights[name].chunk(ranks, dim)[rank]

        shard = {name: part(name, 0) for name in ("tok_embeddings.weight", "output.weight")}
        shard["norm.weight"] = weights["norm.weight"]
        for i in range(4):
            block = f"layers.{i}."
            attention, ffn = f"{block}attention.", f"{block}feed_forward."
            kv = [heads_of(weights[f"{attention}{w}.weight"], rank, ranks, kv_heads) for w in ("wk", "wv")]
            shard[f"{attention}wqkv.weight"] = torch.cat([part(f"{attention}wq.weight", 0), *kv])
            shard[f"{attention}wqkv.layer_norm_weight"] = weights[f"{block}attention_norm.weight"]
            shard[f"{attention}wo.weight"] = part(f"{attention}wo.weight", 1)
            if i % 2 == 0:
                shard[f"{ffn}mlp.layer_norm_weight"] = weights[f"{block}ffn_norm.weight"]
                shard[f"{ffn}mlp.fc1_weight"] = torch.cat([part(f"{ffn}w1.weight", 0), part(f"{ffn}w3.weight", 0)])
                shard[f"{ffn}mlp.fc2_weight"] = part(f"{ffn}w2.weight", 1)
                continue
            shard[f"{ffn}norm.weight"] = weights[f"{block}ffn_norm.weight"]
            shard[f"{ffn}router_DE"] = weights[f"{ffn}router.weight"].t().contiguous()
            shard[f"{ffn}experts.moe_w_in_eD_F"] = part(f"{ffn}experts.w1", 2).reshape(3 * D, -1)
            shard[f"{ffn}experts.moe_w_swiglu_eD_F"] = part(f"{ffn}experts.w3", 2).reshape(3 * D, -1)
            shard[f"{ffn}experts.moe_w_out_eF_D"] = part(f"{ffn}experts.w2", 1).reshape(-1, D)
            shard[f"{ffn}w_in_shared_FD.weight"] = part(f"{ffn}shared_expert.w1.weight", 0)
            shard[f"{ffn}w_swiglu_FD.weight"] = part(f"{ffn}shared_expert.w3.weight", 0)
            shard[f"{ffn}w_out_shared_DF.weight"] = part(f"{ffn}shared_expert.w2.weight", 1)
            shard[f"{ffn}global_gate_stats_3E"] = torch.zeros(3, 3)
        shards.append({name: tensor.clone() for name, tensor in shard.items()})
    return shards


def cut_after_hooks(weights: Weights, ranks: int) -> list[Weights]:
    """The names that Meta's modules have in memory, which are ours."""
    shards: list[Weights] = [{} for _ in range(ranks)]
    for name, weight in weights.items():
        kind = name.removesuffix(".weight").split(".")[-1]
        expert = ".experts." in name
        dim = {"w1": 2 if expert else 0, "w3": 2 if expert else 0, "w2": 1, "wq": 0, "wo": 1}.get(kind)
        dim = 0 if kind in ("tok_embeddings", "output") else dim
        for rank, shard in enumerate(shards):
            if kind in ("wk", "wv"):
                shard[name] = heads_of(weight, rank, ranks, 2).clone()
            elif kind == "router":
                shard[name.replace("router.weight", "router_DE")] = weight.t().contiguous()
            else:
                shard[name] = weight.clone() if dim is None else weight.chunk(ranks, dim)[rank].clone()
    return shards


def write(folder: Path, params: dict[str, Any], shards: list[Weights]) -> Path:
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    for rank, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    return folder


def assert_holds(folder: Path, weights: Weights) -> None:
    found = LLM.from_pretrained(folder, torch.bfloat16)
    assert {name for name, _ in found.named_parameters()} == set(weights)
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, weights[name]), name


@pytest.mark.parametrize("table_dim", [0, 1], ids=["table cut by rows", "table cut by columns"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_parts_of_llama_make_the_model(ranks, table_dim, tmp_path):
    """In four parts, two hold each head of keys and values."""
    weights = weights_of(model(LLAMA))
    assert_holds(write(tmp_path / "m", PARAMS, cut_llama(weights, ranks, table_dim)), weights)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_parts_of_llama_with_one_head_of_keys_or_as_many_as_queries(kv_heads, tmp_path):
    weights = weights_of(model(LLAMA | {"n_kv_heads": kv_heads}))
    shards = cut_llama(weights, 4, 0, kv_heads)
    assert_holds(write(tmp_path / "m", PARAMS | {"n_kv_heads": kv_heads}, shards), weights)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("cut", [cut_llama4, cut_after_hooks], ids=["as released", "after load hooks"])
def test_parts_of_llama4_make_the_model(cut, ranks, tmp_path):
    """Two dense and two MoE layers."""
    weights = weights_of(model(LLAMA4))
    folder = write(tmp_path / "m", PARAMS4, cut(weights, ranks))
    assert_holds(folder, weights)
    opened = open_foreign(folder)
    assert opened.family.name == "meta_llama4" and not opened.warnings
    assert opened.args.layer_specs() == ModelArgs.model_validate(LLAMA4).layer_specs()


def test_dense_llama4_under_common_names_is_told_by_its_params(tmp_path):
    """Read as Llama 3 it would run, with RoPE in layers that have none."""
    weights = weights_of(model(LLAMA4 | {"moe": None}))
    params = {key: value for key, value in PARAMS4.items() if key != "moe_args"}
    folder = write(tmp_path / "m", params, cut_after_hooks(weights, 1))
    assert_holds(folder, weights)
    assert [spec.attention.rope for spec in open_foreign(folder).args.layer_specs()] == [True, True, True, False]


@pytest.mark.parametrize(
    ("key", "rank"),
    [("layers.1.attention.wk.weight", 3), ("layers.0.attention.wv.weight", 1), ("layers.1.ffn_norm.weight", 2)],
)
def test_copies_that_differ_are_refused(key, rank, tmp_path):
    shards = cut_llama(weights_of(model(LLAMA)), 4, 0)
    shards[rank][key].view(-1)[-1] += 1
    with pytest.raises(UserError, match=f"m: {key} of part {rank} holds the same weights as {key}, but"):
        LLM.from_pretrained(write(tmp_path / "m", PARAMS, shards))


def test_routers_that_differ_are_refused(tmp_path):
    shards = cut_llama4(weights_of(model(LLAMA4)), 2)
    shards[1]["layers.1.feed_forward.router_DE"][0, 0] += 1
    with pytest.raises(UserError, match="router_DE of part 1 holds the same weights as layers.1.feed_forward.router"):
        LLM.from_pretrained(write(tmp_path / "m", PARAMS4, shards))


def test_heads_that_no_part_holds_are_missed(tmp_path):
    """Three heads in four parts of one head each: the files fit in shape, whatever they hold."""
    raw = LLAMA | {"n_heads": 12, "n_kv_heads": 3, "head_dim": None, "dim": 96}
    weights = weights_of(model(raw))
    shards: list[Weights] = []
    for rank in range(4):
        kv = {name: w[8 * min(rank, 2) :][:8] for name, w in weights.items() if name.split(".")[-2] in ("wk", "wv")}
        rest = {name: w for name, w in weights.items() if name not in kv}
        shards.append({name: w.clone() for name, w in (cut_llama(rest, 4, 0)[rank] | kv).items()})
    params = PARAMS | {"dim": 96, "n_heads": 12, "n_kv_heads": 3, "multiple_of": 8, "ffn_dim_multiplier": 88 / 256}
    with pytest.raises(UserError, match="it misses parts of layers.0.attention.wk.weight, parts of"):
        open_foreign(write(tmp_path / "m", params, shards))


@pytest.mark.parametrize("table_dim", [0, 1])
def test_weights_settle_vocabulary_and_tied_head(table_dim, tmp_path):
    weights = weights_of(model(LLAMA | {"tie_embeddings": True}))
    assert "output.weight" not in weights
    folder = write(tmp_path / "m", PARAMS | {"vocab_size": -1}, cut_llama(weights, 2, table_dim))
    assert_holds(folder, weights)
    assert open_foreign(folder).args.vocab_size == VOCAB and open_foreign(folder).args.tie_embeddings


def test_tensors_that_lie_in_a_file_in_another_order_are_read(tmp_path):
    """A turned view, a part of a larger tensor, and two names of one tensor."""
    weights = weights_of(model(LLAMA))
    weights["layers.1.attention.wo.weight"] = weights["layers.0.attention.wo.weight"]
    shard = dict(weights)
    shard["layers.0.attention.wq.weight"] = weights["layers.0.attention.wq.weight"].t().contiguous().t()
    shard["layers.0.feed_forward.w1.weight"] = torch.cat([weights["layers.0.feed_forward.w1.weight"]] * 2, 1)[:, :D]
    shard["layers.0.feed_forward.w3.weight"] = torch.cat([weights["layers.0.feed_forward.w3.weight"]] * 2)[FFN:]
    assert_holds(write(tmp_path / "m", PARAMS, [shard]), weights)


@pytest.mark.parametrize(
    ("dim", "multiple_of", "factor", "width"),
    [
        (4096, 256, None, 11008), (5120, 256, None, 13824), (8192, 256, None, 22016), (4096, 1024, 1.3, 14336),
        (8192, 4096, 1.3, 28672), (2048, 256, 1.5, 8192), (16384, 4096, 1.2, 53248),
    ],
)  # fmt: skip
def test_widths_of_released_models(dim, multiple_of, factor, width):
    params = {"dim": dim, "n_layers": 1, "n_heads": 32, "multiple_of": multiple_of, "ffn_dim_multiplier": factor}
    args = ModelArgs.model_validate(meta_llama.read_config(params, print))
    assert args.ffn_width() == width
    # written from the width alone, the same width is read back
    explicit = args.model_copy(update={"ffn_hidden": width, "multiple_of": 256, "ffn_dim_multiplier": None})
    written = meta_llama.write_config(explicit)
    assert ModelArgs.model_validate(meta_llama.read_config(written, print)).ffn_width() == width


@pytest.mark.parametrize("width", [1, 2, 3, 7, 86, 88, 100, 1023, 4096])
def test_any_width_can_be_written(width):
    args = ModelArgs.model_validate(LLAMA | {"ffn_hidden": width})
    assert ModelArgs.model_validate(meta_llama.read_config(meta_llama.write_config(args), print)).ffn_width() == width


def test_params_of_scout():
    params = {
        "dim": 5120, "n_layers": 48, "n_heads": 40, "n_kv_heads": 8, "vocab_size": 202048, "multiple_of": 2048,
        "ffn_dim_multiplier": 1.2, "ffn_exp": 4.0, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True,
        "use_qk_norm": True, "nope_layer_interval": 4, "attention_chunk_size": 8192,
        "moe_args": {"num_experts": 16, "top_k": 1, "auto_scale_F": True, "capacity_factor": 1.0,
                     "interleave_moe_layer_step": 1},
    }  # fmt: skip
    args = ModelArgs.model_validate(meta_llama4.read_config(params, print))
    assert (args.ffn_width(), args.moe_width()) == (16384, 8192)
    scaling = args.rope_scaling
    assert scaling and (scaling.factor, scaling.high_freq_factor, scaling.low_freq_factor) == (16, 1, 1)
    assert sum(parameter.numel() for parameter in LLM(args, device="meta").parameters()) == 107_769_861_120


def exported(made: LLM, folder: Path, shards: int, dtype: torch.dtype = torch.float32) -> Path:
    family = choose_family(made.args, "meta")
    export_meta(folder, made.args, ModuleWeights(made), family, dtype=dtype, shards=shards, extra_files={})
    return folder


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_is_exported_is_cut_as_meta_cuts(ranks, tmp_path):
    made = model(LLAMA)
    folder = exported(made, tmp_path / "m", ranks, torch.bfloat16)
    for rank, expected in enumerate(cut_llama(weights_of(made), ranks, 0)):
        found = torch.load(folder / f"consolidated.{rank:02d}.pth")
        del expected["rope.freqs"]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert {path.name for path in folder.iterdir()} == {
        "params.json", *(f"consolidated.{rank:02d}.pth" for rank in range(ranks))
    }  # fmt: skip
    assert_holds(folder, weights_of(made))


def same_function(first: LLM, second: LLM) -> None:
    ids = torch.randint(VOCAB, (2, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, actual = first(ids).logits, second(ids).logits
    # the same products in another order inside a head
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("tied", [False, True])
def test_half_rotation_is_turned_into_meta_s(tied, tmp_path):
    scaling = {"kind": "llama3", "factor": 4.0, "original_max_position": 8192}
    made = model(LLAMA | dict(rope_interleaved=False, tie_embeddings=tied, rope_theta=1e4, rope_scaling=scaling))
    again = LLM.from_pretrained(exported(made, tmp_path / "m", 2))
    assert again.args.rope_interleaved
    assert not torch.equal(again.layers[0].attention.wq.weight, made.layers[0].attention.wq.weight)
    same_function(made, again)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"head_dim": 12}),
        ("qwen2", {"qkv_bias": True}),
        ("qwen3", {"qk_norm": "head"}),
        ("olmo2", {"qk_norm": "full", "norm_place": "post", "norm_fp32_weight": True}),
        ("gpt_neox", dict(n_kv_heads=4, rope_pct=0.5, norm="layer", qkv_bias=True, o_bias=True, ffn_bias=True,
                          gated=False, act="gelu", parallel_residual=True)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_turned_for_hugging_face_where_it_has_to_be(family, changes, interleaved, tmp_path):
    """Biases, norms of heads and partly rotated heads go along."""
    made = model(LLAMA | changes | {"rope_interleaved": interleaved})
    chosen = choose_family(made.args, "hf", family)
    export_hf(
        tmp_path / "m", made.args, ModuleWeights(made), chosen,
        dtype=torch.float32, max_shard_bytes=10_000, extra_files={}, extra_config={},
    )  # fmt: skip
    again = LLM.from_pretrained(tmp_path / "m")
    assert not again.args.rope_interleaved
    same_function(made, again)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"head_dim": 12}, r"head_width \(12\)"),
        ({"qkv_bias": True}, r"qkv_bias \(True\)"),
        ({"rope_scaling": {"kind": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"sliding_window": 8}, r"in layers 0, 1: mixer\.mask \(window\), mixer\.span \(8\)$"),
        ({"moe": {"n_experts": 2}}, r"in layers 0, 1: ffn \(moe\)$"),
    ],
)
def test_what_meta_s_params_cannot_say_is_refused(changes, named):
    with pytest.raises(UserError, match=f"a meta_llama config cannot say .*{named}"):
        choose_family(ModelArgs.model_validate(LLAMA | changes), "meta", "meta_llama")


@pytest.mark.parametrize(
    ("ranks", "message"),
    [(3, "--shards=3 does not divide the heads, 4"), (16, "--shards=16 does not divide the heads")],
)
def test_numbers_of_parts_that_cannot_be_are_refused(ranks, message, tmp_path):
    with pytest.raises(UserError, match=message):
        exported(model(LLAMA), tmp_path / "m", ranks)
    assert not list(tmp_path.iterdir())
