"""Text to token ids and back, losslessly: what every kind of tokenizer does, and the config that names one.

`decode(encode(text)) == text` holds for every string that can be written as UTF-8 (one without lone surrogates). The
losses in nats that training reports mean something per byte only because of that. Tokenizers that came with a foreign
model may be let change the text first (`lossy`): bits per byte are then of the text as they read it. No text ever
encodes to the begin and end marks: they are added by whoever builds documents. A prompt is not a document: what its
user spells, control tokens included, becomes what the tokenizer's own library makes of it (`prompt_ids`).
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

from llm.paths import PathText
from llm.tokenizers.parts import PART_CHARACTERS

TokenIds = Sequence[int] | np.ndarray
TokenizerKind = Literal["sentencepiece", "tiktoken", "hf", "bytes", "characters", "smiles", "none"]

FILELESS = ("bytes", "none")
"""Kinds without a file."""

ENDS_A_TURN = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "<end_of_turn>", "<|end|>", "</s>", "<eos>"
)  # fmt: skip
"""Marks that end a turn of a conversation, and begin no text."""

META_SPACE = "\u2581"  # SentencePiece writes a space as this character, and so cannot distinguish the two
META_SPACE_UTF8 = META_SPACE.encode()

# A tokenizer that changes any of this changes real text too: runs of blanks, line ends, compatibility and combining
# characters, unknown letters.
LOSSLESS_PROBE = (
    "  a  b \t\r\n\n    c\u2581 \u2581\u2581d \ufb01\uff21 e\u0301\u00e9 \u200b\u00a0\x00"
    "<s></s><unk><0x0A> \U0001f600\u4e9c "
)


class TokenizerConfig(BaseModel):
    """Which tokenizer, as it stands under `tokenizer:` in a run config."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: TokenizerKind
    """sentencepiece (a .model file) or characters (a JSON file), which `lattice tokenizer` makes; tiktoken (the
    file of ranks of Llama 3 and 4), hf (a tokenizer.json, or a folder, read as transformers reads it), bytes (256
    ids, no file), smiles (atoms and bonds of molecules; a file with one token a line, which
    `lattice tokenizer` makes) or none (a model that reads and predicts values; left out there)
    """
    path: PathText | None = None
    """the tokenizer's file, or with kind hf its folder; none for bytes"""
    variant: Literal["llama3", "llama4"] | None = None
    """tiktoken only: whose pattern and special tokens go with the ranks; null = by their number"""
    bos: str | None = None
    """hf only: name of the token that begins a document; null: as a folder's files say, else by its usual names"""
    eos: str | None = None
    """hf only: name of the token that ends a document; null finds it likewise"""

    lossy: bool = False
    """sentencepiece and hf only: accept one that normalises text, as those of many foreign models do; smiles: what the
    vocabulary lacks is <unk>, where it is an error else
    """
    added_tokens: tuple[str, ...] = ()
    """control tokens beyond those of its files, whose ids follow these; chat.add_tokens sets them
    """

    @model_validator(mode="after")
    def _file_goes_with_kind(self) -> "TokenizerConfig":
        if self.kind == "bytes" and self.path is not None:
            raise ValueError(f"tokenizer.path={self.path}: the bytes tokenizer has no file; leave the path out")
        if self.kind == "none" and (self.path is not None or self.added_tokens):
            raise ValueError("tokenizer.kind=none: is of runs without text, and has no file and no tokens")
        if self.kind not in FILELESS and self.path is None:
            raise ValueError(f"tokenizer.path is missing: kind {self.kind} needs a file{where_from(self.kind)}")
        return self

    @model_validator(mode="after")
    def _option_goes_with_kind(self) -> "TokenizerConfig":
        for option, kind in (("variant", "tiktoken"), ("bos", "hf"), ("eos", "hf")):
            if getattr(self, option) is not None and self.kind != kind:
                raise ValueError(
                    f"tokenizer.{option}={getattr(self, option)}: of use only with kind {kind}, not {self.kind}; "
                    f"leave it out"
                )
        if self.lossy and self.kind not in ("sentencepiece", "hf", "smiles"):
            raise ValueError(f"tokenizer.lossy: of use only with kinds sentencepiece, hf and smiles, not {self.kind}")
        return self


def where_from(kind: TokenizerKind) -> str:
    """End of a message about a missing file."""
    return "; `lattice tokenizer` makes one" if kind in ("sentencepiece", "characters", "smiles") else ""


class Tokenizer(Protocol):
    """What training, sharding and generation know of a tokenizer."""

    kind: str
    vocab_size: int
    bos_id: int
    """what begins a text where nothing else does: the begin mark, or for a tokenizer without one what separates
    documents"""
    eos_id: int
    """the mark after every training document"""
    fingerprint: str
    """hex digest of everything that decides the ids: two tokenizers with the same fingerprint give the same ids"""

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """What it puts before a text, a prompt or a training document, by itself; () where it puts nothing."""
        return (self.bos_id,)

    @property
    def after_ids(self) -> tuple[int, ...]:
        """What it puts after a prompt by itself, as few do."""
        return ()

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Every id that ends a generation, `eos_id` first."""
        return (self.eos_id,)

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """Ids of the tokens that no text becomes, by the names that chat templates write."""
        return {"<s>": self.bos_id, "</s>": self.eos_id}

    def rendered_ids(self, text: str) -> list[int] | None:
        """Ids of what a chat template rendered, all control tokens in it being meant, by the library that reads the
        tokenizer elsewhere; None where these are those of the parts between its control tokens, by `encode` and
        `encode_inside`."""
        return None

    def encode_inside(self, text: str) -> list[int]:
        """Ids of a text that continues another after a control token."""
        return self.encode(text)

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a prompt: as `transformers` would begin it where the tokenizer is a foreign one, else `begin_ids` and
        `encode(text)`. An empty text without begin mark is `bos_id` alone, as there must be a token to start from.

        A prompt of a foreign tokenizer may spell its control tokens (<|im_start|>, ...), as chat templates do; a
        training document, which goes through `encode`, never does.
        """
        return [*self.begin_ids, *self.encode(text)] or [self.bos_id]

    def source_ids(self, text: str) -> list[int]:
        """Ids of a text that an encoder reads: as a training document has it, with the mark after it. What a decoder
        writes about it begins with `bos_id`."""
        return [*self.begin_ids, *self.encode(text), self.eos_id]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without begin and end marks. UnicodeEncodeError (a ValueError) on a lone surrogate."""
        ...

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """`encode` of each text as uint32 arrays; `threads` is used where the tokenizer can."""
        return [np.asarray(self.encode(text), dtype=np.uint32) for text in texts]

    def parts(self, text: str) -> list[str]:
        """A long text in parts whose ids, the first's by `encode` and the others' by `encode_rest`, are those of the
        text one after the other; the text alone where the tokenizer cannot promise that.
        """
        return [text]

    def encode_rest(self, parts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """`encode_batch` of parts that continue a text."""
        return self.encode_batch(parts, threads)

    def encode_long(self, text: str, threads: int = 1) -> Iterator[tuple[np.ndarray, int]]:
        """Ids of a text part by part, each with the number of characters that are done: memory for a few parts at a
        time, besides the ids.
        """
        first, *rest = self.parts(text)
        yield self.encode_batch([first], threads)[0], (done := len(first))
        for i in range(0, len(rest), threads):
            for part, ids in zip(rest[i : i + threads], self.encode_rest(rest[i : i + threads], threads), strict=True):
                done += len(part)
                yield ids, done

    def decode_bytes(self, ids: TokenIds) -> bytes:
        """UTF-8 bytes of `ids`; marks give nothing, and neither do ids from vocab_size on: many models have more rows
        than their tokenizer has tokens. ValueError on a negative id."""
        ...

    def added_bytes(self, token: int) -> bytes | None:
        """What an id adds to ids with some text, where that never depends on them; of a tokenizer of which that cannot
        be said, None for all ids."""
        return None

    def decode(self, ids: TokenIds) -> str:
        """Text of `ids`; bytes that are no UTF-8 (a character cut in the middle) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each id adds to a text, int64 (vocab_size,); 0 for the marks. Summed over targets they give
        bits per byte.
        """
        return np.array([len(self.decode_bytes([i])) for i in range(self.vocab_size)], dtype=np.int64)

    def save(self, directory: Path) -> TokenizerConfig:
        """Write what is needed into `directory`; returns the config that opens it again with `base=directory`."""
        ...


class TableTokenizer(Tokenizer):
    """What tokenizers of a library share: each id stands for the same bytes everywhere, and the library lets go of
    Python's lock while it encodes.
    """

    _bytes_of_id: list[bytes]
    """UTF-8 bytes of each id, none for marks"""
    _opens_with_space: Set[int] = frozenset()
    """Ids whose first space is no part of a text that they begin: the tokenizer puts one there."""

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        long = [len(text) > PART_CHARACTERS and len(self.parts(text)) > 1 for text in texts]
        short = [text for text, is_long in zip(texts, long, strict=True) if not is_long]
        encoded = iter(self._encode_whole(short, threads))
        return [
            np.concatenate([ids for ids, _ in self.encode_long(text, threads)]) if is_long else next(encoded)
            for text, is_long in zip(texts, long, strict=True)
        ]

    def _encode_whole(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        """Ids of texts that are not cut."""
        if threads == 1:
            return [self._encode_array(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self._encode_array, texts))

    def _encode_array(self, text: str) -> np.ndarray:
        return np.asarray(self.encode(text), dtype=np.uint32)

    def decode_bytes(self, ids: TokenIds) -> bytes:
        shown = [number for number in known_ids(ids, self.vocab_size).tolist() if self._bytes_of_id[number]]
        text = b"".join([self._bytes_of_id[number] for number in shown])
        return text[1:] if shown and shown[0] in self._opens_with_space else text

    def added_bytes(self, token: int) -> bytes | None:
        return self._bytes_of_id[token] if token < self.vocab_size else b""

    def token_bytes(self) -> np.ndarray:
        return np.array([len(text) for text in self._bytes_of_id], dtype=np.int64)


def known_ids(ids: TokenIds, vocab_size: int) -> np.ndarray:
    """Those of the ids that are inside the vocabulary, as an int64 array. ValueError on a negative one."""
    array = np.asarray(ids, dtype=np.int64).reshape(-1)
    if array.size and int(array.min()) < 0:
        raise ValueError(f"token id {int(array.min())} is negative")
    return array[array < vocab_size]
