"""A sample: what trains as a whole, as a conversation does, in tokens.

Shapes: n tokens; L labels of the whole; S pixels a side of a tile.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sample:
    """What a sample's text is in tokens, and which of them train."""

    tokens: NDArray[np.int64]
    """(n,): a row of n - 1 positions holds it, as its last token is only a label."""
    weights: NDArray[np.float32]
    """(n,): factor of each token's loss as a target, from 0, which is none. The first token is never a target: of a
    sample with labels its weight is that of all of them, and the others have none."""
    turn_ends: NDArray[np.int64]
    """Numbers of tokens after which it may be cut, ascending: the ends of whole turns; the last is n."""
    images: NDArray[np.uint8] | None = None
    """(tiles, 3, S, S): the tiles of its images, in the order of their slots among the tokens; None without images."""
    labels: NDArray[np.float32] | None = None
    """(L,): what is to be predicted of the whole, NaN where it is missing; None where tokens are predicted."""
    features: NDArray[np.float32] | None = None
    """(n, F): what is read in the place of tokens, which are 0 then; None where they are read."""
    text: str | None = None
    """What the tokens were made of, where it is to be written anew each time that it is read."""

    @property
    def n_targets(self) -> int:
        """How many tokens or labels train."""
        if self.labels is None:
            return int(np.count_nonzero(self.weights[1:]))
        return int(np.count_nonzero(~np.isnan(self.labels))) if self.weights[0] > 0 else 0
