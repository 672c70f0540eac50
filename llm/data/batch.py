"""Micro-batches: rows side by side, boundaries of documents and samples beside them.

Shapes: B rows, T tokens and M source tokens of a row, S pixels a side of a tile.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from llm.batch import IGNORE, Batch, Counts, Targets
from llm.data.balance import Tiles
from llm.data.rows import Row
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
    tiles: Tiles | None = None
    """Of the whole step; None where its rows have none."""

    @property
    def is_passed_over(self) -> bool:
        """Whether no row of the step is to be trained on."""
        return sum(end - first for first, end in self.passed_over) == self.n_rows


def collate(
    rows: Sequence[Row | None],
    seq_len: int,
    fill: int = 0,
    sequence_len: int | None = None,
    targets: Sequence[str] = ("lm",),
    values: Sequence[str] = (),
    features: int | None = None,
    source_len: int | None = None,
) -> Batch:
    """Rows side by side, each filled up to `seq_len` positions with tokens `fill` without labels, in a segment of their
    own; None stands for a row that is not there. The batch has the targets and values of these names, whichever rows
    have them. Its images are those of the rows, (n, 3, S, S), in the order of their slots; None where no row has any.
    Causal is each row as it says; one that is not there is as the first that is. features: values of a position, of
    rows of values; 0 where there is no data.

    `sequence_len`, a divisor of seq_len, cuts each row into sequences of that many tokens, in order: the tensors are
    then (rows x seq_len / sequence_len, sequence_len). Labels stay: the last token of a sequence still predicts the
    next one's first.

    `source_len`, M, makes the batch one for an encoder-decoder: its sources are those of the rows, each filled up to so
    many positions, and what fills up either side is padding. ValueError where a row has no source.
    """
    width = sequence_len or seq_len
    if seq_len % width:
        raise ValueError(f"sequences of {width} tokens do not fill a row of {seq_len}")
    shape = (len(rows), seq_len)
    tokens_BT = np.full(shape, fill, dtype=np.int64)
    labels = {name: np.full(shape, IGNORE, dtype=np.int64) for name in targets}
    weights: dict[str, np.ndarray] = {}
    numbers = {name: np.zeros(shape, dtype=np.float32) for name in values}
    read_BTF = None if features is None else np.zeros((*shape, features), dtype=np.float32)
    n_filled = np.zeros(len(rows), dtype=np.int64)
    bounds = [np.arange(0, len(rows) * seq_len + 1, width)]
    for b, row in enumerate(rows):
        if row is None:
            continue
        n_filled[b] = n = len(row.tokens)
        tokens_BT[b, :n] = row.tokens
        if read_BTF is not None and row.features is not None:
            read_BTF[b, :n] = row.features
        bounds.append(row.starts + b * seq_len)
        for name, of_row in row.targets.items():
            labels[name][b, :n] = of_row.labels
            if of_row.weights is not None:
                weights.setdefault(name, np.ones(shape, dtype=np.float32))[b, :n] = of_row.weights
        for name, number in row.values.items():
            numbers[name][b, :n] = number
    images = [row.images for row in rows if row is not None and row.images is not None]
    short = np.flatnonzero(n_filled < seq_len)
    cu_seqlens = np.unique(np.concatenate([*bounds, short * seq_len + n_filled[short]])).astype(np.int32)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).view(-1, width)

    tiles = torch.from_numpy(np.concatenate(images)) if images else None
    inputs = TransformerInput(
        tensor(tokens_BT),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        images=tiles,
        causal=_causal(rows, seq_len // width),
        features=None if read_BTF is None else torch.from_numpy(read_BTF).view(-1, width, read_BTF.shape[2]),
    )
    if source_len is not None:
        if width < seq_len:
            raise ValueError("rows with a source are not cut into sequences")
        inputs = replace(
            inputs,
            tokens_position=_positions(n_filled, seq_len, cu_seqlens) if len(short) else None,
            source=_sources(rows, source_len, fill),
        )
    return Batch(
        inputs,
        {name: Targets(tensor(labels[name]), tensor(weights[name]) if name in weights else None) for name in targets},
        None if not len(short) else tensor(np.arange(seq_len) < n_filled[:, None]),
        values={name: tensor(number) for name, number in numbers.items()},
    )


def _sources(rows: Sequence[Row | None], length: int, fill: int) -> TransformerInput:
    """The encoder's side of rows, (B, length)."""
    shape = (len(rows), length)
    tokens_BM, n_filled = np.full(shape, fill, dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    bounds = [np.arange(0, len(rows) * length + 1, length)]
    for b, row in enumerate(rows):
        if row is None:
            continue
        if row.source is None:
            raise ValueError("a row without a source stands among those of an encoder-decoder")
        n_filled[b] = m = len(row.source.tokens)
        tokens_BM[b, :m] = row.source.tokens
        bounds.append(row.source.starts + b * length)
    short = np.flatnonzero(n_filled < length)
    cu_seqlens = np.unique(np.concatenate([*bounds, short * length + n_filled[short]])).astype(np.int32)
    return TransformerInput(
        torch.from_numpy(tokens_BM),
        tokens_position=_positions(n_filled, length, cu_seqlens) if len(short) else None,
        cu_seqlens=torch.from_numpy(cu_seqlens),
    )


def _positions(n_filled: np.ndarray, length: int, cu_seqlens: np.ndarray) -> torch.Tensor:
    """(B, length) int64: of each token in its document, -1 of what fills rows up."""
    sizes = np.diff(cu_seqlens)
    positions = np.arange(len(n_filled) * length) - np.repeat(cu_seqlens[:-1], sizes)
    there = np.arange(length) < n_filled[:, None]
    return torch.from_numpy(np.where(there, positions.reshape(there.shape), -1))


def _causal(rows: Sequence[Row | None], sequences: int) -> bool | torch.Tensor:
    """Of all rows, or of each of the tensors, where they differ. sequences: into which each row was cut."""
    first = next((row.causal for row in rows if row is not None), True)
    of_each = [first if row is None else row.causal for row in rows]
    return first if all(causal == first for causal in of_each) else torch.tensor(of_each).repeat_interleave(sequences)
