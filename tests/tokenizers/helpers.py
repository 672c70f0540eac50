"""Texts that are hard to give back, and small tokenizers of every kind that reads a file, for the tokenizer tests."""

import base64
import inspect
import io
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llm.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer
from llm.tokenizers.huggingface import HFTokenizer
from tests.shared import SHARED

FILES = SHARED / "data/tokenizers"

CODE = [inspect.getsource(module) for module in (inspect, json, random)]

NASTY = [
    "",
    " ",
    "   leading and trailing   ",
    "\n",
    "\r\n\r\r\n",
    "\t\ttabs\t",
    "\x00",
    "a\x00b\x00",
    "\u2581",
    "\u2581\u2581 \u2581a\u2581 b",
    " \u2581 ",
    "<s>",
    "</s><unk><pad>",
    "<0x0A><0xE2><0x96><0x81>",
    "\u2585\u2047",  # SentencePiece's own marks for unknown
    "e\u0301 \u00e9 \ufb01 \uff21 \u212b",  # what NFC and NFKC would change
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1ee",
    "\u202eright to left\u202c \u05d0\u05d1\u05d2",
    "\ufeffbyte order mark \u00a0\u3000\u2028\u2029\x85\x0b\x0c",
    "\ufffd\ufffe\U0010ffff",
    "x" * 20_000,
    " " * 5_000 + "\n" * 5_000,
    "def f():\n    return {\n        'a': 1,\n    }\n",
]
SPELLED = [  # texts that spell special tokens
    "<|endoftext|>",
    "a<|endoftext|>b <|eot_id|><|eot|> <|image|><|patch|>",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|end_of_text|>",
    "<bos>text<eos> <mask>",
]
TEXTS = [*NASTY, *SPELLED, *(code[:5000] for code in CODE), "12345 don't DON'T camelCase HTTPServer ///\n//\r\n  x\n\n"]

# The patterns in one piece, as tiktoken takes them.
PATTERNS = {
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "llama4": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


def random_texts(extra_character: str) -> Iterator[str]:
    """The same 300 texts of all scripts each time, in which `extra_character`, blanks and line ends are frequent."""
    draw = random.Random(0)
    for _ in range(300):
        top = draw.choice([0x80, 0x800, 0x3000, 0x110000])
        points = [
            draw.choice([draw.randrange(top), ord(extra_character), 0x20, 0x0A]) for _ in range(draw.randrange(60))
        ]
        yield "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


def rank_file(tokens: list[bytes]) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


BYTES = [bytes([byte]) for byte in range(256)]
RANKS = rank_file([*BYTES, b"he", b"ll", b"hell", b"hello", b" w", b"  ", b"\n\n", b"<|", b"|>"])


def made_hf(special: tuple[str, ...] = ("<|endoftext|>",)) -> dict[str, Any]:
    """A small byte-level BPE as the content of a tokenizer.json."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    tokenizer.train_from_iterator(CODE[:1], trainer)
    return json.loads(tokenizer.to_str())


def sentencepiece_model(size: int, prefix: bool, code: int = 0, cleans: bool = False) -> bytes:
    """A small SentencePiece BPE. `prefix`: it puts a space before a text. `cleans`: it drops blanks."""
    output = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CODE[code][:60_000].splitlines()),
        model_writer=output,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=cleans,
        add_dummy_prefix=prefix,
        minloglevel=2,
    )
    return output.getvalue()


def opened(document: dict[str, Any], bos: str | None = None, eos: str | None = None) -> HFTokenizer:
    return HFTokenizer(json.dumps(document).encode(), bos, eos, "t.json")


def from_shared(kind: str, file: str) -> Tokenizer:
    if not (FILES / file).exists():
        pytest.skip(f"the folder ../shared with {file} is not beside this clone")
    return load_tokenizer(TokenizerConfig(kind=kind, path=str(FILES / file)))
