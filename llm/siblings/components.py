"""Transformer Components' public names over `LLM`: docs/siblings/components.md goes through them one by one.

Thin adapters: the layers are the project's own. New here are the names of arguments, and a cache that the models keep
between calls because the document's API has no other place for it: in evaluation mode alone, and so not for several
threads at once.
"""

from llm.siblings.components_config import FFNConfig
from llm.siblings.components_functions import PositionalEncoding, create_causal_mask, scaled_dot_product_attention
from llm.siblings.components_layers import (
    MOE,
    FeedForward,
    GroupQueryAttention,
    MultiHeadAttention,
    MultiQueryAttention,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
    get_attention,
)
from llm.siblings.components_models import AutoregressiveTransformerModel, EncoderDecoder, TransformerModel

__all__ = [
    "MOE", "AutoregressiveTransformerModel", "EncoderDecoder", "FFNConfig", "FeedForward", "GroupQueryAttention",
    "MultiHeadAttention", "MultiQueryAttention", "PositionalEncoding", "TransformerDecoderLayer",
    "TransformerEncoderLayer", "TransformerModel", "create_causal_mask", "get_attention",
    "scaled_dot_product_attention",
]  # fmt: skip
