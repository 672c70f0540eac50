"""Text as rows: the token stream of a source, cut into rows of T.

Row k covers stream tokens [k T, k T + T]: T inputs and, shifted by one, T labels, so neighbouring rows share one token
and every token but a row's first is a label once. A document's last token gets no label, because what follows it is
another document.

Shapes: T row length.
"""

import numpy as np

from llm.batch import IGNORE
from llm.data.rows import Row, RowTargets, TokenOrigin
from llm.data.source import TokenSource

ROW_START = np.zeros(1, dtype=np.int64)


class Stream:
    """Rows of `seq_len` tokens of a source: the whole ones, or with `to_the_end` also a shorter last one, so that each
    token of the source is read.
    """

    targets: tuple[str, ...] = ("lm",)
    values: tuple[str, ...] = ()

    def __init__(self, source: TokenSource, seq_len: int, to_the_end: bool = False) -> None:
        self.source = source
        self.seq_len = seq_len
        self.fingerprint = source.fingerprint
        self.n_rows = -(-max(0, source.n_tokens - 1) // seq_len) if to_the_end else source.n_rows(seq_len)

    def read(self, k: int, epoch: int) -> Row:
        """Row k, the same in every epoch. IndexError when there is no such row; UserError naming a damaged shard."""
        first = k * self.seq_len
        stream = np.empty(min(self.seq_len + 1, self.source.n_tokens - first), dtype=np.int64)
        starts = self.source.read(first, stream)
        labels = stream[1:].copy()
        labels[starts[starts.searchsorted(1) :] - 1] = IGNORE
        if len(labels) < self.seq_len:
            labels = np.append(labels, IGNORE)
        n = len(labels)
        starts = starts[: starts.searchsorted(n)]
        if not len(starts) or starts[0]:
            starts = np.concatenate((ROW_START, starts))
        return Row(stream[:n], {"lm": RowTargets(labels)}, starts)

    def origin(self, k: int, epoch: int, position: int) -> TokenOrigin:
        document, offset = self.source.document_at(k * self.seq_len + position)
        return TokenOrigin(self.source.origin(document), document, offset, self.source.document_length(document))

    def described(self) -> str:
        return f"({self.source.given.removeprefix('data.train=')}) has {self.source.n_tokens} tokens"
