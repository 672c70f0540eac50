"""Tokenizers without a library: UTF-8 bytes, and the characters of a fixed alphabet."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llm.errors import UserError
from llm.tokenizers.base import TokenIds, Tokenizer, TokenizerConfig, known_ids
from llm.tokenizers.parts import anywhere, cut


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

    def added_bytes(self, token: int) -> bytes | None:
        return bytes([token]) if token < 256 else b""

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

    def added_bytes(self, token: int) -> bytes | None:
        return self.characters[token].encode() if token < self.bos_id else b""

    def save(self, directory: Path) -> TokenizerConfig:
        (Path(directory) / "tokenizer.json").write_bytes(self.serialized())
        return TokenizerConfig(kind="characters", path="tokenizer.json")

    def serialized(self) -> bytes:
        """The content of the tokenizer's file."""
        return (json.dumps({"kind": "characters", "characters": self.characters}) + "\n").encode()


def read_characters(content: bytes, path: Path) -> str:
    """The alphabet in the content of a file; UserError naming `path` where there is none."""
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
            f"{path}: not a characters tokenizer, or damaged ({error}); `lattice tokenizer` makes one"
        ) from None
    return characters
