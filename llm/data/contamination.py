"""Held-out documents that are trained on too, found by the digests of their texts, which every shard keeps."""

from collections.abc import Iterator, Sequence

import numpy as np

from llm.data.shards import text_digests
from llm.data.source import TokenSource
from llm.errors import UserError


def contamination_notes(train: Sequence[TokenSource], valid: Sequence[TokenSource]) -> list[str]:
    """Lines about held-out documents that are trained on too, by the digests of their texts.

    UserError when the held-out documents are all that is trained on, or when all of them are in shards to train on,
    out of which they cannot be left.
    """
    notes = []
    for held_out in valid:
        digests = np.unique(np.concatenate(list(_halves(held_out))))
        for source in train:
            common = np.zeros(len(digests), dtype=bool)
            others = 0
            for halves in _halves(source):
                place = np.minimum(digests.searchsorted(halves), len(digests) - 1)
                same = digests[place] == halves
                common[place[same]] = True
                others += int(np.count_nonzero(~same))
            n = int(np.count_nonzero(common))
            if n == len(digests) and (others == 0 or source.given_as_shards):
                raise UserError(
                    f"{held_out.given}: all its documents are trained on too ({source.given}); hold out other text, or "
                    f"a share of the documents: --data.valid=0.05"
                )
            if n:
                notes.append(
                    f"{held_out.given}: warning: {n:,} of its {len(digests):,} different documents are trained on too "
                    f"({source.given})"
                )
    return notes


def _halves(source: TokenSource) -> Iterator[np.ndarray]:
    """Half of each document's digest as a number, uint64, shard by shard: in 2^32 documents two may share one."""
    for entry in source.manifest.shards:
        digests = text_digests(source.shard_path(entry), entry)
        yield np.ascontiguousarray(digests[:, :8]).view(np.uint64).reshape(-1)
