"""A small random Llama 4 with vision, as transformers has it and as we do."""

from typing import Any

import torch
from torch import Tensor

from llm import LLM, ModelArgs
from tests.model.test_llama4 import common_name

VOCAB, PATCH = 61, 60
D, HEADS, KV, FFN, EXPERT, OUT = 32, 4, 2, 40, 24, 20
TOWER = {
    "vision_model.patch_embedding.linear": "vision_embeddings.patch",
    "vision_model.class_embedding": "vision_embeddings.class_embedding",
    "vision_model.positional_embedding_vlm": "vision_embeddings.pos_embedding",
    "vision_model.layernorm_pre": "vision_embeddings.norm_pre",
    "vision_model.layernorm_post": "vision_embeddings.norm",
    "vision_model.vision_adapter.mlp": "vision_embeddings.adapter",
    "vision_model.model.layers": "vision_embeddings.layers",
    "multi_modal_projector.linear_1": "vision_projection",
    "mlp.fc": "feed_forward.w",
}


def foreign(transformers: Any, vision: dict[str, Any], top_k: int, interleave: int) -> Any:
    """transformers' model; every 1-D weight is drawn, so that a norm or bias that is missing shows."""
    torch.manual_seed(0)
    text = dict(
        vocab_size=VOCAB, hidden_size=D, num_hidden_layers=2, num_attention_heads=HEADS, num_key_value_heads=KV,
        head_dim=D // HEADS, intermediate_size=EXPERT, intermediate_size_mlp=FFN, num_local_experts=4,
        num_experts_per_tok=top_k, interleave_moe_layer_step=interleave, attention_chunk_size=16,
        no_rope_layers=[1, 0], attn_temperature_tuning=True, floor_scale=4, attn_scale=0.3, use_qk_norm=True,
        rms_norm_eps=1e-5, initializer_range=0.1, tie_word_embeddings=False, pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )  # fmt: skip
    side = round(1 / vision["pixel_shuffle_ratio"])
    tower = dict(
        hidden_size=vision["dim"], image_size=vision["image_size"], patch_size=vision["patch_size"],
        num_hidden_layers=vision["n_layers"], num_attention_heads=vision["n_heads"],
        intermediate_size=side**2 * vision["dim"], vision_output_dim=OUT, projector_input_dim=OUT,
        projector_output_dim=OUT, pixel_shuffle_ratio=vision["pixel_shuffle_ratio"], initializer_range=0.1,
    )  # fmt: skip
    config = transformers.Llama4Config(text_config=text, vision_config=tower, image_token_index=PATCH)
    model = transformers.Llama4ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.empty_like(parameter).uniform_(0.5, 1.5))
    return model


def args(vision: dict[str, Any], top_k: int, interleave: int) -> ModelArgs:
    mlp_ratio = round(1 / vision["pixel_shuffle_ratio"]) ** 2
    return ModelArgs(
        dim=D, n_layers=2, n_heads=HEADS, n_kv_heads=KV, vocab_size=VOCAB, ffn_hidden=FFN, qk_norm="l2",
        nope_layer_interval=2, attention_chunk_size=16, attn_temperature_tuning=True, floor_scale=4, attn_scale=0.3,
        moe={"n_experts": 4, "top_k": top_k, "hidden": EXPERT, "interleave": interleave},
        vision=vision | {"output_dim": OUT, "mlp_ratio": mlp_ratio, "patch_token_id": PATCH},
    )  # fmt: skip


def named_as_ours(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights or gradients of transformers' model."""
    found = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("language_model.")
        for theirs, mine in TOWER.items():
            name = name.replace(theirs, mine)
        if name.endswith("experts.gate_up_proj"):
            stem = common_name(name).removesuffix("gate_up_proj")
            found[stem + "w1"], found[stem + "w3"] = tensor.chunk(2, dim=-1)
            continue
        for part, own in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            for place in ("feed_forward", "shared_expert", "experts"):
                name = name.replace(f"{place}.{part}_proj", f"{place}.{own}")
        found[common_name(name)] = tensor
    return found


def ours(theirs: Any, vision: dict[str, Any], top_k: int, interleave: int) -> LLM:
    model = LLM(args(vision, top_k, interleave))
    model.load_state_dict(named_as_ours(theirs.state_dict()))
    return model


def row(length: int, *tiles: int, slots: int, seed: int = 0) -> Tensor:
    """Tokens (length,) with images of so many tiles each, between stretches of text."""
    ids = torch.randint(0, PATCH, (length,), generator=torch.Generator().manual_seed(seed))
    first = 1
    for n in tiles:
        ids[first : first + n * slots] = PATCH
        first += n * slots + 2
    assert first <= length
    return ids


def pictures(n: int, side: int, seed: int = 5) -> Tensor:
    """uint8 tiles (n, 3, side, side)."""
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
