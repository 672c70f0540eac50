"""tiktoken's rank files, the form of Llama 3's and 4's tokenizers: a line for each token, base64 of its bytes and rank.

A rank file holds neither the pattern that cuts text into words nor the special tokens; both are a row of VARIANTS here.

Facts (patterns, special tokens, limits on runs) after meta-llama/llama-models, models/llama3/tokenizer.py and
models/llama4/tokenizer.py; `encode` gives the ids of those.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tiktoken

from llm.errors import UserError
from llm.tokenizers.base import TableTokenizer, TokenizerConfig

VariantName = Literal["llama3", "llama4"]

# tiktoken's pattern engine gives up on very long texts and runs of blanks, so Llama's own tokenizers encode at most so
# many characters at once, and break a run of blanks, or of anything else, after so many.
MAX_CHARACTERS = 400_000
MAX_RUN = 25_000
LONG_RUN = re.compile(rf"(?<!\S)\S{{{MAX_RUN + 1},}}|(?<!\s)\s{{{MAX_RUN + 1},}}")

CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"  # letters without case are in both


@dataclass(frozen=True)
class Variant:
    """What a rank file does not say."""

    pattern: str
    """regular expression whose matches are encoded one by one"""
    n_ranks: int
    """number of ranks in the published file"""
    special: tuple[str, ...]
    """names of the special tokens; their ids follow the ranks"""
    ends: tuple[str, ...]
    """names of those that end a turn or a message, and with it a generation"""


def _names(count: int, prefix: str, named: dict[int, str], skip: tuple[int, ...] = ()) -> tuple[str, ...]:
    """`count` names: `named` gives some by place, the others are reserved and numbered in order, without `skip`."""
    numbers = (number for number in range(count + len(skip)) if number not in skip)
    return tuple(
        f"<|{named[place]}|>" if place in named else f"<|{prefix}reserved_special_token_{next(numbers)}|>"
        for place in range(count)
    )


VARIANTS: dict[VariantName, Variant] = {
    "llama3": Variant(
        pattern=rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}",
        n_ranks=128_000,
        special=_names(
            256,
            "",
            {
                0: "begin_of_text",
                1: "end_of_text",
                4: "finetune_right_pad_id",
                5: "step_id",
                6: "start_header_id",
                7: "end_header_id",
                8: "eom_id",
                9: "eot_id",
                10: "python_tag",
                11: "image",
            },
        ),
        ends=("<|eom_id|>", "<|eot_id|>"),
    ),
    "llama4": Variant(
        pattern=(
            rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+{CONTRACTION}?"
            rf"|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*{CONTRACTION}?"
            rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
        ),
        n_ranks=200_000,
        special=(
            *_names(5, "", dict(enumerate(["begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"]))),
            *_names(  # from 200005; the numbers 6 and 7 do not exist
                75,
                "text_post_train_",
                {
                    0: "header_start",
                    1: "header_end",
                    2: "eom",
                    3: "eot",
                    4: "step",
                    11: "python_start",
                    12: "python_end",
                    13: "finetune_right_pad",
                },
                skip=(6, 7),
            ),
            *_names(  # from 200080
                1054,
                "vision_",
                {
                    0: "image_start",
                    1: "image_end",
                    4: "tile_x_separator",
                    5: "tile_y_separator",
                    10: "image",
                    12: "patch",
                },
            ),
            *_names(10, "reasoning_", {8: "reasoning_thinking_start", 9: "reasoning_thinking_end"}),  # from 201134
            *_names(904, "", {}),  # from 201144, up to the vocabulary of 202048
        ),
        ends=("<|eom|>", "<|eot|>"),
    ),
}


class TiktokenTokenizer(TableTokenizer):
    """Byte-level BPE by ranks. The special tokens have ids, but tiktoken does not know them: a text that spells one is
    text, only a prompt may spell them.
    """

    kind = "tiktoken"

    def __init__(self, ranks: bytes, variant: VariantName | None = None, name: str = "the tiktoken rank file") -> None:
        """`ranks`: content of a rank file; `variant`: None = by the number of ranks; `name` is used in
        errors. UserError when the file is damaged or the variant is unknown.

        Attributes:
            special_tokens: ids of the special tokens by name.
        """
        self._file = ranks
        rank_of = _read_ranks(ranks, name)
        self.variant = _checked_variant(len(rank_of), variant, name)
        facts = VARIANTS[self.variant]
        self.special_tokens = {token: len(rank_of) + place for place, token in enumerate(facts.special)}
        self._special = re.compile("(" + "|".join(map(re.escape, facts.special)) + ")")
        self.vocab_size = len(rank_of) + len(facts.special)
        self.bos_id = self.special_tokens["<|begin_of_text|>"]
        self.eos_id = self.special_tokens["<|end_of_text|>"]
        self.fingerprint = hashlib.blake2b(
            b"tiktoken\0%s\0" % self.variant.encode() + ranks, digest_size=16
        ).hexdigest()
        self._bytes_of_id = sorted(rank_of, key=rank_of.__getitem__) + [b""] * len(facts.special)
        self._encoding = tiktoken.Encoding(
            self.variant, pat_str=facts.pattern, mergeable_ranks=rank_of, special_tokens={}
        )

    def encode(self, text: str) -> list[int]:
        text.encode()  # tiktoken would replace lone surrogates without a word
        return [number for part in encodable(text) for number in self._encoding.encode_ordinary(part)]

    def parts(self, text: str) -> list[str]:
        return [text[i : i + MAX_CHARACTERS] for i in range(0, len(text), MAX_CHARACTERS)] or [text]

    @property
    def control_tokens(self) -> Mapping[str, int]:
        return self.special_tokens

    @property
    def end_ids(self) -> tuple[int, ...]:
        return (self.eos_id, *(self.special_tokens[name] for name in VARIANTS[self.variant].ends))

    def prompt_ids(self, text: str) -> list[int]:
        ids = [*self.begin_ids]
        for i, part in enumerate(self._special.split(text)):  # text and special tokens in turn
            ids += [self.special_tokens[part]] if i % 2 else self.encode(part)
        return ids

    def document(self) -> dict[str, Any]:
        """The content of a tokenizer.json with the same ids, but for runs of more than MAX_RUN characters."""
        from llm.tokenizers.tokenizer_json import ranks_document

        ranks = {token: rank for rank, token in enumerate(self._bytes_of_id) if token}
        return ranks_document(ranks, VARIANTS[self.variant].pattern, self.special_tokens)

    def save(self, directory: Path) -> TokenizerConfig:
        (Path(directory) / "tokenizer.model").write_bytes(self._file)
        return TokenizerConfig(kind="tiktoken", path="tokenizer.model", variant=self.variant)


def encodable(text: str) -> Iterator[str]:
    """The text cut where Llama's tokenizers cut it: every MAX_CHARACTERS, and in these parts after every MAX_RUN
    characters of a run of blanks or of other characters. Nearly every text is one part.
    """
    for start in range(0, len(text), MAX_CHARACTERS):
        part = text[start : start + MAX_CHARACTERS]
        cuts = [cut for run in LONG_RUN.finditer(part) for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN)]
        for begin, end in zip([0, *cuts], [*cuts, len(part)], strict=True):
            yield part[begin:end]


def _read_ranks(content: bytes, name: str) -> dict[bytes, int]:
    """Rank of each token. UserError unless the ranks are 0, 1, 2, ..., the tokens differ and every byte is one."""
    rank_of: dict[bytes, int] = {}
    lines = content.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            if not token or not rank.isdigit():
                raise ValueError
        except (ValueError, binascii.Error):
            raise UserError(
                f"{name}: not a tiktoken rank file, or damaged (line {number} is not a token in base64 and its rank)"
            ) from None
        if token in rank_of:
            raise UserError(f"{name}: damaged (line {number} repeats an earlier token)")
        rank_of[token] = int(rank)
    if set(rank_of.values()) != set(range(len(lines))):
        raise UserError(f"{name}: damaged (its {len(lines)} ranks are not 0 to {len(lines) - 1}, each once)")
    for byte in range(256):
        if bytes([byte]) not in rank_of:
            raise UserError(f"{name}: damaged (the byte 0x{byte:02X} has no rank, so it would be lost)")
    return rank_of


def _checked_variant(n_ranks: int, variant: VariantName | None, name: str) -> VariantName:
    """The variant, by the number of ranks where it is not given."""
    published = next((known for known, facts in VARIANTS.items() if facts.n_ranks == n_ranks), None)
    if published is not None and variant in (None, published):
        return published
    if published is not None:
        raise UserError(f"{name}: tokenizer.variant={variant}, but its {n_ranks} ranks are those of {published}")
    if variant is None:
        known = ", ".join(f"{known} ({facts.n_ranks} ranks)" for known, facts in VARIANTS.items())
        raise UserError(
            f"{name}: its {n_ranks} ranks do not show whose special tokens go with them; the file is cut off, or "
            f"tokenizer.variant must say one of {known}"
        )
    return variant
