"""The vision tower of Llama 4, as Hugging Face and as Meta name its tensors and say its sizes."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from llm.args import ModelArgs
from llm.errors import UserError
from llm.foreign import hf
from llm.foreign.family import Computed, Row, Warn, row

TOWER = "vision_embeddings"
LAYER = f"{TOWER}.layers.{{j}}"
PROJECTION = "vision_projection.weight"


def hf_rows() -> Iterator[Row]:
    """Of vision_model and multi_modal_projector."""
    theirs = "vision_model"
    yield row(f"{theirs}.patch_embedding.linear.weight", f"{TOWER}.patch.weight")
    yield row(f"{theirs}.class_embedding", f"{TOWER}.class_embedding")
    yield row(f"{theirs}.positional_embedding_vlm", f"{TOWER}.pos_embedding")
    for name, ours in (("layernorm_pre", "norm_pre"), ("layernorm_post", "norm")):
        yield row(f"{theirs}.{name}.weight", f"{TOWER}.{ours}.weight", bias=True)
    block = f"{theirs}.model.layers.{{j}}"
    for name, ours in (
        ("self_attn.q_proj", "attention.wq"), ("self_attn.k_proj", "attention.wk"),
        ("self_attn.v_proj", "attention.wv"), ("self_attn.o_proj", "attention.wo"), ("mlp.fc1", "feed_forward.w1"),
        ("mlp.fc2", "feed_forward.w2"), ("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm"),
    ):  # fmt: skip
        yield row(f"{block}.{name}.weight", f"{LAYER}.{ours}.weight", bias=True)
    for name in ("fc1", "fc2"):
        yield row(f"{theirs}.vision_adapter.mlp.{name}.weight", f"{TOWER}.adapter.{name}.weight")
    yield row("multi_modal_projector.linear_1.weight", PROJECTION)


def meta_rows() -> Iterator[Row]:
    """As Meta's files have it, cut as Meta cuts: column-parallel matrices on their rows, row-parallel on columns."""
    theirs = f"{TOWER}.vision_encoder"
    yield row(f"{theirs}.conv1._linear.weight", f"{TOWER}.patch.weight", cut=0)
    yield row(f"{theirs}.class_embedding", f"{TOWER}.class_embedding")
    yield row(f"{theirs}.positional_embedding_vlm", f"{TOWER}.pos_embedding")
    for name, ours in (("ln_pre", "norm_pre"), ("ln_post", "norm")):
        yield row(f"{theirs}.{name}.weight", f"{TOWER}.{ours}.weight", bias=True)
    block = f"{theirs}.transformer.resblocks.{{j}}"
    for name, ours in (
        ("attn.wq", "attention.wq"), ("attn.wk", "attention.wk"), ("attn.wv", "attention.wv"),
        ("attn.wo", "attention.wo"), ("mlp.c_fc", "feed_forward.w1"), ("mlp.c_proj", "feed_forward.w2"),
        ("ln_1", "attention_norm"), ("ln_2", "ffn_norm"),
    ):  # fmt: skip
        yield row(f"{block}.{name}.weight", f"{LAYER}.{ours}.weight", bias=True)
    for name, ours, cut in (("c_fc", "fc1", 0), ("c_proj", "fc2", 1)):
        yield row(f"{TOWER}.vision_adapter.mlp.{name}.weight", f"{TOWER}.adapter.{ours}.weight", cut=cut)
    yield row(PROJECTION, PROJECTION, cut=0)


def between_patches(table: Tensor) -> Tensor:
    """Positions from before they were resampled (G^2 + 1, D), the class token's first, as Meta's load hook resamples
    them: on a grid half a patch before each, so that a row is the mean of four neighbours, of zeros outside."""
    first, patches = table[0].float(), table[1:].float()
    side = round(len(patches) ** 0.5)
    grid = pad(patches.unflatten(0, (side, side)), (0, 0, 1, 0, 1, 0))
    mean = (grid[:-1, :-1] + grid[:-1, 1:] + grid[1:, :-1] + grid[1:, 1:]) / 4
    return torch.cat([mean.flatten(0, 1), first[None]])


RESAMPLED = Computed(
    f"{TOWER}.vision_encoder.positional_embedding_vlm",
    f"{TOWER}.vision_encoder.positional_embedding",
    between_patches,
)

DEFAULTS: dict[str, Any] = {
    "hidden_size": 768, "num_hidden_layers": 34, "num_attention_heads": 16, "intermediate_size": 5632,
    "vision_output_dim": 7680, "image_size": 448, "patch_size": 14, "norm_eps": 1e-5, "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 4096, "projector_output_dim": 4096, "num_channels": 3,
}  # fmt: skip
"""What transformers takes for keys that a vision_config leaves out."""
FIXED: dict[str, Any] = {
    "num_channels": 3, "hidden_act": "gelu", "norm_eps": 1e-5, "multi_modal_projector_bias": False,
    "vision_feature_select_strategy": "default",
}  # fmt: skip
"""Keys of a vision_config that transformers' own model takes to be so whatever they say, or has no weights for."""


def read_hf(config: hf.Config, warn: Warn) -> dict[str, Any]:
    """`vision_config` as keys of VisionArgs. UserError naming a key that the tower cannot follow."""
    stated = config.get("vision_config") or {}
    vision = hf.filled(stated, DEFAULTS)
    for key in sorted(DEFAULTS.keys() - stated.keys() - {"norm_eps", "num_channels", "pixel_shuffle_ratio"}):
        warn(f"config.json: vision_config.{key} is missing, taken as {DEFAULTS[key]}, the default of transformers")
    for key, value in FIXED.items():
        if vision.get(key, value) != value:
            raise UserError(f"config.json: vision_config.{key}={vision[key]} is not supported; only {value} is")
    for key in ("attention_dropout", "projector_dropout"):
        if vision.get(key):
            warn(f"config.json: vision_config.{key}={vision[key]} is not taken: the tower has no dropout")
    dim, output, ratio = vision["hidden_size"], vision["vision_output_dim"], vision["pixel_shuffle_ratio"]
    for key in ("projector_input_dim", "projector_output_dim"):
        if vision[key] != output:
            raise UserError(f"config.json: vision_config.{key}={vision[key]} is not vision_output_dim, {output}")
    if vision["intermediate_size"] != round(dim / ratio**2):  # which the adapter reads by the same key
        raise UserError(
            f"config.json: vision_config.intermediate_size={vision['intermediate_size']} is not hidden_size over the "
            f"square of pixel_shuffle_ratio, {round(dim / ratio**2)}, which the adapter reads"
        )
    rope = hf.one_spelling(vision.get("rope_parameters"))
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"config.json: vision_config.rope_parameters.rope_type={rope['rope_type']}: only default is")
    theta = hf.one_of({"a": rope.get("rope_theta"), "b": vision.get("rope_theta")}, ("a", "b"), warn)
    return {
        "image_size": _square(vision["image_size"], "config.json: vision_config.image_size"),
        "patch_size": _square(vision["patch_size"], "config.json: vision_config.patch_size"),
        "dim": dim,
        "n_layers": vision["num_hidden_layers"],
        "n_heads": vision["num_attention_heads"],
        "mlp_ratio": vision["intermediate_size"] / dim,
        "output_dim": output,
        "pixel_shuffle_ratio": ratio,
        "rope_theta": float(theta or 1e4),
        "patch_token_id": config.get("image_token_index", config.get("image_token_id", 200092)),
    }


def write_hf(args: ModelArgs) -> dict[str, Any]:
    """vision_config, and the keys beside it."""
    vision = args.vision
    assert vision is not None
    return {
        "image_token_index": vision.patch_token_id,
        "vision_config": {
            "model_type": "llama4_vision_model",
            "hidden_size": vision.dim,
            "hidden_act": "gelu",
            "num_hidden_layers": vision.n_layers,
            "num_attention_heads": vision.n_heads,
            "num_channels": 3,
            "intermediate_size": vision.ffn_width,
            "vision_output_dim": vision.output_dim,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "norm_eps": vision.norm_eps,
            "vision_feature_select_strategy": "default",
            "initializer_range": args.init_std,
            "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
            "projector_input_dim": vision.output_dim,
            "projector_output_dim": vision.output_dim,
            "multi_modal_projector_bias": False,
            "projector_dropout": 0.0,
            "attention_dropout": 0.0,
            "rope_parameters": {"rope_theta": vision.rope_theta, "rope_type": "default"},
            "rope_theta": vision.rope_theta,
        },
    }


META_KEYS = ("dim", "n_layers", "n_heads", "mlp_ratio", "output_dim", "pixel_shuffle_ratio")


def read_meta(config: hf.Config) -> dict[str, Any] | None:
    """`vision_args` of params.json as keys of VisionArgs, without the id of its slots, which only the tokenizer has."""
    stated = config.get("vision_args")
    if not stated:
        return None
    sides = {key: _square(stated[key], f"params.json: vision_args.{key}") for key in ("image_size", "patch_size")}
    return sides | {key: stated[key] for key in META_KEYS}


def write_meta(args: ModelArgs) -> dict[str, Any]:
    """vision_args of params.json."""
    vision = args.vision
    assert vision is not None
    sides = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    sizes = {key: {"height": side, "width": side} for key, side in sides.items()}
    return sizes | {key: getattr(vision, key) for key in META_KEYS}


def _square(size: Any, key: str) -> int:
    """A number, or a pair or mapping of two equal ones."""
    sides = list(size.values() if isinstance(size, Mapping) else size if isinstance(size, list | tuple) else [size])
    if len(set(sides)) != 1 or not isinstance(sides[0], int):
        raise UserError(f"{key}={size} is not square; only squares are read")
    return sides[0]
