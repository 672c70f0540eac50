"""The tokenizer of a foreign folder: documents are encoded by one of our kinds, prompts as `transformers` does.

Both give ids of the same vocabulary. They differ where a text spells control tokens, which become one only in a prompt,
and at the edges of a text where transformers' way with a SentencePiece model is not SentencePiece's.

Where a folder has a tokenizer.model and no tokenizer_config.json, transformers 5 guesses and puts neither a begin mark
nor the model's space before a text, with which no such model was trained; here it then gets both, as SentencePiece and
Meta's code do.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from llm.errors import NoTokenizer, UserError
from llm.tokenizers.auto import CLASSES, TAKEN_AS_THEY_STAND, Settled, class_name, read_json, settle
from llm.tokenizers.base import ENDS_A_TURN, TableTokenizer, Tokenizer, TokenizerConfig
from llm.tokenizers.files import open_file
from llm.tokenizers.huggingface import BOS_NAMES, EOS_NAMES, SERVES_AS_BOTH, HFTokenizer, is_byte_level
from llm.tokenizers.sentencepiece import SentencePieceTokenizer
from llm.tokenizers.tokenizer_json import added, adds_prefix, template

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "generation_config.json", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
COPY = "original"
"""Folder in which a run keeps the files of such a tokenizer."""
LOSSY = "its tokenizer normalises text, so that what is decoded may differ from what was encoded"


def notes_of(tokenizer: Tokenizer) -> list[str]:
    """Lines on what a tokenizer does that its user may not expect."""
    notes = tokenizer.notes if isinstance(tokenizer, FolderTokenizer) else []
    return [*notes, *([LOSSY] if getattr(tokenizer, "lossy", False) else [])]


def foreign_tokenizer(path: Path) -> tuple[Tokenizer, TokenizerConfig]:
    """The tokenizer in a foreign folder and its config, whose path is relative to the folder. One that changes text is
    taken where there is no other (`lossy` in the config). UserError when there is none that can be used.
    """
    found = folder_tokenizer(path, TokenizerConfig(kind="hf", path=".", lossy=True))
    if isinstance(found, FolderTokenizer):
        return found, TokenizerConfig(kind="hf", path=".", lossy=found.lossy)
    return found, next(config for config in _plain(path) if config.kind == found.kind).model_copy(
        update={"lossy": getattr(found, "lossy", False)}
    )


def folder_tokenizer(path: Path, config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of a folder as its files describe it. `config.bos`, `config.eos`: names of other marks around
    documents, the first then begins prompts too. UserError when there is none that can be used, or only one that
    changes text without `config.lossy`.
    """
    settled = settle(path)
    reasons: list[str] = []
    for inner in _documents(path, settled, config, reasons):
        if settled is None and not (path / "config.json").is_file():
            return inner
        return FolderTokenizer(path, inner, settled, config)
    none = f"{path}: holds no tokenizer.json or tokenizer.model, so text cannot be read or written"
    raise UserError(reasons[0]) if reasons else NoTokenizer(none)


class FolderTokenizer(TableTokenizer):
    """What a folder's files make of a tokenizer: its marks, its added tokens, and how a prompt begins."""

    def __init__(self, path: Path, inner: TableTokenizer, settled: Settled | None, config: TokenizerConfig) -> None:
        """`inner` encodes documents; `settled` None: prompts too.

        Attributes:
            lossy: whether text is changed. added: its added tokens by id. notes: lines on what in the files is not what
                it seems.
        """
        self.kind, self.lossy = inner.kind, getattr(inner, "lossy", False)
        self.notes: list[str] = []
        self._path, self._inner, self._settled = path, inner, settled
        self._library: tokenizers.Tokenizer | None = None
        self._marks = (config.bos, config.eos)
        self._files = {name: (path / name).read_bytes() for name in TOKENIZER_FILES if (path / name).is_file()}
        self._config = _reduced(read_json(path / "config.json"))
        tokens = _added_tokens(path, settled)
        rows = self._config.get("vocab_size")
        self.added = tokens
        natural = max([inner.vocab_size, *(number + 1 for number in tokens)])
        self.vocab_size = min(natural, rows) if isinstance(rows, int) and rows > 0 else natural
        self._bytes_of_id = (inner._bytes_of_id + [b""] * natural)[: self.vocab_size]
        self._adds_prefix = settled is None or adds_prefix(settled.document)
        self._opens_with_space = inner._opens_with_space if self._adds_prefix else frozenset()
        for number, token in tokens.items():
            if number >= self.vocab_size:
                self.notes.append(
                    f"its added token {token['content']!r} has id {number}, beyond the model's {rows} rows"
                )
            else:
                self._bytes_of_id[number] = b"" if token["special"] else token["content"].encode()
        self.notes += _guesses(path, settled, self.kind)
        names = {token["content"]: number for number, token in tokens.items() if number < self.vocab_size}
        self._special = {name: number for name, number in names.items() if tokens[number]["special"]}
        self._in_text = {} if isinstance(inner, HFTokenizer) else _found_in_text(inner, names, self._special)
        self._ids_of_marks(inner, names)
        self._unprefixed = isinstance(inner, SentencePieceTokenizer) and inner.adds_prefix and not self._adds_prefix
        same = (inner.bos_id, inner.eos_id, (inner.bos_id,), {}, False) == (
            self.bos_id, self.eos_id, self.begin_ids, self._in_text, self._unprefixed
        )  # fmt: skip
        parts = [inner.fingerprint, self.eos_id, self.begin_ids, sorted(self._in_text.items()), self._unprefixed]
        digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
        self.fingerprint = inner.fingerprint if same else digest

    def _ids_of_marks(self, inner: TableTokenizer, names: Mapping[str, int]) -> None:
        stated, generation = self._config, read_json(self._path / "generation_config.json")
        marks = self._settled.marks if self._settled is not None else {}
        ends = [*_ids(stated.get("eos_token_id")), *_ids(generation.get("eos_token_id"))]
        for key, number in [("eos_token_id", i) for i in ends] + [
            ("bos_token_id", i) for i in _ids(stated.get("bos_token_id"))
        ]:
            if number >= self.vocab_size:
                self.notes.append(f"{key}={number} in its configs is no token of its tokenizer")
        eos = _first(names.get(self._marks[1] or ""), names.get(marks.get("eos_token", "")), *ends, inner.eos_id)
        self.eos_id = inner.eos_id if eos >= self.vocab_size else eos
        own_eos = names.get(marks.get("eos_token", ""), self.eos_id)
        ends += inner.end_ids[1:]
        self._end_ids = tuple(dict.fromkeys([self.eos_id, own_eos, *(i for i in ends if i < self.vocab_size)]))
        around = self._around()
        self._begin_ids = tuple(number for number in around[0] if number < self.vocab_size)
        if self._marks[0] is not None:
            if self._marks[0] not in names:
                raise UserError(f"{self._path}: tokenizer.bos={self._marks[0]} is not among its added tokens")
            self._begin_ids = (names[self._marks[0]],)
        self._after_ids = tuple(around[1]) if self._marks[0] is None else ()
        if around[1]:
            self.notes.append("its tokenizer puts an end mark after every prompt, as its files say (add_eos_token)")
        may_begin = [names.get(marks.get("bos_token", "")), *_ids(stated.get("bos_token_id"))]
        usual = [names.get(name) for name in (SERVES_AS_BOTH, *BOS_NAMES)]
        turns = {names.get(name) for name in ENDS_A_TURN}
        separator = [i for i in (*may_begin, *usual) if i is not None and i < self.vocab_size and i not in turns]
        self.bos_id = _first(*self._begin_ids[:1], *separator, self.eos_id)

    def _around(self) -> tuple[list[int], list[int]]:
        """What its library puts before and after every text."""
        if self._settled is None:
            return [self._inner.bos_id], []
        post = self._settled.document.get("post_processor")
        shell = tokenizers.Tokenizer.from_str(
            json.dumps({"version": "1.0", "added_tokens": [], "model": SHELL, "post_processor": post})
        )
        ids: list[int] = shell.encode("a").ids
        at = ids.index(SHELL_ID)
        return ids[:at], ids[at + 1 :]

    @property
    def begin_ids(self) -> tuple[int, ...]:
        return self._begin_ids

    @property
    def after_ids(self) -> tuple[int, ...]:
        return self._after_ids

    @property
    def end_ids(self) -> tuple[int, ...]:
        return self._end_ids

    def encode(self, text: str) -> list[int]:
        if not self._in_text and not self._unprefixed:
            return self._inner.encode(text)
        return self._ids_finding(text, self._in_text)

    def _ids_finding(self, text: str, tokens: Mapping[str, int], inside: bool = False) -> list[int]:
        """Ids of a text in which `tokens` are found. `inside`: it continues another."""
        ids: list[int] = []
        for i, part in enumerate(_splitter(tokens).split(text) if tokens else [text]):
            if i % 2:
                ids.append(tokens[part])
            else:
                first = i == 0 and not self._unprefixed and not inside
                ids += self._inner.encode(part) if first else self._inner.encode_inside(part)
        return ids

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        if self._in_text or self._unprefixed:
            return super().encode_batch(texts, threads)
        return self._inner.encode_batch(texts, threads)

    def prompt_ids(self, text: str) -> list[int]:
        if self._settled is None and self.kind == "tiktoken" and self._marks[0] is None:
            return self._inner.prompt_ids(text)
        if self._settled is None:
            return [*self.begin_ids, *self._ids_finding(text, {**self._in_text, **self._special})] or [self.bos_id]
        text.encode()
        if self._marks[0] is not None:
            return [*self.begin_ids, *self._library_ids(text, around=False)]
        return self._library_ids(text) or [self.bos_id]

    @property
    def control_tokens(self) -> Mapping[str, int]:
        return {**self._inner.control_tokens, **self._special} if self._settled is None else self._special

    def rendered_ids(self, text: str) -> list[int] | None:
        return None if self._settled is None else self._library_ids(text, around=False, find_special=True)

    def encode_inside(self, text: str) -> list[int]:
        return self._ids_finding(text, self._in_text, inside=True)

    def _library_ids(self, text: str, around: bool = True, find_special: bool | None = None) -> list[int]:
        """`find_special`: whether control tokens that the text spells are found; None = as the files say."""
        assert self._settled is not None
        finds = not self._settled.splits_special if find_special is None else find_special
        if isinstance(self._inner, HFTokenizer):
            return self._inner.library_ids(text, around, find_special=finds)
        if self._library is None:
            self._library = tokenizers.Tokenizer.from_str(json.dumps(self._settled.document))
        self._library.encode_special_tokens = not finds
        ids: list[int] = self._library.encode(text, add_special_tokens=around).ids
        return ids

    def save(self, directory: Path) -> TokenizerConfig:
        """Copy the folder's files, its config.json as far as it matters to the tokenizer."""
        copy = Path(directory) / COPY
        copy.mkdir()
        for name, content in self._files.items():
            (copy / name).write_bytes(content)
        (copy / "config.json").write_text(json.dumps(self._config, indent=1) + "\n")
        bos, eos = self._marks
        return TokenizerConfig(kind="hf", path=COPY, bos=bos, eos=eos, lossy=self.lossy)

    def document(self) -> dict[str, Any] | None:
        """The content of the tokenizer.json that gives the ids of prompts; None where `inner` gives them."""
        if self._settled is None:
            return None
        document = dict(self._settled.document)
        if self._marks[0] is not None:
            ids = {self._marks[0]: self.begin_ids[0]}
            document["post_processor"] = template([self._marks[0]], [], ids)
        return document

    @property
    def inner(self) -> TableTokenizer:
        """What encodes documents."""
        return self._inner

    @property
    def splits_special(self) -> bool:
        """Whether control tokens that a prompt spells are text (split_special_tokens)."""
        return self._settled is not None and self._settled.splits_special

    @property
    def model_type(self) -> str:
        """Of the model that it came with, as its config.json has it."""
        return str(self._config.get("model_type", ""))

    def kept_settings(self) -> dict[str, Any]:
        """What of tokenizer_config.json has nothing to do with ids."""
        found = json.loads(self._files.get("tokenizer_config.json", b"{}"))
        return {key: found[key] for key in ("chat_template", "model_max_length", "padding_side") if key in found}

    @property
    def marks(self) -> dict[str, str]:
        """Names of special tokens by key (bos_token, ...), as its files say."""
        return {} if self._settled is None else self._settled.marks


def _guesses(path: Path, settled: Settled | None, kind: str) -> Iterator[str]:
    """Lines on what its files leave open or say twice."""
    model = (path / "tokenizer.model").is_file()
    named = class_name(path, read_json(path / "tokenizer_config.json"))
    if settled is not None and named not in CLASSES and named not in TAKEN_AS_THEY_STAND:
        yield f"its tokenizer_class {named} is not known here, so transformers may read a prompt into other ids"
    if settled is None and kind == "sentencepiece":
        yield (
            "its tokenizer.model has no tokenizer_config.json beside it: a text begins with its begin mark, and as the "
            "model says with a space or none; transformers 5 puts neither"
        )
    elif model and not (path / "tokenizer.json").is_file():
        if "add_bos_token" not in read_json(path / "tokenizer_config.json") and kind == "sentencepiece":
            yield "its tokenizer_config.json has no add_bos_token: a text gets a begin mark; transformers 5 puts none"
    elif model and kind == "hf" and settled is not None and not _holds_ranks(path / "tokenizer.model"):
        disagree = _disagree(path, settled)
        if disagree:
            yield "its tokenizer.json and its tokenizer.model give pieces other ids; tokenizer.json is used"


SHELL_ID = 1 << 30
SHELL = {"type": "WordLevel", "vocab": {"a": SHELL_ID}, "unk_token": "a"}
"""A model in which every text is one token that no tokenizer has."""


def _documents(
    path: Path, settled: Settled | None, config: TokenizerConfig, reasons: list[str]
) -> Iterator[TableTokenizer]:
    """Tokenizers of ours that can read documents for the folder, best first; `reasons` gets why others cannot."""
    json_first = settled is not None and ((path / "tokenizer.json").is_file() or (path / "vocab.json").is_file())
    plain = _plain(path)
    if settled is not None and json_first:
        plain = [c for c in plain if c.kind != "sentencepiece" or not _disagree(path, settled)]
    makers: list[tuple[str, bool]] = [("json", False), ("plain", False)] if json_first else [("plain", False)]
    if config.lossy:
        byte_level = settled is not None and is_byte_level(settled.document)
        makers += [("json", True), ("plain", True)] if byte_level and json_first else [("plain", True), ("json", True)]
    for maker, lossy in makers:
        if maker == "json" and not json_first:
            continue
        try:
            if maker == "json":
                assert settled is not None
                yield _from_document(path, settled, config, lossy)
            else:
                for one in plain:
                    if lossy and one.kind == "tiktoken":
                        continue
                    found = open_file(one.model_copy(update={"lossy": lossy}), base=path)
                    assert isinstance(found, TableTokenizer)
                    yield found
        except UserError as error:
            reasons.append(str(error))


def _plain(path: Path) -> list[TokenizerConfig]:
    """How tokenizer.model is opened by itself."""
    if not (model := path / "tokenizer.model").is_file():
        return []
    return [TokenizerConfig(kind="tiktoken" if _holds_ranks(model) else "sentencepiece", path=model.name)]


def _from_document(path: Path, settled: Settled, config: TokenizerConfig, lossy: bool) -> HFTokenizer:
    file = path / "tokenizer.json"
    content = json.dumps(settled.document).encode() if settled.changed else file.read_bytes()
    rows = _reduced(read_json(path / "config.json")).get("vocab_size")
    listed = settled.document["added_tokens"]
    names = [token["content"] for token in listed if not isinstance(rows, int) or token["id"] < rows]
    eos = config.eos or _named(path, settled, "eos", names)
    usual = [name for name in EOS_NAMES if name in names]
    if eos is None and len(usual) == 1:
        eos = usual[0]
    bos = config.bos or _named(path, settled, "bos", names)
    if bos is None and not any(name in names for name in (SERVES_AS_BOTH, *BOS_NAMES)):
        bos = eos
    if bos is None and SERVES_AS_BOTH in names:
        bos = SERVES_AS_BOTH
    return HFTokenizer(content, bos, eos, str(file if file.is_file() else path), lossy)


def _named(path: Path, settled: Settled, key: str, names: list[str]) -> str | None:
    """The name of a mark: as the tokenizer's files have it, else by the id in config.json or generation_config.json."""
    if (named := settled.marks.get(f"{key}_token")) in names:
        return named
    name_of = {token["id"]: token["content"] for token in settled.document["added_tokens"]}
    for file in ("config.json", "generation_config.json"):
        for number in _ids(_reduced(read_json(path / file)).get(f"{key}_token_id")):
            if number in name_of:
                return str(name_of[number])
    return None


def _holds_ranks(file: Path) -> bool:
    """Whether it is a text file of base64 and ranks, not a SentencePiece model."""
    with open(file, "rb") as opened:
        first = opened.readline(4096).split()
    return len(first) == 2 and first[1].isdigit()


def _disagree(path: Path, settled: Settled) -> bool:
    """Whether tokenizer.model gives a piece another id than tokenizer.json, which transformers reads."""
    from llm.tokenizers.sentencepiece_model import NORMAL, read_sentencepiece

    try:
        pieces = read_sentencepiece((path / "tokenizer.model").read_bytes()).pieces
    except UserError:
        return True
    vocab = settled.document["model"]["vocab"]
    id_of = vocab if isinstance(vocab, dict) else {entry[0]: number for number, entry in enumerate(vocab)}
    return any(kind == NORMAL and id_of.get(text, number) != number for number, (text, _, kind) in enumerate(pieces))


def _added_tokens(path: Path, settled: Settled | None) -> dict[int, dict[str, Any]]:
    """The added tokens of a folder by id."""
    if settled is not None:
        return {int(token["id"]): token for token in settled.document["added_tokens"]}
    stated = read_json(path / "special_tokens_map.json")
    special = {v.get("content") if isinstance(v, dict) else v for v in stated.values() if isinstance(v, str | dict)}
    special |= {t.get("content") if isinstance(t, dict) else t for t in stated.get("additional_special_tokens", [])}
    return {
        number: added(content, content in special or _looks_like_control(content))
        for content, number in read_json(path / "added_tokens.json").items()
        if isinstance(number, int)
    }


def _looks_like_control(content: str) -> bool:
    return bool(re.fullmatch(r"<.+>|\[[A-Z_]+\]", content))


def _found_in_text(inner: TableTokenizer, names: Mapping[str, int], special: Mapping[str, int]) -> dict[str, int]:
    """Added tokens that are part of how text is written, beyond the pieces of `inner`."""
    return {name: i for name, i in names.items() if name not in special and i >= inner.vocab_size}


def _splitter(tokens: Mapping[str, int]) -> re.Pattern[str]:
    """Cuts a text at tokens, the longest first; text and tokens come in turn."""
    return re.compile("(" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")")


def _reduced(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config.json matters to the tokenizer, where it is said in its text model too."""
    keys = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    inner = config.get("text_config")
    found = {key: inner[key] for key in keys if key in inner} if isinstance(inner, dict) else {}
    return found | {key: config[key] for key in ("model_type", "tokenizer_class", *keys) if config.get(key) is not None}


def _ids(stated: Any) -> list[int]:
    """The ids in a config's bos_token_id or eos_token_id: a number, a list of them, or null."""
    listed = stated if isinstance(stated, list) else [stated]
    return [number for number in listed if isinstance(number, int) and not isinstance(number, bool) and number >= 0]


def _first(*numbers: int | None) -> int:
    return next(number for number in numbers if number is not None)
