"""Attention where documents go on from others: what several have in common is computed once.

The leading documents that go on from none are attended as everywhere. Each of the others sees the tokens of its path,
which are those that its parent sees and those of its parent, and its own. Documents with paths of about one length and
about as long themselves are attended together, each padded to lengths that follow from its own two alone; so, with the
same kernels, a document's result does not depend on those beside it.

Shapes: B batch, T tokens, N = B*T, n documents, t padded length of a document, P of its path, S = P + t, H query heads,
K kv heads, d head width.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from llm.args import AttentionSpec, Mask
from llm.kernels.attention import masked_attention
from llm.kernels.segments import Ints, padded_lengths
from llm.layers.masks import AttentionMasks, scores_of, visible

PATH_GRAIN = 16
"""Paths are padded to a multiple of it, so that more documents are attended together."""


@dataclass
class _Together:
    """Documents that are attended in one call."""

    query_Nt: Tensor
    """(n * t,) flat tokens; behind a document's end its last one again."""
    key_NS: Tensor
    """(n * S,) flat tokens; before a path's begin and behind a document's end any, which nothing sees."""
    query_positions_nt: Ints
    key_positions_nS: Ints
    masks: dict[tuple[Mask, int | None], Tensor] = field(default_factory=dict)

    def __call__(self, spec: AttentionSpec, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor) -> Tensor:
        """(n * t, H, d)"""
        n = len(self.query_positions_nt)
        key = spec.mask, spec.span
        if key not in self.masks:
            seen = visible(self.query_positions_nt, self.key_positions_nS, *key)
            self.masks[key] = torch.from_numpy(seen[:, None]).to(q_NHd.device)
        q = q_NHd.index_select(0, self.query_Nt).unflatten(0, (n, -1)).transpose(1, 2)
        k, v = (x.index_select(0, self.key_NS).unflatten(0, (n, -1)).transpose(1, 2) for x in (k_NKd, v_NKd))
        return masked_attention(q, k, v, self.masks[key], scores_of(spec)).transpose(1, 2).flatten(0, 1)


class BranchMasks:
    """What attention layers are given for such a batch."""

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        positions_BT: Ints,
        document_starts: Ints,
        parents_S: Ints,
        device: torch.device,
    ) -> None:
        """positions_BT: of each token, none negative; parents_S: of each document, the one before it that it goes on
        from, -1 = none."""
        positions = positions_BT.reshape(-1)
        bounds = np.append(document_starts, positions.size)
        roots = int((parents_S >= 0).argmax()) if (parents_S >= 0).any() else len(parents_S)
        self._trunk = int(bounds[roots])
        self._attend = AttentionMasks(specs, positions[None, : self._trunk], document_starts[:roots], device)
        paths = _paths(bounds, parents_S)
        buckets = defaultdict(list)
        lengths = padded_lengths(np.diff(bounds))
        for document in range(roots, len(parents_S)):
            buckets[-len(paths[document]) // PATH_GRAIN * -PATH_GRAIN, int(lengths[document])].append(document)
        self._together = []
        slot_of_token = np.empty(positions.size - self._trunk, dtype=np.int64)
        slots = 0
        for (path_length, length), documents in sorted(buckets.items()):
            key = np.zeros((len(documents), path_length + length), dtype=np.int64)
            seen = np.zeros(key.shape, dtype=bool)
            for row, document in enumerate(documents):
                start, end = bounds[document], bounds[document + 1]
                path = paths[document]
                key[row, path_length - len(path) : path_length] = path
                key[row, path_length:] = np.minimum(np.arange(start, start + length), end - 1)
                seen[row, path_length - len(path) : path_length + end - start] = True
                first = slots + row * length
                slot_of_token[start - self._trunk : end - self._trunk] = np.arange(first, first + end - start)
            slots += len(documents) * length
            query = key[:, path_length:]
            self._together.append(
                _Together(
                    torch.from_numpy(query.flatten()).to(device),
                    torch.from_numpy(key.flatten()).to(device),
                    positions[query],
                    np.where(seen, positions[key], -1),
                )
            )
        self._slot_of_token = torch.from_numpy(slot_of_token).to(device)

    def __call__(
        self, layer: int, spec: AttentionSpec, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor
    ) -> Tensor:
        q, k, v = (x.flatten(0, 1) for x in (q_BTHd, k_BTKd, v_BTKd))
        trunk = self._attend(layer, spec, *(x[None, : self._trunk] for x in (q, k, v)))[0]
        if not self._together:
            return trunk.view_as(q_BTHd)
        slots = torch.cat([together(spec, q, k, v) for together in self._together])
        return torch.cat([trunk, slots.index_select(0, self._slot_of_token)]).view_as(q_BTHd)


def _paths(bounds: Ints, parents_S: Ints) -> list[Ints]:
    """Of each document, the flat tokens that it sees before its own."""
    found: list[Ints] = []
    for parent in parents_S.tolist():
        if parent < 0:
            found.append(bounds[:0])
        else:
            found.append(np.append(found[parent], np.arange(bounds[parent], bounds[parent + 1])))
    return found
