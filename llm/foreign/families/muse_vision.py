"""The vision tower of Muse Glimmer, as Hugging Face names its tensors and says its sizes."""

from collections.abc import Iterator
from typing import Any

from llm.args import ModelArgs
from llm.errors import UserError
from llm.foreign import hf
from llm.foreign.family import Row, Warn, row

TOWER, LAYER = "vision_embeddings", "vision_embeddings.layers.{j}"
FULL_INTERVAL = 4
"""Layers that see all of a picture, beside the last one."""
DEFAULTS: dict[str, Any] = {
    "patch_size": 14, "pos_emb_height": 32, "pos_emb_width": 32, "num_attention_heads": 16, "num_hidden_layers": 50,
    "hidden_size": 1536, "intermediate_size": 8960, "merge_size": 2,
}  # fmt: skip
"""What transformers takes for keys that a vision_config leaves out."""
FIXED: dict[str, Any] = {"patch_temporal": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-5}
"""Keys of a vision_config that the tower here takes to be so."""
BESIDE: dict[str, Any] = {
    "image_token_id": 200092, "video_token_id": 200091, "out_hidden_size": 6144, "projector_hidden_size": 4096,
    "projector_hidden_act": "gelu",
}  # fmt: skip
"""The same beside it."""


def rows() -> Iterator[Row]:
    theirs = "model.vision_tower"
    yield row(f"{theirs}.patch_embedder.patch_embedding.weight", f"{TOWER}.patch.weight")
    yield row(f"{theirs}.patch_embedder.position_embedding_table.weight", f"{TOWER}.pos_embedding")
    for name, ours in (("ln_pre", "norm_pre"), ("ln_post", "norm")):
        yield row(f"{theirs}.{name}.weight", f"{TOWER}.{ours}.weight", bias=True)
    for name, ours in (
        ("attn.q_proj", "attention.wq"), ("attn.k_proj", "attention.wk"), ("attn.v_proj", "attention.wv"),
        ("attn.proj", "attention.wo"), ("mlp.fc1", "feed_forward.w1"), ("mlp.fc2", "feed_forward.w2"),
        ("norm1", "attention_norm"), ("norm2", "ffn_norm"),
    ):  # fmt: skip
        yield row(f"{theirs}.layers.{{j}}.{name}.weight", f"{LAYER}.{ours}.weight", bias=True)
    for name in ("fc1", "fc2"):
        yield row(f"model.vision_adapter.{name}.weight", f"{TOWER}.adapter.{name}.weight")
    yield row("model.vision_projection.weight", "vision_projection.weight")


def read(config: hf.Config, warn: Warn) -> dict[str, Any]:
    """`vision_config` and what stands beside it as keys of VisionArgs. UserError naming a key that the tower cannot
    follow."""
    stated, beside = config.get("vision_config") or {}, _filled(config, BESIDE, "", warn)
    vision = _filled(stated, DEFAULTS, "vision_config.", warn)
    for key, value in FIXED.items():
        _only(f"vision_config.{key}", vision.get(key, value), value)
    _only("vision_config.pos_emb_width", vision["pos_emb_width"], vision["pos_emb_height"])
    _only("projector_hidden_act", beside["projector_hidden_act"], "gelu")
    merge, n_layers = vision["merge_size"], vision["num_hidden_layers"]
    _only("out_hidden_size", beside["out_hidden_size"], merge**2 * vision["hidden_size"])
    _only("vision_config.layer_types", vision.get("layer_types") or _layer_types(n_layers), _layer_types(n_layers))
    rope = hf.one_spelling(vision.get("rope_parameters"))
    _only("vision_config.rope_parameters.rope_type", rope.get("rope_type", "axial"), "axial")
    return {
        "kind": "native",
        "image_size": vision["pos_emb_height"] * vision["patch_size"],
        "patch_size": vision["patch_size"],
        "dim": vision["hidden_size"],
        "n_layers": n_layers,
        "n_heads": vision["num_attention_heads"],
        "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
        "output_dim": beside["projector_hidden_size"],
        "pixel_shuffle_ratio": 1 / merge,
        "patch_token_id": beside["image_token_id"],
        "video_token_id": beside["video_token_id"],
        "rope_theta": float(rope.get("rope_theta", 1e4)),
    }


def _filled(config: hf.Config, defaults: dict[str, Any], above: str, warn: Warn) -> dict[str, Any]:
    """A config with what transformers takes for what it leaves out, sizes of which are noted."""
    for key in (key for key in defaults if config.get(key) is None and key.endswith("_size")):
        warn(f"config.json: {above}{key} is missing, taken as {defaults[key]}, the default of transformers")
    return hf.filled(config, defaults)


def _only(key: str, stated: Any, value: Any) -> None:
    if stated != value:
        raise UserError(f"config.json: {key}={stated} is not supported; only {value} is")


def _layer_types(n_layers: int) -> list[str]:
    full = [(i + 1) % FULL_INTERVAL == 0 or i == n_layers - 1 for i in range(n_layers)]
    return ["full_attention" if everything else "window_attention" for everything in full]


def write(args: ModelArgs) -> dict[str, Any]:
    """vision_config, and the keys beside it."""
    vision = args.vision
    assert vision is not None
    return {
        "image_token_id": vision.patch_token_id,
        "video_token_id": vision.video_token_id,
        "out_hidden_size": vision.shuffled_side**2 * vision.dim,
        "projector_hidden_size": vision.output_dim,
        "projector_hidden_act": "gelu",
        "vision_config": {
            "model_type": "muse_glimmer_vision",
            "patch_size": vision.patch_size,
            "pos_emb_height": vision.grid,
            "pos_emb_width": vision.grid,
            "max_position_embeddings": vision.grid**2,
            "num_attention_heads": vision.n_heads,
            "num_hidden_layers": vision.n_layers,
            "hidden_size": vision.dim,
            "intermediate_size": vision.ffn_width,
            "hidden_act": "gelu",
            "patch_temporal": 2,
            "merge_size": vision.shuffled_side,
            "layer_norm_eps": vision.norm_eps,
            "layer_types": _layer_types(vision.n_layers),
            "initializer_range": args.init_std,
            "rope_parameters": {"rope_theta": vision.rope_theta, "rope_type": "axial"},
        },
    }
