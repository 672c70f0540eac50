"""Tiny random models of Llama 4 with vision: as transformers builds them, and as Meta's files cut them by hand, which
shares nothing with llm/foreign."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.foreign.models import transformers

VOCAB, SLOT = 97, 90
TEXT: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=8,
    intermediate_size=40, intermediate_size_mlp=64, num_local_experts=2, attention_chunk_size=64, pad_token_id=0,
    interleave_moe_layer_step=2, no_rope_layer_interval=3, max_position_embeddings=256, initializer_range=0.1,
)  # fmt: skip
VISION: dict[str, Any] = dict(
    hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4,
    vision_output_dim=24, projector_input_dim=24, projector_output_dim=24, initializer_range=0.1,
)  # fmt: skip


def reference(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, seed: int = 0) -> nn.Module:
    """A model of transformers whose norms and biases are random too."""
    torch.manual_seed(seed)
    config = transformers.Llama4Config(
        text_config={**TEXT, **(text or {})},
        vision_config={**VISION, **(vision or {})},
        image_token_index=SLOT,
    )
    config._attn_implementation = "eager"
    model = transformers.Llama4ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def saved(folder: Path, **changes: Any) -> nn.Module:
    model = reference(**changes)
    model.save_pretrained(folder)
    return model


def row_of(per_tile: int, tiles: int, seed: int = 0) -> Tensor:
    """(T,): the slots of each tile, with text before, between and after."""
    noise = torch.Generator().manual_seed(seed)
    parts = [torch.randint(0, SLOT, (3,), generator=noise)]
    for _ in range(tiles):
        parts += [torch.full((per_tile,), SLOT), torch.randint(0, SLOT, (3,), generator=noise)]
    return torch.cat(parts)


def pixels(tiles: int, side: int = VISION["image_size"], seed: int = 0) -> Tensor:
    return torch.randn((tiles, 3, side, side), generator=torch.Generator().manual_seed(seed))


def meta_shards(weights: dict[str, Tensor], ranks: int, heads: int = 2) -> list[dict[str, Tensor]]:
    """The tower in parts of tensor-parallel ranks, from tensors by Hugging Face's names."""
    names = {
        "patch_embedding.linear.weight": ("vision_encoder.conv1._linear.weight", 0),
        "class_embedding": ("vision_encoder.class_embedding", None),
        "positional_embedding_vlm": ("vision_encoder.positional_embedding_vlm", None),
        "layernorm_pre.": ("vision_encoder.ln_pre.", None),
        "layernorm_post.": ("vision_encoder.ln_post.", None),
        "vision_adapter.mlp.fc1.": ("vision_adapter.mlp.c_fc.", 0),
        "vision_adapter.mlp.fc2.": ("vision_adapter.mlp.c_proj.", 1),
    }
    inside = {
        "self_attn.q_proj": ("attn.wq", 0), "self_attn.k_proj": ("attn.wk", 0), "self_attn.v_proj": ("attn.wv", 0),
        "self_attn.o_proj": ("attn.wo", 1), "mlp.fc1": ("mlp.c_fc", 0), "mlp.fc2": ("mlp.c_proj", 1),
        "input_layernorm": ("ln_1", None), "post_attention_layernorm": ("ln_2", None),
    }  # fmt: skip
    shards: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for key, weight in weights.items():
        if key == "multi_modal_projector.linear_1.weight":
            name, dim = "vision_projection.weight", 0
        elif key.startswith("vision_model.model.layers."):
            layer, _, rest = key.removeprefix("vision_model.model.layers.").partition(".")
            module, _, kind = rest.rpartition(".")
            short, dim = inside[module]
            if kind == "bias" and dim == 1:  # of what sums over ranks
                dim = None
            name = f"vision_embeddings.vision_encoder.transformer.resblocks.{layer}.{short}.{kind}"
        elif key.startswith("vision_model."):
            rest = key.removeprefix("vision_model.")
            old, (new, dim) = next((old, new) for old, new in names.items() if rest.startswith(old))
            name = f"vision_embeddings.{rest.replace(old, new)}"
        else:
            continue
        for rank, shard in enumerate(shards):
            shard[name] = (weight if dim is None else weight.chunk(ranks, dim)[rank]).clone()
    return shards
