"""A tokenizer of ours as the files from which AutoTokenizer makes the same one: a tokenizer.json with the begin mark in
its post-processor, and a tokenizer_config.json that names no class which would build its own around the vocabulary.
"""

import json
from dataclasses import dataclass
from typing import Any

import tokenizers

from llm.errors import UserError
from llm.tokenizers.base import Tokenizer
from llm.tokenizers.check import check_texts
from llm.tokenizers.extended import ExtendedTokenizer
from llm.tokenizers.folder import FolderTokenizer
from llm.tokenizers.huggingface import HFTokenizer
from llm.tokenizers.sentencepiece import SentencePieceTokenizer
from llm.tokenizers.sentencepiece_model import read_sentencepiece
from llm.tokenizers.simple import ByteTokenizer, CharacterTokenizer
from llm.tokenizers.smiles import SmilesTokenizer
from llm.tokenizers.tiktoken import TiktokenTokenizer
from llm.tokenizers.tokenizer_json import (
    Component,
    added,
    bytes_document,
    characters_document,
    pattern_document,
    sentencepiece_document,
    template,
)

TRIED = 300
"""Texts on which the written tokenizer is compared with ours before anybody reads it."""
UNIGRAM = (
    "its tokenizer is a unigram model, whose scores SentencePiece adds in float32 and transformers in float64: where "
    "two ways to cut a word are equally good, as in a run of line ends, the ids may differ"
)


@dataclass(frozen=True)
class TokenizerExport:
    """files: content by name, generation_config.json among them. config: keys of config.json. notes: what is not the
    same."""

    files: dict[str, bytes]
    config: dict[str, Any]
    notes: list[str]


def export_tokenizer(tokenizer: Tokenizer, finds_control: bool = False) -> TokenizerExport:
    """The files of a tokenizer. finds_control: control tokens that a text spells are found in any case, as those that a
    chat template writes must be. UserError where it has no such form."""
    document, splits = _document(tokenizer)
    splits = splits and not finds_control
    base = tokenizer.inner if isinstance(tokenizer, ExtendedTokenizer) else tokenizer
    name_of = {token["id"]: token["content"] for token in document["added_tokens"]}
    if not isinstance(base, FolderTokenizer) or base.document() is None:
        before = [name_of[number] for number in tokenizer.begin_ids]
        ids = {name: number for number, name in name_of.items() if name in before}
        document["post_processor"] = template(before, [], ids)
    marks = {"bos_token": name_of.get(tokenizer.bos_id), "eos_token": name_of.get(tokenizer.eos_id)}
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    own = base.marks if isinstance(base, FolderTokenizer) else {}
    if isinstance(base, FolderTokenizer):
        settings |= base.kept_settings()
    named = {key: name for key, name in {**own, **marks}.items() if name in set(name_of.values())}
    settings |= {**named, "split_special_tokens": splits}
    ends = list(tokenizer.end_ids)
    config: dict[str, Any] = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends if len(ends) > 1 else ends[0]}
    pad = next((number for number, name in name_of.items() if name == named.get("pad_token")), None)
    if pad is not None:
        config["pad_token_id"] = pad
    files = {
        "tokenizer.json": json.dumps(document, ensure_ascii=False).encode() + b"\n",
        "tokenizer_config.json": _json(settings),
        "special_tokens_map.json": _json(named),
        "generation_config.json": _json(config),
    }
    notes = [UNIGRAM] if document["model"].get("type") == "Unigram" else []
    return TokenizerExport(files, config, notes + _differences(tokenizer, document, splits))


def _document(tokenizer: Tokenizer) -> tuple[Component, bool]:
    """The tokenizer.json, but for the begin mark, and whether a prompt that spells special tokens is text: it is where
    they are only the marks around documents."""
    if isinstance(tokenizer, ExtendedTokenizer):
        inner, _ = _document(tokenizer.inner)
        more = [{"id": number, **added(name)} for name, number in tokenizer.added.items()]
        return {**inner, "added_tokens": [*inner["added_tokens"], *more]}, False
    if isinstance(tokenizer, FolderTokenizer):
        document, splits = tokenizer.document(), tokenizer.splits_special
        if document is None:
            document = _document(tokenizer.inner)[0]
            taken = {token["id"] for token in document["added_tokens"]}
            more = [{"id": i, **entry} for i, entry in tokenizer.added.items() if i not in taken]
            document["added_tokens"] += more
        return _with_special(document, ()), splits
    if isinstance(tokenizer, HFTokenizer):
        return _with_special(tokenizer.document(), (tokenizer.bos, tokenizer.eos)), False
    if isinstance(tokenizer, TiktokenTokenizer):
        return tokenizer.document(), False
    if isinstance(tokenizer, SentencePieceTokenizer):
        return sentencepiece_document(read_sentencepiece(tokenizer.serialized())), True
    if isinstance(tokenizer, SmilesTokenizer):
        return _smiles_document(tokenizer), True
    if isinstance(tokenizer, ByteTokenizer):
        document = bytes_document()
    elif isinstance(tokenizer, CharacterTokenizer):
        document = characters_document(tokenizer.characters)
    else:
        raise UserError(f"its tokenizer, of kind {tokenizer.kind}, has no form that transformers reads")
    marks = ((tokenizer.bos_id, "<s>"), (tokenizer.eos_id, "</s>"))
    document["added_tokens"] = [{"id": number, **added(name)} for number, name in marks]
    return document, True


def _smiles_document(tokenizer: SmilesTokenizer) -> Component:
    unknown = tokenizer.tokens[tokenizer.unk_id] if tokenizer.lossy else None
    document = pattern_document(tokenizer.tokens, tokenizer.pattern, unknown)
    control = sorted((number, name) for name, number in tokenizer.control_tokens.items())
    return {**document, "added_tokens": [{"id": number, **added(name)} for number, name in control]}


def _with_special(document: Component, marks: tuple[str, ...]) -> Component:
    listed = [{**token, "special": token["special"] or token["content"] in marks} for token in document["added_tokens"]]
    return {**document, "added_tokens": listed, "truncation": None, "padding": None}


def _differences(tokenizer: Tokenizer, document: Component, splits: bool) -> list[str]:
    """A note where the library makes other ids of some text by the document."""
    library = tokenizers.Tokenizer.from_str(json.dumps(document))
    library.encode_special_tokens = splits
    parted, tried = [], 0
    for text in check_texts(TRIED, [token["content"] for token in document["added_tokens"][:50]]):
        try:
            mine = tokenizer.prompt_ids(text)
        except UserError:
            continue
        tried += 1
        theirs = library.encode(text).ids
        if mine != theirs and (theirs or text):
            parted.append((text, mine, theirs))
    if not parted:
        return []
    text, mine, theirs = parted[0]
    return [
        f"transformers will read {len(parted)} of {tried} texts that were tried into other ids than this model's "
        f"tokenizer, {text[:40]!r} for one into {theirs[:8]}, not {mine[:8]}"
    ]


def exported_as_it_came(tokenizer: Tokenizer | None, files: dict[str, Any], family: str) -> bool:
    """Whether the tokenizer files that came with a model say the same beside a config of `family`: transformers looks
    at model_type, and guesses where there is no tokenizer.json."""
    if not isinstance(tokenizer, FolderTokenizer):
        return tokenizer is None or ("tokenizer.json" in files and "tokenizer_config.json" in files)
    return "tokenizer.json" in files and tokenizer.model_type == family


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"
