"""SentencePiece models with byte fallback (Kudo & Richardson 2018, arXiv:1808.06226)."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from llm.errors import UserError
from llm.tokenizers.base import LOSSLESS_PROBE, META_SPACE, TableTokenizer, TokenizerConfig
from llm.tokenizers.parts import PART_CHARACTERS, SafeAt, cut, no_piece_crosses

META_SPACE_UTF8 = META_SPACE.encode()


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
                f"train one with `lattice tokenizer`"
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
                f"train one with `lattice tokenizer`"
            )

    @property
    def control_tokens(self) -> Mapping[str, int]:
        model = self._processor
        return {model.id_to_piece(i): i for i in range(self.vocab_size) if model.is_control(i)}

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
