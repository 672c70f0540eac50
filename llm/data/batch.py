"""Micro-batches: rows side by side, labels already shifted, document boundaries beside them.

Shapes: B rows, T tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llm.batch import IGNORE, Batch, Counts, Targets
from llm.data.source import TokenSource
from llm.datatypes import TransformerInput


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of a step. counts are of this rank's micro-batches; first_row and n_rows are the whole step's
    global rows; wait_s is how long the trainer waited for it; passed_over are ranges (first, end) of global rows of the
    whole step that are not to be trained on.
    """

    micro_batches: list[Batch]
    counts: Counts
    first_row: int
    n_rows: int
    wait_s: float
    passed_over: tuple[tuple[int, int], ...] = ()

    @property
    def is_passed_over(self) -> bool:
        """Whether no row of the step is to be trained on."""
        return sum(end - first for first, end in self.passed_over) == self.n_rows


def collate(
    rows: Sequence[tuple[TokenSource, int] | None], seq_len: int, fill: int = 0, sequence_len: int | None = None
) -> Batch:
    """Read rows (source, row number) into a batch whose targets are the next tokens, called `lm`.

    `sequence_len`, a divisor of seq_len, cuts each row into sequences of that many tokens, in order: the tensors are
    then (rows x seq_len / sequence_len, sequence_len). Labels stay: the last token of a sequence still predicts the
    next one's first.

    A document's last token gets no label, because what follows it is another document. A row past the end of its
    source, or None, is filled up with tokens `fill` without labels, in a segment of their own.
    """
    stream = np.full((len(rows), seq_len + 1), fill, dtype=np.int64)
    n_filled = np.zeros(len(rows), dtype=np.int64)
    row_starts = np.arange(0, (len(rows) + 1) * seq_len, seq_len)
    inner_starts = [row_starts[:0]]
    filler_starts = [row_starts[:0]]
    for b, place in enumerate(rows):
        if place is not None:
            source, k = place
            n_filled[b] = length = min(seq_len + 1, source.n_tokens - k * seq_len)
            starts = source.read(k * seq_len, stream[b, :length])
            inner_starts.append(starts[starts.searchsorted(1) :] + b * seq_len)
    labels_BT = stream[:, 1:].copy()
    labels_BT.reshape(-1)[np.concatenate(inner_starts) - 1] = IGNORE
    for b in np.flatnonzero(n_filled <= seq_len).tolist():
        labels_BT[b, max(0, n_filled[b] - 1) :] = IGNORE
        filler_starts.append(b * seq_len + n_filled[b : b + 1])
    width = sequence_len or seq_len
    if seq_len % width:
        raise ValueError(f"sequences of {width} tokens do not fill a row of {seq_len}")
    starts = np.arange(0, row_starts[-1] + 1, width)
    bounds = np.unique(np.concatenate([starts, *inner_starts, *filler_starts])).astype(np.int32)
    whole = n_filled >= seq_len
    valid_BT = None if whole.all() else torch.from_numpy(np.arange(seq_len) < n_filled[:, None]).view(-1, width)
    return Batch(
        TransformerInput(torch.from_numpy(stream[:, :-1].copy()).view(-1, width), cu_seqlens=torch.from_numpy(bounds)),
        {"lm": Targets(torch.from_numpy(labels_BT).view(-1, width))},
        valid_BT,
    )
