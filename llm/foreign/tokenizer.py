"""The tokenizer of a foreign folder, as a TokenizerConfig of ours."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm.errors import UserError
from llm.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer


def foreign_tokenizer(path: Path) -> tuple[Tokenizer, TokenizerConfig]:
    """The tokenizer in a foreign folder and its config, whose path is relative to the folder. One that changes text is
    taken where there is no other (`lossy` in the config). UserError when there is none that can be used.
    """
    reasons = []
    for config in _candidates(path):
        try:
            return load_tokenizer(config, base=path), config
        except UserError as error:
            reasons.append(str(error))
    none = f"{path}: holds no tokenizer.json or tokenizer.model, so text cannot be read or written"
    raise UserError(reasons[0] if reasons else none)


def _candidates(path: Path) -> Iterator[TokenizerConfig]:
    found = []
    if (path / "tokenizer.json").is_file():
        bos, eos = (_named(path, key) for key in ("bos_token", "eos_token"))
        found.append(TokenizerConfig(kind="hf", path="tokenizer.json", bos=bos or eos, eos=eos))
    if (model := path / "tokenizer.model").is_file():
        found.append(TokenizerConfig(kind="tiktoken" if _holds_ranks(model) else "sentencepiece", path=model.name))
    yield from found
    yield from (config.model_copy(update={"lossy": True}) for config in found if config.kind != "tiktoken")


def _holds_ranks(file: Path) -> bool:
    """Whether it is a text file of base64 and ranks, not a SentencePiece model."""
    with open(file, "rb") as opened:
        first = opened.readline(4096).split()
    return len(first) == 2 and first[1].isdigit()


def _named(path: Path, key: str) -> str | None:
    """The name of a special token: as tokenizer_config.json has it, else by the id in config.json or
    generation_config.json."""
    told = _json(path / "tokenizer_config.json").get(key)
    if isinstance(told, dict):
        told = told.get("content")
    added = {token.get("id"): token.get("content") for token in _json(path / "tokenizer.json").get("added_tokens", [])}
    if isinstance(told, str) and told in added.values():
        return told
    for name in ("config.json", "generation_config.json"):
        number = _json(path / name).get(f"{key}_id")
        number = number[0] if isinstance(number, list) and number else number
        if number in added:
            return str(added[number])
    return None


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
