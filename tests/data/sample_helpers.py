"""A kind of samples for tests, in byte tokens: rows {text, weights} or {one, other}, whose weights are of the bytes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.kinds import KINDS, Asked, ChatOptions, Opened, register
from llm.data.opening import check_rows, open_rows, prepare_rows
from llm.data.packed import Packed
from llm.data.sample import Sample
from llm.data.sample_kind import Content, SampleKind
from llm.data.sources import SourceFiles, SourceSpec, sides
from llm.errors import UserError
from llm.tokenizer import ByteTokenizer


def sample_of(text: str, weights: Sequence[float] | None = None, turns: Sequence[int] = ()) -> Sample:
    """A sample of a text; trained is every byte where nothing else is said, and it may be cut after so many bytes."""
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
    factors = np.ones(len(tokens)) if weights is None else np.array(weights)
    return Sample(tokens, factors.astype(np.float32), np.array([*turns, len(tokens)], dtype=np.int64))


class Bytes:
    """Reads rows {text, weights, turns}."""

    fingerprint = "bytes"

    def read(self, row: Mapping[str, Any]) -> Content:
        if "text" not in row:
            raise UserError(f"has no column 'text'; it has {', '.join(map(repr, row))}")
        return Content(
            row["text"].encode(),
            lambda: (sample_of(row["text"], row.get("weights"), row.get("turns") or ()),),
        )


class Pairs:
    """Reads rows {one, other}."""

    fingerprint = "pairs"

    def read(self, row: Mapping[str, Any]) -> Content:
        return Content(json.dumps(row).encode(), lambda: (sample_of(row["one"]), sample_of(row["other"])))


class ByteSamples(SampleKind):
    name = "byte_samples"

    def encoder(self, files: SourceFiles, asked: Asked) -> Bytes:
        return Bytes()


class BytePairs(SampleKind):
    name = "byte_pairs"
    target = "dpo"
    samples_per_item = 2

    def encoder(self, files: SourceFiles, asked: Asked) -> Pairs:
        return Pairs()


for kind in (ByteSamples(), BytePairs()):
    if kind.name not in KINDS:
        register(kind)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """A JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def random_rows(n: int, seed: int = 0, longest: int = 60) -> list[dict[str, Any]]:
    """Rows of different texts of 2 to `longest` bytes, half of each trained."""
    draw = np.random.default_rng(seed)
    rows = []
    for length in draw.integers(2, longest + 1, n).tolist():
        text = "".join(draw.choice(list("abcdefgh"), size=length))
        rows.append({"text": text, "weights": [0] * (length // 2) + [1] * (length - length // 2)})
    return rows


def asked_for(folder: Path, seq_len: int = 64, **more: Any) -> Asked:
    """What a run with byte tokens asks."""
    return Asked(ByteTokenizer(), folder / "cache", seq_len, **{"seed": 0, **more})


def opened(
    path: str,
    asked: Asked,
    kind: str = "byte_samples",
    valid: str | float | None = None,
    columns: Mapping[str, str] | None = None,
) -> dict[str, Opened]:
    """The source of a path by role, prepared and opened."""
    found = {}
    held = [SourceSpec(path=valid, kind=kind)] if isinstance(valid, str) else valid
    for role, side in sides([SourceSpec(path=path, kind=kind, columns=dict(columns or {}))], held).items():
        of_side = Asked(**{**vars(asked), "split": side.split, "held_out": role == "data.valid"})
        check_rows(side, of_side.cache_dir)
        prepare_rows(side, of_side)
        ((_, found[role], _),) = open_rows(side, of_side)
    return found


def packed(path: str, asked: Asked, kind: str = "byte_samples") -> Packed:
    """The rows of a path."""
    rows = opened(path, asked, kind)["data.train"].rows
    assert isinstance(rows, Packed)
    return rows


def chat(**options: Any) -> ChatOptions:
    """The section `chat`."""
    return ChatOptions(**options)
