"""New tokenizers from text: SentencePiece models and alphabets."""

import io
import random
from collections.abc import Iterable, Iterator

import sentencepiece

from llm.errors import UserError
from llm.tokenizers.base import META_SPACE

CHUNK_CHARACTERS = 2000  # SentencePiece drops long training sentences; texts are cut at line ends to about this


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    *,
    model_type: str = "bpe",
    boundaries: str = "script",
    character_coverage: float = 0.9999,
    max_bytes: int = 100_000_000,
    threads: int = 1,
    name: str = "the text",
) -> bytes:
    """Train a lossless SentencePiece model; returns the content of its .model file.

    Args:
        model_type: bpe or unigram.
        boundaries: what a piece may not cross: `script` (SentencePiece's default: spaces and changes of script),
            `space`, or `none`, which learns pieces such as a line end with the indentation after it.
        character_coverage: share of the text's characters that get a piece of their own; the others are written in
            bytes.
        max_bytes: text beyond this is sampled, evenly and repeatably.
        name: of the text in an error.

    UserError when SentencePiece refuses (too little text for the vocabulary, ...).
    """
    output = io.BytesIO()
    sample = _sample(_chunks(texts), max(1, max_bytes // CHUNK_CHARACTERS))
    if not sample:
        raise UserError(f"{name} is empty, so there is nothing to train a tokenizer on")
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
