"""Tokenizers, their public face; llm/tokenizers/ holds what stands behind it.

`load_tokenizer(TokenizerConfig(kind=..., path=...))` opens one of any kind, `train_sentencepiece` makes one.
"""

from llm.tokenizers.base import Tokenizer, TokenizerConfig, TokenizerKind
from llm.tokenizers.load import load_tokenizer
from llm.tokenizers.sentencepiece import SentencePieceTokenizer
from llm.tokenizers.simple import ByteTokenizer, CharacterTokenizer
from llm.tokenizers.smiles import SmilesTokenizer, smiles_vocabulary
from llm.tokenizers.train import alphabet, train_sentencepiece

__all__ = [
    "ByteTokenizer",
    "CharacterTokenizer",
    "SentencePieceTokenizer",
    "SmilesTokenizer",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerKind",
    "alphabet",
    "load_tokenizer",
    "smiles_vocabulary",
    "train_sentencepiece",
]
