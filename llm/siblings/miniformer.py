"""Miniformer's public names over `LLM`, the one trainer and the project's data: docs/siblings/miniformer.md goes
through them one by one.

    python -m llm.siblings.miniformer --train_path train.jsonl --task language_modeling ...
"""

from typing import Any

from llm.siblings.miniformer_config import TransformerConfig
from llm.siblings.miniformer_data import JSONLinesDataset
from llm.siblings.miniformer_layers import DecoderLayer, EncoderLayer, FeedForward, MultiHeadAttention
from llm.siblings.miniformer_model import Transformer
from llm.siblings.miniformer_seq2seq import Seq2SeqTransformer
from llm.siblings.miniformer_train import TrainConfig, run_config

__all__ = [
    "DecoderLayer", "EncoderLayer", "FeedForward", "JSONLinesDataset", "MultiHeadAttention", "Seq2SeqTransformer",
    "TrainConfig", "Transformer", "TransformerConfig", "run_config",
]  # fmt: skip
OF_LIGHTNING = ("MiniFormerDataModule", "MiniFormerLitModule", "SafetensorsIO", "lightning_trainer")
"""What is there, too, where the package lightning is."""


def __getattr__(name: str) -> Any:
    if name not in OF_LIGHTNING:
        raise AttributeError(f"module {__name__} has no {name}")
    try:
        from llm.siblings import miniformer_lightning  # it imports the package
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lightning":
            raise
        message = f'{name} needs the package lightning, which is not installed: pip install "lattice-llm[lightning]"'
        raise ImportError(message) from None
    return getattr(miniformer_lightning, name)


if __name__ == "__main__":
    from llm.parallel.launch import process
    from llm.siblings.miniformer_command import main

    process.run(main)
