"""Miniformer's public names over `LLM`, the one trainer and the project's data: docs/siblings/miniformer.md goes
through them one by one.

    python -m llm.siblings.miniformer --train_path train.jsonl --task language_modeling ...
"""

from llm.siblings.miniformer_config import TransformerConfig
from llm.siblings.miniformer_model import Transformer

__all__ = ["Transformer", "TransformerConfig"]
