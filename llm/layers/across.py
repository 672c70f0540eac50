"""Which tokens of a decoder see which of the encoder's: document i of a row those of document i of the row's source.

Shapes: B rows, T tokens and S source tokens of a row, H query heads, K kv heads, d head width.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llm.args import AttentionSpec
from llm.kernels.across import Documents, Pairs, across_attention
from llm.kernels.segments import Ints
from llm.layers.dropout import AttentionDropout


class AttendAcross(Protocol):
    """What the attention of a decoder's layer to the encoder's memory is given."""

    def __call__(
        self, layer: int, spec: AttentionSpec, q_BTHd: Tensor, k_BSKd: Tensor | None, v_BSKd: Tensor | None
    ) -> Tensor:
        """(B, T, H, d). layer: its number, by which keys and values are remembered; they are None where they are
        remembered from an earlier forward."""


class AcrossMasks:
    """The pairs of documents of one batch."""

    def __init__(
        self,
        positions_BT: Ints,
        document_starts: Ints,
        source_positions_BS: Ints,
        source_starts: Ints,
        device: torch.device,
        dropout: AttentionDropout | None = None,
    ) -> None:
        """Positions of each token, negative for padding, and rising flat indices of documents. Documents that are
        padding alone do not count: of the others each row must have as many on either side, else ValueError.
        """
        queries, row_of_query = _documents(positions_BT, document_starts)
        keys, row_of_key = _documents(source_positions_BS, source_starts)
        counts, of_source = (np.bincount(rows, minlength=len(positions_BT)) for rows in (row_of_query, row_of_key))
        if (counts != of_source).any():
            row = int(np.flatnonzero(counts != of_source)[0])
            raise ValueError(
                f"inputs.source must have the documents of inputs, in the same order: row {row} has {counts[row]} of "
                f"them, and {of_source[row]} sources"
            )
        self._pairs = Pairs(queries, keys, device)
        self._dropout = dropout

    def __call__(
        self, layer: int, spec: AttentionSpec, q_BTHd: Tensor, k_BSKd: Tensor | None, v_BSKd: Tensor | None
    ) -> Tensor:
        assert k_BSKd is not None and v_BSKd is not None
        lost = None if self._dropout is None else self._dropout.of_layer(layer)
        return across_attention(q_BTHd, k_BSKd, v_BSKd, self._pairs, spec.scale, spec.softcap, lost)


def _documents(positions_BT: Ints, document_starts: Ints) -> tuple[Documents, Ints]:
    """Those that have tokens, and the row of each."""
    valid = positions_BT.reshape(-1) >= 0
    document = np.repeat(np.arange(len(document_starts)), np.diff(np.append(document_starts, valid.size)))
    lengths = np.bincount(document[valid], minlength=len(document_starts))
    rows = document_starts[lengths > 0] // positions_BT.shape[1]
    return Documents(np.flatnonzero(valid), lengths[lengths > 0], valid.size), rows
