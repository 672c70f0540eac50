"""The tokenizer in a file, of every kind that is one file.

The packages tiktoken and tokenizers are imported by the first tokenizer that needs them.
"""

from pathlib import Path

from llm.errors import UserError
from llm.shipped import made_by
from llm.tokenizers.base import Tokenizer, TokenizerConfig, where_from
from llm.tokenizers.none import NoText
from llm.tokenizers.sentencepiece import SentencePieceTokenizer
from llm.tokenizers.simple import ByteTokenizer, CharacterTokenizer, read_characters
from llm.tokenizers.smiles import SmilesTokenizer, read_smiles_vocabulary


def open_file(config: TokenizerConfig, base: Path | None = None) -> Tokenizer:
    """`llm.tokenizer.load_tokenizer` for a config whose path is no folder."""
    if config.kind == "none":
        return NoText()
    if config.path is None:
        return ByteTokenizer()
    path = Path(base or ".") / config.path
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"tokenizer.path={config.path}: cannot read {path} ({error.strerror})"
            f"{made_by(path) or where_from(config.kind)}"
        ) from None
    if config.kind == "tiktoken":
        from llm.tokenizers.tiktoken import TiktokenTokenizer

        return TiktokenTokenizer(content, config.variant, str(path))
    if config.kind == "hf":
        from llm.tokenizers.huggingface import HFTokenizer

        return HFTokenizer(content, config.bos, config.eos, str(path), config.lossy)
    if config.kind == "characters":
        return CharacterTokenizer(read_characters(content, path))
    if config.kind == "smiles":
        return SmilesTokenizer(read_smiles_vocabulary(content, path), config.lossy)
    return SentencePieceTokenizer(content, str(path), config.lossy)
