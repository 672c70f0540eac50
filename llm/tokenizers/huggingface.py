"""Hugging Face's tokenizer.json; lossless ones are byte-level BPE (GPT-2, Llama 3, ...).

A tokenizer.json is a chain normalizer -> pre-tokenizer -> model, and most things that can stand in it change or drop
characters. So the chain is compared with lists of what is known to keep every byte, and refused with the reason
otherwise; a few texts that were tried would prove little. `lossy` takes any other that the library opens (Llama 2's and
Gemma's read U+2581 as a space). Decoding joins the bytes of the ids here, because the library's own decoder gives a
text, in which a character cut in the middle is lost.

Added tokens with the mark `special`, and the two tokens that begin and end documents, are never found in text. Other
added tokens (runs of blanks in some vocabularies) are part of how text is written. A prompt may spell any of them.

Source: the tokenizers library; byte-level BPE of GPT-2 (Radford et al. 2019).
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import tokenizers

from llm.errors import UserError
from llm.tokenizers.base import LOSSLESS_PROBE, META_SPACE, TableTokenizer, TokenizerConfig
from llm.tokenizers.parts import PART_CHARACTERS, SafeAt, between_words, cut
from llm.tokenizers.tokenizer_json import Component

# GPT-2 writes each byte as one visible character: those that are visible in Latin-1 as themselves, the others as the
# characters from U+0100 on.
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = sorted(set(range(256)) - set(_VISIBLE))
BYTE_OF_CHARACTER = {chr(byte): byte for byte in _VISIBLE} | {chr(256 + i): byte for i, byte in enumerate(_HIDDEN)}

BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")

BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>")
EOS_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>", "<\uff5cend\u2581of\u2581sentence\uff5c>")
SERVES_AS_BOTH = "<|endoftext|>"  # GPT-2 and its descendants put it between documents


def _keeps_all(part: Component) -> str:
    return ""


def _must_not_remove(part: Component) -> str:
    return "drops what it splits at" if part.get("behavior") == "Removed" else ""


def _must_not_add_a_space(part: Component) -> str:
    return "puts a space before the text (add_prefix_space)" if part.get("add_prefix_space", True) else ""


# The parts of a chain that can be lossless, each with what makes it lose text ("" when nothing does).
NORMALIZERS: dict[str, Callable[[Component], str]] = {"ByteLevel": _keeps_all}
PRE_TOKENIZERS: dict[str, Callable[[Component], str]] = {
    "ByteLevel": _must_not_add_a_space,
    "Split": _must_not_remove,
    "Punctuation": _must_not_remove,
    "Digits": _keeps_all,
    "FixedLength": _keeps_all,
    "UnicodeScripts": _keeps_all,
}


class HFTokenizer(TableTokenizer):
    """A tokenizer of the tokenizers library."""

    kind = "hf"

    def __init__(
        self,
        content: bytes,
        bos: str | None = None,
        eos: str | None = None,
        name: str = "the tokenizer.json",
        lossy: bool = False,
    ) -> None:
        """`content` of a tokenizer.json; `bos`, `eos`: names of the tokens around documents, None finds them; `name`
        is used in errors; `lossy` lets it change text. UserError when the file is damaged or not lossless.

        Attributes:
            special_tokens: ids of the special tokens by name, those around documents included.
        """
        self._file = content
        self.lossy = lossy
        document = _read_lossless(content, name, lossy)
        self.bos, self.eos = _marks([token["content"] for token in document["added_tokens"]], bos, eos, name)
        self._tokenizer = _open(document, (self.bos, self.eos), name)
        self.special_tokens = {token["content"]: token["id"] for token in document["added_tokens"] if token["special"]}
        self.bos_id, self.eos_id = self.special_tokens[self.bos], self.special_tokens[self.eos]
        self._bytes_of_id, self._opens_with_space = _id_bytes(self._tokenizer, document, name)
        self.vocab_size = len(self._bytes_of_id)
        self._byte_level = is_byte_level(document)
        ids = f"hf\0{self.bos_id} {self.eos_id}\0".encode()
        self.fingerprint = hashlib.blake2b(ids + content, digest_size=16).hexdigest()

        spelled = LOSSLESS_PROBE + "".join(f" {token}a{token}" for token in self.special_tokens)
        try:
            found = self.encode(spelled)
        except UserError:
            if not lossy:
                raise
            return
        unknown = self.special_tokens.get(document["model"].get("unk_token") or "") if lossy else None
        if (self.decode(found) != spelled and not lossy) or set(found) & {*self.special_tokens.values()} - {unknown}:
            raise UserError(f"{name}: the tokenizer changes text, or takes text for special tokens")

    def encode(self, text: str) -> list[int]:
        text.encode()  # the library's error on lone surrogates is a TypeError
        # One text as a batch: unlike `encode`, this lets go of Python's lock and computes no offsets, in half the time.
        return self._ids(text, around=False)

    def parts(self, text: str) -> list[str]:
        return [text] if len(text) <= PART_CHARACTERS or self._safe_at is None else cut(text, self._safe_at)

    @cached_property
    def _safe_at(self) -> SafeAt | None:
        """Where a text may be cut; None where nothing is certain: a normaliser or a pre-tokenizer that looks at more
        than the next characters, or an added token with a space inside.
        """
        document = json.loads(self._file)
        parts = [part.get("type") for part in _parts(document.get("pre_tokenizer"), "pretokenizers")]
        local = bool(parts) and set(parts) <= {"ByteLevel", "Split", "Punctuation", "Digits", "UnicodeScripts"}
        spaced = any(" " in token["content"].strip() for token in document["added_tokens"])
        pre_tokenizer = self._tokenizer.pre_tokenizer
        if self.lossy or not local or spaced or document.get("normalizer") or pre_tokenizer is None:
            return None
        return between_words(lambda text, i: any(begin == i for _, (begin, _) in pre_tokenizer.pre_tokenize_str(text)))

    def _ids(self, text: str, around: bool) -> list[int]:
        try:
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=around)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"a text that the tokenizer has no ids for: {error}") from None
        ids: list[int] = encoding.ids
        return ids

    def prompt_ids(self, text: str) -> list[int]:
        return [*self.begin_ids, *self.library_ids(text, around=False)] or [self.bos_id]

    @property
    def control_tokens(self) -> Mapping[str, int]:
        return self.special_tokens

    def rendered_ids(self, text: str) -> list[int] | None:
        return self.library_ids(text, around=False)

    def encode_inside(self, text: str) -> list[int]:
        if self._byte_level:
            return self.encode(text)
        line_end, found = self.encode("\n"), self.encode(f"\n{text}")  # no space is put before what follows a line end
        return found[len(line_end) :] if found[: len(line_end)] == line_end else self.encode(text)

    def library_ids(self, text: str, around: bool = True, find_special: bool = True) -> list[int]:
        """Ids of `text` as the library itself gives them: special tokens that it spells are found, if `find_special`.
        `around`: with what its post-processor puts around every text."""
        text.encode()
        self._tokenizer.encode_special_tokens = not find_special
        try:
            return self._ids(text, around)
        finally:
            self._tokenizer.encode_special_tokens = True

    def document(self) -> dict[str, Any]:
        """The content of its file."""
        found: dict[str, Any] = json.loads(self._file)
        found.setdefault("added_tokens", [])
        return found

    def save(self, directory: Path) -> TokenizerConfig:
        (Path(directory) / "tokenizer.json").write_bytes(self._file)
        return TokenizerConfig(kind="hf", path="tokenizer.json", bos=self.bos, eos=self.eos, lossy=self.lossy)


def _read_lossless(content: bytes, name: str, lossy: bool) -> dict[str, Any]:
    """The JSON, with its list of added tokens. UserError when the tokenizer it describes is not lossless, unless
    `lossy`."""
    try:
        document = json.loads(content)
        if not isinstance(document["model"]["vocab"], dict | list):
            raise ValueError("no vocabulary")
        document.setdefault("added_tokens", [])
        for token in document["added_tokens"]:
            token["id"], token["special"] = int(token["id"]), bool(token["special"])
            if not isinstance(token["content"], str) or not token["content"]:
                raise ValueError("an added token without content")
        loss = next(_losses(document), None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{name}: not a tokenizer.json, or damaged ({type(error).__name__}: {error})") from None
    if loss is not None and not lossy:
        raise UserError(f"{name}: the tokenizer changes text: {loss}; use a byte-level BPE without normalizer")
    return document


def _losses(document: dict[str, Any]) -> Iterator[str]:
    """Reasons why the chain is not lossless."""
    normalizers = _parts(document.get("normalizer"), "normalizers")
    pre_tokenizers = _parts(document.get("pre_tokenizer"), "pretokenizers")
    chain = [(part, "normalizer", NORMALIZERS) for part in normalizers]
    chain += [(part, "pre-tokenizer", PRE_TOKENIZERS) for part in pre_tokenizers]
    for part, role, known in chain:
        kind = str(part.get("type"))
        loss = known[kind](part) if kind in known else "can change or drop characters"
        if loss:
            yield f"its {role} {kind} {loss}"
    model = document["model"]
    if model.get("type", "BPE") != "BPE":
        yield f"its model is {model['type']}, which has no ids for unknown characters"
    if [part.get("type") for part, _, _ in chain].count("ByteLevel") != 1:
        yield "its pre-tokenizer is not ByteLevel, so characters outside the vocabulary have no ids"
    for option in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(option):
            yield f"its model has {option}={model[option]}"
    for byte in BYTE_OF_CHARACTER:
        if byte not in model["vocab"]:
            yield f"the byte 0x{BYTE_OF_CHARACTER[byte]:02X} ({byte}) is not in its vocabulary"
    for token in document["added_tokens"]:
        if not token["special"] and (token.get("lstrip") or token.get("rstrip")):
            yield f"its added token {token['content']!r} swallows the blanks beside it (lstrip, rstrip)"
        spells_bytes = token["content"] in model["vocab"] and all(c in BYTE_OF_CHARACTER for c in token["content"])
        if not token["special"] and spells_bytes and not token["content"].isascii():
            yield f"its added token {token['content']!r} has the id of other bytes too"


def _parts(part: Component | None, key: str) -> Iterator[Component]:
    """A normalizer or pre-tokenizer as a flat list of its parts."""
    if part and part.get("type") == "Sequence":
        for inner in part.get(key, []):
            yield from _parts(inner, key)
    elif part:
        yield part


def _marks(added: list[str], bos: str | None, eos: str | None, name: str) -> tuple[str, str]:
    """Names of the tokens that begin and end a document, found by their usual names where not given."""
    for key, token in (("bos", bos), ("eos", eos)):
        if token is not None and token not in added:
            raise UserError(f"{name}: tokenizer.{key}={token} is not among its added tokens {_shortened(added)}")
    eos = eos or _only("eos", [token for token in EOS_NAMES if token in added], added, name)
    begins = [token for token in BOS_NAMES if token in added] or [eos] * (eos == SERVES_AS_BOTH)
    return bos or _only("bos", begins, added, name), eos


def _only(key: str, found: list[str], added: list[str], name: str) -> str:
    if len(found) != 1:
        which = f"several tokens could be it ({', '.join(found)})" if found else "none has a usual name"
        raise UserError(f"{name}: set tokenizer.{key} to one of its added tokens, because {which}: {_shortened(added)}")
    return found[0]


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") if names else "(none)"


def _open(document: dict[str, Any], marks: tuple[str, str], name: str) -> tokenizers.Tokenizer:
    """The library's tokenizer that finds neither special tokens nor `marks` in text, and neither cuts nor pads it.

    The marks' entries in `document` become special.
    """
    for token in document["added_tokens"]:
        token["special"] |= token["content"] in marks
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps({**document, "truncation": None, "padding": None}))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{name}: not a tokenizer.json, or damaged ({error})") from None
    tokenizer.encode_special_tokens = True
    for token in document["added_tokens"]:
        if tokenizer.token_to_id(token["content"]) != token["id"]:
            raise UserError(
                f"{name}: damaged (the added token {token['content']!r} has id {token['id']}, but the library gives it "
                f"{tokenizer.token_to_id(token['content'])})"
            )
    return tokenizer


def _id_bytes(tokenizer: tokenizers.Tokenizer, document: Component, name: str) -> tuple[list[bytes], set[int]]:
    """UTF-8 bytes of each id, none for special tokens and for ids that nothing has; and the ids whose first space is no
    part of a text that they begin."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if len(set(vocabulary.values())) != len(vocabulary):
        raise UserError(f"{name}: damaged (two tokens of the vocabulary share an id)")
    bytes_of_id = [b""] * (max(vocabulary.values()) + 1)
    bytes_of = _bytes_of_characters if is_byte_level(document) else partial(_bytes_of_piece, document)
    for piece, number in vocabulary.items():
        bytes_of_id[number] = bytes_of(piece)
    opens = {i for i, text in enumerate(bytes_of_id) if text.startswith(b" ")} if _strips_a_space(document) else set()
    for token in document["added_tokens"]:
        bytes_of_id[token["id"]] = b"" if token["special"] else token["content"].encode()
    return bytes_of_id, opens


def is_byte_level(document: Component) -> bool:
    """Whether its pieces are bytes, written as GPT-2 does."""
    chain = [document.get("decoder"), document.get("pre_tokenizer"), document.get("normalizer")]
    return any('"ByteLevel"' in json.dumps(part) for part in chain)


def _bytes_of_characters(piece: str) -> bytes:
    known = all(character in BYTE_OF_CHARACTER for character in piece)
    # Text never becomes a piece with other characters; the library decodes those as they stand.
    return bytes(BYTE_OF_CHARACTER[character] for character in piece) if known else piece.encode()


def _bytes_of_piece(document: Component, piece: str) -> bytes:
    """Of a vocabulary of characters, in the ways of SentencePiece and WordPiece."""
    model = document["model"]
    if model.get("byte_fallback") and BYTE_PIECE.fullmatch(piece):
        return bytes([int(piece[3:5], 16)])
    if piece == model.get("unk_token"):
        return b""
    if model.get("type") == "WordPiece":
        prefix = model.get("continuing_subword_prefix", "##")
        return piece.removeprefix(prefix).encode() if piece.startswith(prefix) else b" " + piece.encode()
    return piece.replace(META_SPACE, " ").encode()


def _strips_a_space(document: Component) -> bool:
    """Whether its decoder takes a space from the beginning of a text."""
    parts = list(_parts(document.get("decoder"), "decoders"))
    strips = any(part.get("type") == "Strip" and part.get("start", 0) for part in parts)
    prefixed = any(part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never" for part in parts)
    return strips or prefixed or document["model"].get("type") == "WordPiece"
