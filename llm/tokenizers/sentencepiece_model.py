"""What a SentencePiece .model file says, read from its bytes: pieces with scores and kinds, and the few settings that
decide how text becomes pieces.

The file is one protocol buffer (ModelProto of sentencepiece_model.proto); the sentencepiece package hands out no more
than the pieces.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llm.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of pieces."""
UNIGRAM, BPE = 1, 2
"""Kinds of models."""

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3
_MODEL_TYPE, _BYTE_FALLBACK, _UNK_ID, _BOS_ID, _EOS_ID, _UNK_PIECE, _BOS_PIECE, _EOS_PIECE = (
    3,
    35,
    40,
    41,
    42,
    45,
    46,
    47,
)
_CHARSMAP, _PREFIX = 2, 3

Role = Literal["unk", "bos", "eos"]


@dataclass(frozen=True)
class SentencePieceModel:
    """The settings have the format's own defaults where the file leaves them out.

    pieces: (text, score, kind) by id. charsmap: compiled normalisation rules, b"" for none. adds_prefix: a space is put
    before every text. marks: name and id of the unknown, begin and end pieces.
    """

    pieces: tuple[tuple[str, float, int], ...]
    model_type: int
    byte_fallback: bool
    charsmap: bytes
    adds_prefix: bool
    marks: dict[Role, tuple[str, int]]


def read_sentencepiece(content: bytes, name: str = "the SentencePiece model") -> SentencePieceModel:
    """Parse a .model file. UserError when it is none."""
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for field, value in _fields(content):
            if field == _PIECES:
                piece = dict(_fields(_block(value)))
                score = struct.unpack("<f", _block(piece.get(_SCORE, bytes(4))))[0]
                pieces.append((_block(piece[_TEXT]).decode(), score, _signed(piece.get(_KIND, NORMAL))))
            elif field == _TRAINER:
                trainer |= dict(_fields(_block(value)))
            elif field == _NORMALIZER:
                normalizer |= dict(_fields(_block(value)))
        marks: dict[Role, tuple[str, int]] = {
            "unk": (_text(trainer, _UNK_PIECE, "<unk>"), _signed(trainer.get(_UNK_ID, 0))),
            "bos": (_text(trainer, _BOS_PIECE, "<s>"), _signed(trainer.get(_BOS_ID, 1))),
            "eos": (_text(trainer, _EOS_PIECE, "</s>"), _signed(trainer.get(_EOS_ID, 2))),
        }
        return SentencePieceModel(
            pieces=tuple(pieces),
            model_type=_signed(trainer.get(_MODEL_TYPE, UNIGRAM)),
            byte_fallback=bool(trainer.get(_BYTE_FALLBACK, 0)),
            charsmap=_block(normalizer.get(_CHARSMAP, b"")),
            adds_prefix=bool(normalizer.get(_PREFIX, 1)),
            marks=marks,
        )
    except (ValueError, KeyError, IndexError, TypeError, struct.error) as error:
        raise UserError(f"{name}: not a SentencePiece model, or damaged ({error})") from None


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a message: varints as integers, all else as bytes."""
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        wire = tag & 7
        if wire == 0:
            number, at = _varint(content, at)
            yield tag >> 3, number
            continue
        if wire == 2:
            length, at = _varint(content, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > len(content):
            raise ValueError("cut off")
        yield tag >> 3, content[at : at + length]
        at += length


def _varint(content: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = content[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7


def _signed(value: int | bytes) -> int:
    """An int32 of the format: negative ones are written as 64 bits."""
    if isinstance(value, bytes):
        raise ValueError("a block where a number belongs")
    return value - (1 << 64) if value >> 63 else value


def _block(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where a block belongs")
    return value


def _text(message: dict[int, int | bytes], field: int, default: str) -> str:
    return _block(message[field]).decode() if field in message else default
