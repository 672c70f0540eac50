"""The tokenizer that a config names, in a file or a folder."""

from pathlib import Path

from llm.tokenizers.base import Tokenizer, TokenizerConfig
from llm.tokenizers.extended import ExtendedTokenizer
from llm.tokenizers.files import open_file


def load_tokenizer(config: TokenizerConfig, base: Path | None = None) -> Tokenizer:
    """Open the tokenizer of a config; a relative path starts at `base` (default: the working directory). UserError
    names what is wrong with the file.

    The packages tiktoken and tokenizers are imported by the first tokenizer that needs them.
    """
    found = _without_added(config, base)
    return ExtendedTokenizer(found, config.added_tokens) if config.added_tokens else found


def _without_added(config: TokenizerConfig, base: Path | None) -> Tokenizer:
    if config.kind == "hf" and config.path is not None and (path := Path(base or ".") / config.path).is_dir():
        from llm.tokenizers.folder import folder_tokenizer  # it imports the package tokenizers

        return folder_tokenizer(path, config)
    return open_file(config, base)
