"""Text to token ids and back, losslessly: every kind of tokenizer behind one small protocol.

SentencePiece, raw bytes and characters are here; tokenizer_tiktoken.py and tokenizer_hf.py are imported when used.

`decode(encode(text)) == text` holds for every string that can be written as UTF-8 (one without lone surrogates). The
losses in nats that training reports mean something per byte only because of that. Tokenizers that came with a foreign
model may be let change the text first (`lossy`): bits per byte are then of the text as they read it. No text ever
encodes to the begin and end marks: they are added by whoever builds documents. A prompt is not a document: what its
user spells, control tokens included, becomes what the tokenizer's own library makes of it (`prompt_ids`).

Source: SentencePiece (Kudo & Richardson 2018, arXiv:1808.06226) with byte fallback.
"""

import hashlib
import io
import json
import random
from collections.abc import Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import sentencepiece
from pydantic import BaseModel, ConfigDict, model_validator

from llm.errors import UserError
from llm.paths import PathText
from llm.tokenizer_parts import PART_CHARACTERS, SafeAt, anywhere, cut, no_piece_crosses

TokenIds = Sequence[int] | np.ndarray
TokenizerKind = Literal["sentencepiece", "tiktoken", "hf", "bytes", "characters"]

META_SPACE = "\u2581"  # SentencePiece writes a space as this character, and so cannot tell the two apart
META_SPACE_UTF8 = META_SPACE.encode()

# A tokenizer that changes any of this changes real text too: runs of blanks, line ends, compatibility and combining
# characters, unknown letters.
LOSSLESS_PROBE = (
    "  a  b \t\r\n\n    c\u2581 \u2581\u2581d \ufb01\uff21 e\u0301\u00e9 \u200b\u00a0\x00"
    "<s></s><unk><0x0A> \U0001f600\u4e9c "
)

CHUNK_CHARACTERS = 2000  # SentencePiece drops long training sentences; texts are cut at line ends to about this


class TokenizerConfig(BaseModel):
    """Which tokenizer, as it stands under `tokenizer:` in a run config."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: TokenizerKind
    """sentencepiece (a .model file) or characters (a JSON file), which tools/train_tokenizer.py makes; tiktoken (the
    file of ranks of Llama 3 and 4), hf (a tokenizer.json, or a folder, read as transformers reads it) or bytes (256
    ids, no file)
    """
    path: PathText | None = None
    """the tokenizer's file, or with kind hf its folder; none for bytes"""
    variant: Literal["llama3", "llama4"] | None = None
    """tiktoken only: whose pattern and special tokens go with the ranks; null tells it from their number"""
    bos: str | None = None
    """hf only: name of the token that begins a document; null: as a folder's files say, else by its usual names"""
    eos: str | None = None
    """hf only: name of the token that ends a document; null finds it likewise"""

    lossy: bool = False
    """sentencepiece and hf only: accept one that normalises text, as those of many foreign models do
    """

    @model_validator(mode="after")
    def _file_goes_with_kind(self) -> "TokenizerConfig":
        if self.kind == "bytes" and self.path is not None:
            raise ValueError(f"tokenizer.path={self.path}: the bytes tokenizer has no file; leave the path out")
        if self.kind != "bytes" and self.path is None:
            raise ValueError(f"tokenizer.path is missing: kind {self.kind} needs a file{_where_from(self.kind)}")
        return self

    @model_validator(mode="after")
    def _option_goes_with_kind(self) -> "TokenizerConfig":
        for option, kind in (("variant", "tiktoken"), ("bos", "hf"), ("eos", "hf")):
            if getattr(self, option) is not None and self.kind != kind:
                raise ValueError(
                    f"tokenizer.{option}={getattr(self, option)}: of use only with kind {kind}, not {self.kind}; "
                    f"leave it out"
                )
        if self.lossy and self.kind not in ("sentencepiece", "hf"):
            raise ValueError(f"tokenizer.lossy: of use only with kinds sentencepiece and hf, not {self.kind}")
        return self


def _where_from(kind: TokenizerKind) -> str:
    """End of a message about a missing file."""
    return "; tools/train_tokenizer.py makes one" if kind in ("sentencepiece", "characters") else ""


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
    def end_ids(self) -> tuple[int, ...]:
        """Every id that ends a generation, `eos_id` first."""
        return (self.eos_id,)

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a prompt: as `transformers` would begin it where the tokenizer is a foreign one, else `begin_ids` and
        `encode(text)`. An empty text without begin mark is `bos_id` alone, as there must be a token to start from.

        A prompt of a foreign tokenizer may spell its control tokens (<|im_start|>, ...), as chat templates do; a
        training document, which goes through `encode`, never does.
        """
        return [*self.begin_ids, *self.encode(text)] or [self.bos_id]

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


def load_tokenizer(config: TokenizerConfig, base: Path | None = None) -> Tokenizer:
    """Open the tokenizer of a config; a relative path starts at `base` (default: the working directory). UserError
    names what is wrong with the file.

    The packages tiktoken and tokenizers are imported by the first tokenizer that needs them.
    """
    if config.path is None:
        return ByteTokenizer()
    path = Path(base or ".") / config.path
    if config.kind == "hf" and path.is_dir():
        from llm.foreign.tokenizer import folder_tokenizer

        return folder_tokenizer(path, config)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"tokenizer.path={config.path}: cannot read {path} ({error.strerror}){_where_from(config.kind)}"
        ) from None
    if config.kind == "tiktoken":
        from llm.tokenizer_tiktoken import TiktokenTokenizer

        return TiktokenTokenizer(content, config.variant, str(path))
    if config.kind == "hf":
        from llm.tokenizer_hf import HFTokenizer

        return HFTokenizer(content, config.bos, config.eos, str(path), config.lossy)
    if config.kind == "characters":
        return CharacterTokenizer(_read_characters(content, path))
    return SentencePieceTokenizer(content, str(path), config.lossy)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0..255, then the two marks."""

    kind = "bytes"
    vocab_size = 258
    bos_id = 256
    eos_id = 257
    fingerprint = hashlib.blake2b(b"bytes 256 + bos + eos", digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) for text in texts]

    def parts(self, text: str) -> list[str]:
        return cut(text, anywhere)

    def decode_bytes(self, ids: TokenIds) -> bytes:
        ids = known_ids(ids, self.vocab_size)
        return ids[ids < 256].astype(np.uint8).tobytes()

    def save(self, directory: Path) -> TokenizerConfig:
        return TokenizerConfig(kind="bytes")


class CharacterTokenizer(Tokenizer):
    """One id per character of a fixed alphabet, then the two marks. A character outside the alphabet is an error: there
    is nothing to fall back on.
    """

    kind = "characters"

    def __init__(self, characters: str) -> None:
        """`characters`: the alphabet; character i has id i."""
        self.characters = characters
        self.bos_id = len(characters)
        self.eos_id = len(characters) + 1
        self.vocab_size = len(characters) + 2
        self.fingerprint = hashlib.blake2b(b"characters\0" + characters.encode(), digest_size=16).hexdigest()
        self._code_points = np.frombuffer(characters.encode("utf-32-le"), dtype=np.uint32)
        self._id_of_code_point = np.full(int(self._code_points.max(initial=0)) + 2, -1, dtype=np.int64)
        self._id_of_code_point[self._code_points] = np.arange(len(characters))

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        return [self._encode_array(text).astype(np.uint32) for text in texts]

    def parts(self, text: str) -> list[str]:
        return cut(text, anywhere)

    def _encode_array(self, text: str) -> np.ndarray:
        code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        ids = self._id_of_code_point[np.minimum(code_points, len(self._id_of_code_point) - 1)]
        if ids.min(initial=0) < 0:
            position = int(np.argmax(ids < 0))
            character = text[position]
            raise UserError(
                f"character {character!r} (U+{ord(character):04X}, at position {position} of the text) is not among "
                f"the tokenizer's {len(self.characters)} characters; train the tokenizer on text that has it"
            )
        return ids

    def decode_bytes(self, ids: TokenIds) -> bytes:
        ids = known_ids(ids, self.vocab_size)
        return self._code_points[ids[ids < self.bos_id]].tobytes().decode("utf-32-le").encode()

    def save(self, directory: Path) -> TokenizerConfig:
        (Path(directory) / "tokenizer.json").write_bytes(self.serialized())
        return TokenizerConfig(kind="characters", path="tokenizer.json")

    def serialized(self) -> bytes:
        """The content of the tokenizer's file."""
        return (json.dumps({"kind": "characters", "characters": self.characters}) + "\n").encode()


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

    def token_bytes(self) -> np.ndarray:
        return np.array([len(text) for text in self._bytes_of_id], dtype=np.int64)


class SentencePieceTokenizer(TableTokenizer):
    """A SentencePiece model with byte fallback and identity normalisation.

    U+2581 in the text goes through its three byte pieces, because the model would read it as a space. Decoding joins
    the bytes of the pieces here, for the same reason. A model that puts a space before the text (Llama 2's does) keeps
    doing so at the start of a text only.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, name: str = "the SentencePiece model", lossy: bool = False) -> None:
        """`model`: content of a .model file; `name` is used in errors. UserError when it is damaged, or not lossless
        unless `lossy`."""
        self._model = model
        self.lossy = lossy
        self._processor = _open_model(model, name)
        self.vocab_size = self._processor.vocab_size()
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()
        self.fingerprint = hashlib.blake2b(b"sentencepiece\0" + model, digest_size=16).hexdigest()
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(f"{name}: the model has no begin (<s>) or no end (</s>) piece; train it with both")

        self._bytes_of_id, byte_ids = _piece_bytes(self._processor)
        if len(byte_ids) < 256 and not lossy:
            raise UserError(
                f"{name}: the model has no byte fallback, so unknown characters would be lost; "
                f"train one with tools/train_tokenizer.py"
            )
        self._meta_space_ids = [byte_ids[byte] for byte in META_SPACE_UTF8] if len(byte_ids) == 256 else None

        self.adds_prefix = self._processor.normalize("a") != "a"
        # Protocol buffers merge when concatenated: this overrides one field of the model,
        # normalizer_spec.add_dummy_prefix = false.
        self._inner = _open_model(model + b"\x1a\x02\x18\x00", name) if self.adds_prefix else self._processor
        self._opens_with_space = {
            i
            for i in range(self.vocab_size)
            if self.adds_prefix and self._processor.id_to_piece(i).startswith(META_SPACE)
        }
        if not lossy and self.decode(self.encode(LOSSLESS_PROBE)) != LOSSLESS_PROBE:
            raise UserError(
                f"{name}: the model changes text (it normalises or drops characters); "
                f"train one with tools/train_tokenizer.py"
            )

    def encode(self, text: str) -> list[int]:
        if self._meta_space_ids is None:
            whole: list[int] = self._processor.encode(text)
            return whole
        first, *rest = text.split(META_SPACE)
        ids: list[int] = self._processor.encode(first)
        for part in rest:
            ids += self._meta_space_ids
            ids += self._inner.encode(part)
        return ids

    def encode_inside(self, text: str) -> list[int]:
        """Ids of `text` where it continues another: without the space that a model may put before a text."""
        if self._meta_space_ids is None:
            whole: list[int] = self._inner.encode(text)
            return whole
        first, *rest = text.split(META_SPACE)
        ids: list[int] = self._inner.encode(first)
        for part in rest:
            ids += [*self._meta_space_ids, *self._inner.encode(part)]
        return ids

    def _encode_whole(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        if any(META_SPACE in text for text in texts):
            return [self._encode_array(text) for text in texts]
        return [np.asarray(ids, dtype=np.uint32) for ids in self._processor.encode(list(texts), num_threads=threads)]

    def encode_rest(self, parts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        if any(META_SPACE in part for part in parts):
            return [np.asarray(self.encode_inside(part), dtype=np.uint32) for part in parts]
        return [np.asarray(ids, dtype=np.uint32) for ids in self._inner.encode(list(parts), num_threads=threads)]

    def parts(self, text: str) -> list[str]:
        return [text] if self._safe_at is None or len(text) <= PART_CHARACTERS else cut(text, self._safe_at)

    @cached_property
    def _safe_at(self) -> SafeAt | None:
        """Where a text may be cut; None where nothing is certain: a normaliser may look at what surrounds a place, and
        a unigram model adds up its scores, in float32, from the beginning of the text.
        """
        model = self._processor
        marks = [i for i in range(self.vocab_size) if model.is_control(i) or model.is_unknown(i) or model.is_byte(i)]
        merged = sorted(set(range(self.vocab_size)) - set(marks))
        if self.lossy or not all(model.get_score(i).is_integer() for i in merged):  # BPE's scores are ranks
            return None
        return no_piece_crosses(map(model.id_to_piece, merged), META_SPACE)

    def serialized(self) -> bytes:
        """The content of the tokenizer's file."""
        return self._model

    def save(self, directory: Path) -> TokenizerConfig:
        (Path(directory) / "tokenizer.model").write_bytes(self._model)
        return TokenizerConfig(kind="sentencepiece", path="tokenizer.model", lossy=self.lossy)


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    *,
    model_type: str = "bpe",
    boundaries: str = "script",
    character_coverage: float = 0.9999,
    max_bytes: int = 100_000_000,
    threads: int = 1,
) -> bytes:
    """Train a lossless SentencePiece model; returns the content of its .model file.

    Args:
        model_type: bpe or unigram.
        boundaries: what a piece may not cross: `script` (SentencePiece's default: spaces and changes of script),
            `space`, or `none`, which learns pieces such as a line end with the indentation after it.
        character_coverage: share of the text's characters that get a piece of their own; the others are written in
            bytes.
        max_bytes: text beyond this is sampled, evenly and repeatably.

    UserError when SentencePiece refuses (too little text for the vocabulary, ...).
    """
    output = io.BytesIO()
    sample = _sample(_chunks(texts), max(1, max_bytes // CHUNK_CHARACTERS))
    if not sample:
        raise UserError("the text is empty, so there is nothing to train a tokenizer on")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=output,
            model_type=model_type,
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            num_threads=threads,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            split_by_unicode_script=boundaries == "script",
            split_by_number=boundaries == "script",
            split_by_whitespace=boundaries != "none",
            max_sentencepiece_length=32,
            max_sentence_length=1 << 30,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[-1].rpartition("] ")[2]
        raise UserError(f"vocab_size={vocab_size}: SentencePiece cannot train on this text: {reason}") from None
    return output.getvalue()


def alphabet(texts: Iterable[str]) -> str:
    """All characters of the texts, each once, in code-point order."""
    seen: set[str] = set()
    for text in texts:
        seen.update(text)
    return "".join(sorted(seen))


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """Texts cut at line ends to about CHUNK_CHARACTERS; a longer line is cut hard. The meta space is left out: it can
    have no piece.
    """
    for text in texts:
        start = 0
        while start < len(text):
            stop = start + CHUNK_CHARACTERS
            line_end = text.find("\n", stop - 1, stop + CHUNK_CHARACTERS)
            stop = line_end + 1 if line_end >= 0 else stop
            yield text[start:stop].replace(META_SPACE, "").replace("\0", "")  # SentencePiece reserves NUL as well
            start = stop


def _sample(chunks: Iterable[str], limit: int) -> list[str]:
    """At most `limit` of the chunks, each equally likely, the same ones each time (reservoir sampling)."""
    kept: list[str] = []
    draw = random.Random(0)
    for index, chunk in enumerate(chunks):
        if index < limit:
            kept.append(chunk)
        elif (slot := draw.randrange(index + 1)) < limit:
            kept[slot] = chunk
    return kept


def _open_model(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        processor.encode("a")
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{name}: not a SentencePiece model, or damaged ({str(error).splitlines()[0]})") from None
    return processor


def _piece_bytes(processor: sentencepiece.SentencePieceProcessor) -> tuple[list[bytes], dict[int, int]]:
    """UTF-8 bytes of each id (marks: none), and the id of each byte piece."""
    bytes_of_id, byte_ids = [], {}
    for number in range(processor.vocab_size()):
        piece = processor.id_to_piece(number)
        if processor.is_byte(number):
            byte = int(piece[3:5], 16)  # "<0x0A>"
            byte_ids[byte] = number
            bytes_of_id.append(bytes([byte]))
        elif processor.is_control(number) or processor.is_unknown(number):
            bytes_of_id.append(b"")
        else:
            bytes_of_id.append(piece.replace(META_SPACE, " ").encode())
    return bytes_of_id, byte_ids


def _read_characters(content: bytes, path: Path) -> str:
    try:
        document = json.loads(content)
        characters = document["characters"]
        if (
            document["kind"] != "characters"
            or not isinstance(characters, str)
            or len(set(characters)) != len(characters)
        ):
            raise ValueError("no list of distinct characters")
        characters.encode()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: not a characters tokenizer, or damaged ({error}); tools/train_tokenizer.py makes one"
        ) from None
    return characters


def known_ids(ids: TokenIds, vocab_size: int) -> np.ndarray:
    """Those of the ids that are inside the vocabulary, as an int64 array. ValueError on a negative one."""
    array = np.asarray(ids, dtype=np.int64).reshape(-1)
    if array.size and int(array.min()) < 0:
        raise ValueError(f"token id {int(array.min())} is negative")
    return array[array < vocab_size]
