"""Layers whose state is built from a shorter stream: s tokens of a document make one vector of it, once all are there.

Chunks count from each document's first token. Token t of a document sees chunk k from its last token on: k <= j(t) with
j(t) = floor((t + 1) / s) - 1, so its own chunk only where t ends it. Chunks of the documents of a row lie one after the
other, without gaps, whatever the documents' lengths.

Shapes: B rows, T tokens, L tokens of a stream (where rows go on, s - 1 earlier ones before the T), K chunks, s stride,
D model width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llm.init import Constant
from llm.kernels.graph_breaks import graph_break
from llm.layers.parameter import ParamInfo, Rows

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Chunks:
    """The chunks that the tokens of a forward complete, for one stride."""

    tokens_BKs: Tensor
    """int64: places in the stream of a chunk's tokens; 0 where a row has no such chunk."""
    ends_BK: Tensor
    """int64: its last token among the T."""
    there_BK: Tensor | None
    """bool: which there are; None where all are. They come first in each row."""
    documents_BK: Tensor | None
    """int64 that rises from document to document; None where no row has chunks of two."""
    seen_BT: Tensor
    """int64: of each token, the last chunk among the K that it sees; -1 where that is none of them."""
    first_BT: Tensor
    """int64: of each token, the first chunk of its document among all that are kept: the K, or where rows go on, all of
    the row."""
    last_BT: Tensor
    """int64: and the last one that it sees among them; below the first where it sees none."""
    slots_BK: Tensor
    """int64: the number of each chunk in its document."""
    filled: tuple[Tensor, Tensor]
    """int64: rows and columns, among the K, of those that are there."""
    left_Bs: Tensor
    """int64, (B, s - 1): places in the stream of the last tokens, which a later call begins with."""
    kept: int
    """Chunks of the longest row, with those of earlier calls where rows go on."""


class Strides:
    """The chunks of one forward, for each stride when first asked for."""

    def __init__(
        self, positions_BT: Ints, document_starts: Ints, first_position_B: Ints | None, device: torch.device
    ) -> None:
        """positions: negative for padding, which stands before or behind the tokens of a document. first_position:
        where rows go on; None where they begin. ValueError where positions do not count from 0, one by one.
        """
        self._positions_BT, self._device = positions_BT, device
        begins = np.zeros(positions_BT.size, dtype=np.int64)
        begins[document_starts] = 1
        self._documents_BT = begins.reshape(positions_BT.shape).cumsum(1)
        self._continued = first_position_B is not None
        self._first_B = np.zeros(len(positions_BT), np.int64) if first_position_B is None else first_position_B
        self._found: dict[int, Chunks] = {}
        self._check()

    @graph_break  # it works with numbers on the host
    def of(self, stride: int) -> Chunks:
        """Those of a stride."""
        if stride not in self._found:
            self._found[stride] = self._chunks(stride)
        return self._found[stride]

    def _check(self) -> None:
        positions_BT, documents_BT = self._positions_BT, self._documents_BT
        for row, (positions_T, documents_T) in enumerate(zip(positions_BT, documents_BT, strict=True)):
            there = positions_T >= 0
            positions, documents = positions_T[there], documents_T[there]
            begins = np.append(True, documents[1:] != documents[:-1])[: len(positions)]
            expected = np.where(begins, self._first_B[row], np.append(0, positions[:-1] + 1)[: len(positions)])
            if (wrong := np.flatnonzero(positions != expected)).size:
                raise ValueError(
                    f"row {row}: layers with a stride count the tokens of a document from 0, one by one; a token at "
                    f"position {positions[wrong[0]]} stands where {expected[wrong[0]]} comes next"
                )

    def _chunks(self, s: int) -> Chunks:
        positions_BT, documents_BT = self._positions_BT, self._documents_BT
        there_BT = positions_BT >= 0
        closes_BT = there_BT & ((positions_BT + 1) % s == 0)
        closed_BT = closes_BT.cumsum(1)
        rows, columns = np.nonzero(closes_BT)
        numbers = closed_BT[rows, columns] - 1
        count = max(1, int(closed_BT[:, -1].max()))
        shape = len(positions_BT), count
        ends_BK, documents_BK, slots_BK = (np.zeros(shape, np.int64) for _ in range(3))
        ends_BK[rows, numbers], documents_BK[rows, numbers] = columns, documents_BT[rows, columns]
        slots_BK[rows, numbers] = positions_BT[rows, columns] // s
        all_there_BK = np.arange(count) < closed_BT[:, -1:]
        # chunks of earlier documents of the row
        fresh_BT = np.diff(documents_BT, axis=1, prepend=0) > 0
        before_BT = np.where(fresh_BT, closed_BT - closes_BT, 0)
        np.maximum.accumulate(before_BT, axis=1, out=before_BT)
        seen_BT = np.where(there_BT & (closed_BT > before_BT), closed_BT - 1, -1)
        first_BT, last_BT = (np.zeros_like(seen_BT), (positions_BT + 1) // s - 1) if self._continued else (
            before_BT, np.where(there_BT, closed_BT - 1, -1)
        )  # fmt: skip
        several = any(len(set(row[mine])) > 1 for row, mine in zip(documents_BK, all_there_BK, strict=True))
        tokens_BKs = self._places(ends_BK[..., None] - np.arange(s - 1, -1, -1), s) * all_there_BK[..., None]
        return Chunks(
            tokens_BKs=self._on_device(tokens_BKs),
            ends_BK=self._on_device(ends_BK),
            there_BK=None if all_there_BK.all() else self._on_device(all_there_BK),
            documents_BK=self._on_device(documents_BK) if several else None,
            seen_BT=self._on_device(seen_BT),
            first_BT=self._on_device(first_BT),
            last_BT=self._on_device(last_BT),
            slots_BK=self._on_device(slots_BK),
            filled=(self._on_device(rows), self._on_device(numbers)),
            left_Bs=self._on_device(self._left(s)),
            kept=int(((positions_BT.max(1) + 1).clip(min=self._first_B) // s).max()) if self._continued else count,
        )

    def _places(self, columns: Ints, s: int) -> Ints:
        """Places in the stream of columns (B, ...) of the T tokens, which may reach into those before the first."""
        if not self._continued:
            return columns
        there_BT = self._positions_BT >= 0
        first_B = np.where(there_BT.any(1), there_BT.argmax(1), 0).reshape(-1, *[1] * (columns.ndim - 1))
        return np.where(columns >= first_B, s - 1 + columns, s - 1 - first_B + columns)

    def _left(self, s: int) -> Ints:
        there_BT = self._positions_BT >= 0
        length = there_BT.shape[1]
        last_B = np.where(there_BT.any(1), length - 1 - there_BT[:, ::-1].argmax(1), -1)
        return self._places(last_B[:, None] + 1 - np.arange(s - 1, 0, -1), s)

    def _on_device(self, found: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(found)).to(self._device)


class Pool(nn.Module):
    """A chunk's vector: the sum of its tokens', each channel times a weight of its own for each place, (s, D)."""

    def __init__(self, stride: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(stride, dim))

    @staticmethod
    def declare(stride: int, dim: int) -> Rows:
        """Begins as the mean."""
        return {"weight": ParamInfo((stride, dim), "bias", Constant(1 / stride))}

    def forward(self, stream_BLD: Tensor, tokens_BKs: Tensor) -> Tensor:
        """(B, K, D)."""
        n_rows, length, _ = stream_BLD.shape
        flat = tokens_BKs + torch.arange(n_rows, device=tokens_BKs.device)[:, None, None] * length
        taken = stream_BLD.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, tokens_BKs.shape)
        return (taken * self.weight).sum(2)


def at_chunks(values_BT: Tensor, index_BK: Tensor) -> Tensor:
    """Of values (B, T, ...), or (1, T, ...) where rows are alike, those at some places of each row, (B, K, ...)."""
    values_BT = values_BT.expand(len(index_BK), *values_BT.shape[1:])
    rows = torch.arange(len(index_BK), device=index_BK.device)[:, None]
    return values_BT[rows, index_BK]
