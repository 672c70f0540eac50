"""A kind of data from outside the tree: files of numbers, one a line, whose rows are sequences that count up in steps
of that number, modulo the vocabulary. No file is tokenised and nothing is stored.

In a run config: `extensions: [docs/extend/intervals.py]`, `data.train: [{path: steps.txt, kind: intervals}]`.
"""

import hashlib
from pathlib import Path

import numpy as np

from llm.data.kinds import Asked, Kind, Opened, register
from llm.data.rows import Origin, Row, RowTargets, TokenOrigin
from llm.data.sources import SourceFiles
from llm.errors import UserError


class IntervalRows:
    """One row a line."""

    targets: tuple[str, ...] = ("lm",)
    values: tuple[str, ...] = ()

    def __init__(self, file: Path, seq_len: int, vocab_size: int) -> None:
        self.file, self.seq_len, self.vocab_size = str(file), seq_len, vocab_size
        text = file.read_text()
        self.fingerprint = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self.steps = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.isdecimal():
                raise UserError(f"{file}, line {number}: {line!r} is no number")
            self.steps.append(int(line))
        self.n_rows = len(self.steps)

    def read(self, k: int, epoch: int) -> Row:
        """Row k begins elsewhere in every epoch."""
        tokens = (epoch + self.steps[k] * np.arange(self.seq_len + 1)) % self.vocab_size
        return Row(tokens[:-1], {"lm": RowTargets(tokens[1:])}, np.zeros(1, dtype=np.int64))

    def origin(self, k: int, epoch: int, position: int) -> TokenOrigin:
        return TokenOrigin(Origin(self.file, k + 1), k, position, self.seq_len)

    def described(self) -> str:
        return f"({self.file}) has {self.n_rows} lines"


class Intervals(Kind):
    name = "intervals"
    packings = ("none",)

    def open(self, files: SourceFiles, asked: Asked) -> Opened:
        rows = IntervalRows(Path(files.spec.path), asked.seq_len, asked.tokenizer.vocab_size)
        return Opened(rows, given=files.given, notes=(f"{files.given}: {rows.n_rows} steps",))


register(Intervals())
