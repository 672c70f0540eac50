"""Miniformer's public names over `LLM`, the one trainer and the project's data: docs/siblings/miniformer.md goes
through them one by one.

    python -m llm.siblings.miniformer --train_path train.jsonl --task language_modeling ...
"""

from llm.siblings.miniformer_config import TransformerConfig
from llm.siblings.miniformer_layers import DecoderLayer, EncoderLayer, FeedForward, MultiHeadAttention
from llm.siblings.miniformer_model import Transformer
from llm.siblings.miniformer_seq2seq import Seq2SeqTransformer
from llm.siblings.miniformer_train import TrainConfig, run_config

__all__ = [
    "DecoderLayer", "EncoderLayer", "FeedForward", "MultiHeadAttention", "Seq2SeqTransformer", "TrainConfig",
    "Transformer", "TransformerConfig", "run_config",
]  # fmt: skip

if __name__ == "__main__":
    from llm.parallel.launch import process
    from llm.siblings.miniformer_command import main

    process.run(main)
