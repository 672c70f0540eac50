"""The content of a tokenizer.json, made from tokenizers in other forms: by it the tokenizers library gives their ids.

SentencePiece models are written with spaces as spaces, not as U+2581 as they themselves write them: so U+2581 in a text
becomes its three byte pieces, as it does here, and is not taken for a space.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from llm.errors import UserError
from llm.tokenizers.base import META_SPACE
from llm.tokenizers.sentencepiece_model import BPE, BYTE, NORMAL, UNIGRAM, USER_DEFINED, SentencePieceModel

Component = dict[str, Any]
"""A part of a tokenizer.json (its normalizer, its model, ...), or all of it."""
PREFIXED = rf"\A(?=[^{META_SPACE}])"
"""Where a space is put: before a text, but none before U+2581, which is no piece."""
BEYOND_TEXT = -1e6
"""Score of pieces that no text may become: below that of every other way to write it."""


def sentencepiece_document(model: SentencePieceModel) -> Component:
    """The tokenizer.json of a SentencePiece model. UserError for kinds of models that the format does not have."""
    if model.model_type == BPE:
        vocab = {_spelled(text, kind): number for number, (text, _, kind) in enumerate(model.pieces)}
        ranked = sorted((p for p in model.pieces if p[2] == NORMAL), key=lambda piece: -piece[1])
        normal = {_spelled(text, kind): rank for rank, (text, _, kind) in enumerate(ranked)}
        document = document_of(tokenizers.Tokenizer(models.BPE(byte_fallback=model.byte_fallback)))
        document["model"] |= {"vocab": vocab, "merges": merges_of(normal)}
    elif model.model_type == UNIGRAM:
        scored = [
            (_spelled(text, kind), score if kind in (NORMAL, USER_DEFINED) else BEYOND_TEXT)
            for text, score, kind in model.pieces
        ]
        unigram = models.Unigram(scored, unk_id=model.marks["unk"][1], byte_fallback=model.byte_fallback)
        document = document_of(tokenizers.Tokenizer(unigram))
        if alone := _characters_alone(model):
            escaped = "".join(f"\\x{{{ord(character):x}}}" for character in sorted(alone))
            shell = tokenizers.Tokenizer(models.BPE())
            shell.pre_tokenizer = pre_tokenizers.Split(Regex(f"[{escaped}]"), behavior="isolated")
            document["pre_tokenizer"] = document_of(shell)["pre_tokenizer"]
    else:
        raise UserError("a SentencePiece model that is neither bpe nor unigram has no tokenizer.json")
    shell = tokenizers.Tokenizer(models.BPE())
    before: list[normalizers.Normalizer] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    before += [normalizers.Replace(Regex(PREFIXED), " ")] if model.adds_prefix else []
    after: list[decoders.Decoder] = [decoders.ByteFallback(), decoders.Fuse()]
    after += [decoders.Strip(content=" ", left=1)] if model.adds_prefix else []
    if before:
        shell.normalizer = normalizers.Sequence(before)
    shell.decoder = decoders.Sequence(after)
    parts = document_of(shell)
    own = [
        {"id": number, **added(_spelled(text, kind), special=kind != USER_DEFINED)}
        for number, (text, _, kind) in enumerate(model.pieces)
        if kind not in (NORMAL, BYTE)
    ]
    return {**document, "normalizer": parts["normalizer"], "decoder": parts["decoder"], "added_tokens": own}


def _spelled(text: str, kind: int) -> str:
    return text.replace(META_SPACE, " ") if kind in (NORMAL, USER_DEFINED) else text


def _characters_alone(model: SentencePieceModel) -> set[str]:
    """For each piece that no text may become, a character of its that no other piece has, if there is one: cutting the
    text there changes nothing else. Where there is none, its score keeps it away.
    """
    used = {character for text, _, kind in model.pieces if kind in (NORMAL, USER_DEFINED) for character in text}
    found: set[str] = set()
    for text, _, kind in model.pieces:
        unused = [character for character in text if character not in used]
        if kind not in (NORMAL, USER_DEFINED) and unused and not found & set(unused):
            found.add(unused[0])
    return found


def bytes_document() -> Component:
    """The tokenizer.json of UTF-8 bytes as ids 0..255."""
    shell = tokenizers.Tokenizer(models.BPE())
    shell.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    shell.decoder = decoders.ByteLevel()
    document = document_of(shell)
    document["model"]["vocab"] = {character: byte for byte, character in enumerate(CHARACTER_OF_BYTE)}
    return document


def characters_document(characters: str) -> Component:
    """The tokenizer.json of an alphabet; the library, too, refuses a character outside it."""
    shell = tokenizers.Tokenizer(models.WordLevel({character: i for i, character in enumerate(characters)}, "<unk>"))
    shell.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    shell.decoder = decoders.Fuse()
    return document_of(shell)


def pattern_document(tokens: Sequence[str], pattern: str, unknown: str | None) -> Component:
    """The tokenizer.json of whole tokens, whose ids are their places, that `pattern` cuts a text into; a character that
    it leaves is a piece by itself. unknown: the token of all other pieces; with None the library refuses them too.
    """
    ids = {token: number for number, token in enumerate(tokens)}
    missing = "none" if unknown is None else unknown  # a name that is no token: the library then finds no id
    while unknown is None and missing in ids:
        missing += "_"
    shell = tokenizers.Tokenizer(models.WordLevel(ids, missing))
    shell.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{pattern}|[\s\S]"), behavior="isolated")
    shell.decoder = decoders.Fuse()
    return document_of(shell)


def ranks_document(ranks: Mapping[bytes, int], pattern: str, special: Iterable[str]) -> Component:
    """The tokenizer.json of tiktoken ranks: the same ids as tiktoken's for words that are no rank themselves too."""
    shell = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    shell.pre_tokenizer, shell.decoder = pre_tokenizers.Sequence([split, byte_level]), decoders.ByteLevel()
    document = document_of(shell)
    name_of = {token: "".join(CHARACTER_OF_BYTE[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in ranks.items():
        found = []
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in ranks and right in ranks:
                found.append((ranks[left], ranks[right], name_of[left], name_of[right]))
        merges += [(rank, i, left, right) for i, (_, _, left, right) in enumerate(sorted(found))]
    document["model"] |= {
        "ignore_merges": True,
        "vocab": {name_of[token]: rank for token, rank in ranks.items()},
        "merges": [[left, right] for _, _, left, right in sorted(merges)],
    }
    document["post_processor"] = {
        "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True
    }  # fmt: skip
    document["added_tokens"] = [{"id": len(ranks) + i, **added(name)} for i, name in enumerate(special)]
    return document


def template(before: list[str], after: list[str], ids: Mapping[str, int]) -> Component | None:
    """A post-processor that puts the tokens `before` and `after` around every text; None where there are none."""
    if not before and not after:
        return None

    def sequence(letter: str, kind: int) -> list[Component]:
        special = [[{"SpecialToken": {"id": name, "type_id": kind}} for name in names] for names in (before, after)]
        return [*special[0], {"Sequence": {"id": letter, "type_id": kind}}, *special[1]]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in ids},
    }


def adds_prefix(document: Component) -> bool:
    """Whether a space is put before a text that has none."""
    found = json.dumps([document.get("normalizer"), document.get("pre_tokenizer")], ensure_ascii=False)
    if json.dumps(PREFIXED, ensure_ascii=False) in found:
        return True
    return '"Prepend"' in found or ('"Metaspace"' in found and '"prepend_scheme": "never"' not in found)


def merges_of(vocab: Mapping[str, int]) -> list[list[str]]:
    """The merges that the order of a vocabulary stands for: every way to cut a piece into two others."""
    found = []
    for piece, rank in vocab.items():
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in vocab and right in vocab:
                found.append((rank, len(left), vocab[left], vocab[right], left, right))
    return [[left, right] for _, _, _, _, left, right in sorted(found)]


def added(content: str, special: bool = True, normalized: bool = False) -> Component:
    """An entry of added_tokens without its id."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": normalized, "special": special}
    return {"content": content, **flags}


def document_of(tokenizer: tokenizers.Tokenizer) -> Component:
    """The content of a tokenizer's file."""
    found: Component = json.loads(tokenizer.to_str())
    return found


def _byte_characters() -> list[str]:
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]


CHARACTER_OF_BYTE = _byte_characters()
"""How GPT-2 writes each byte as a visible character."""
