"""Held-out documents and samples that are trained on too, found by the digests of their content, which shards keep."""

from collections.abc import Sequence

import numpy as np

from llm.data.kinds import Opened
from llm.errors import UserError


def contamination_notes(train: Sequence[Opened], valid: Sequence[Opened]) -> list[str]:
    """Lines about held-out documents that are trained on too, by the digests of their texts.

    UserError when the held-out documents are all that is trained on, or when all of them are in shards to train on,
    out of which they cannot be left.
    """
    notes = []
    for held_out in valid:
        if held_out.digests is None:
            continue
        digests = np.unique(np.concatenate(list(held_out.digests())))
        for source in train:
            if source.digests is None:
                continue
            common = np.zeros(len(digests), dtype=bool)
            others = 0
            for halves in source.digests():
                place = np.minimum(digests.searchsorted(halves), len(digests) - 1)
                same = digests[place] == halves
                common[place[same]] = True
                others += int(np.count_nonzero(~same))
            n = int(np.count_nonzero(common))
            if n == len(digests) and (others == 0 or source.given_whole):
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
