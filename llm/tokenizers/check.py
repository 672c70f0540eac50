"""Whether a tokenizer of ours and one of `transformers` are the same: ids of prompts, and texts of ids."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llm.errors import UserError
from llm.tokenizers.base import Tokenizer

EDGES = (
    "", " ", "  ", "\n", "\t", "\r\n", " a", "a ", "  a  b  ", "\na\n", "a\n\n\n b", "\ta\t", "Once upon a time",
    "def f(x):\n    return x\n", "a\u2581b", "\u2581", "\u2581\u2581a \u2581", "\x00", "a\x00b", "\ufeffa",
    "\u00a0a\u3000", "e\u0301", "\u00e9 \ufb01 \uff21 \u212b", "\u0928\u093f", "\U0001f468\u200d\U0001f469",
    "\u4e9c\u9aea", "1234567890 3.14 007", "don't I'LL we've", "camelCase HTTPServer",
    "x" * 3000, " " * 500, "\n" * 300, "ab" * 1500,
    "<s>", "</s>", "<unk>", "<pad>", "<0x0A>", "<0xE2><0x96><0x81>", "<|endoftext|>", "a<|endoftext|>b",
    "<|im_start|>user\n", "<|begin_of_text|>", "<|eot_id|> <|eot|>", "<bos><eos> <mask>",
    "[INST] a [/INST]", "<start_of_turn>", "</s> a <s>b",
)  # fmt: skip
"""Texts at which tokenizers are known to part."""


@dataclass(frozen=True)
class Difference:
    """A text of which the two make different ids, or (`what`) ids of which they make different texts."""

    what: str
    text: str
    ours: Any
    theirs: Any

    def __str__(self) -> str:
        return f"{self.what} of {_short(self.text)}: {_short(self.ours)} here, {_short(self.theirs)} there"


def compare(ours: Tokenizer, theirs: Any, texts: Iterable[str]) -> list[Difference]:
    """All differences between `ours` and `theirs`, a tokenizer of transformers, on the texts.

    Ids are those of a prompt; decoding leaves special tokens out. A text that one refuses must be refused by both. An
    empty text for which theirs has no id is `ours.bos_id` here, as something must begin a generation; that is no
    difference.
    """
    found = []
    for text in texts:
        mine, yours = _ids(ours, text), _their_ids(theirs, text)
        if mine != yours and not (yours == [] and mine == [ours.bos_id]):
            found.append(Difference("the ids", text, mine, yours))
        elif yours:
            shown, there = ours.decode(yours), theirs.decode(yours, skip_special_tokens=True)
            if shown != there:
                found.append(Difference("the text of the ids", text, shown, there))
    return found


def _ids(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """None where the text cannot be written."""
    try:
        return tokenizer.prompt_ids(text)
    except UserError:
        return None


def _their_ids(tokenizer: Any, text: str) -> list[int] | None:
    try:
        return list(tokenizer(text)["input_ids"])
    except Exception as error:  # the library raises nothing narrower
        if "UNK" in str(error):
            return None
        raise


def check_texts(count: int = 1000, spelled: Sequence[str] = (), seed: int = 0) -> Iterator[str]:
    """`count` texts, the same ones each time: EDGES, and random ones of all scripts with blanks at both ends, runs,
    combining marks, digits, line ends and control strings (`spelled`, names of special tokens, among them)."""
    draw = random.Random(seed)
    words = [text for text in EDGES if 0 < len(text) < 100]
    words += [*spelled, "the", " quick", " brown", "0", "12", "e\u0301", "\n", " ", "  ", "\t", "ing", ". "]
    yield from EDGES[:count]
    for _ in range(count - len(EDGES)):
        parts = []
        for _ in range(draw.randrange(1, 12)):
            if draw.random() < 0.5:
                parts.append(draw.choice(words))
            else:
                top = draw.choice([0x80, 0x250, 0x800, 0x3000, 0x110000])
                points = [draw.randrange(0x20, top) for _ in range(draw.randrange(1, 8))]
                parts.append("".join(chr(point) for point in points if not 0xD800 <= point < 0xE000))
        yield draw.choice(["", " ", "\n", "  "]) + "".join(parts) + draw.choice(["", " ", "\n"])


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
