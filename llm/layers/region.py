"""Where layers meet tensor and expert parallelism: what they call at the edges of their work, and what it does when
nothing is cut, which is nothing. llm/parallel replaces these objects by ones that communicate. They hold what never
changes; how a forward's tokens are cut is in its Context, so that forwards of other lengths may overlap.

A *region* is a stretch of work whose weights are cut over ranks: inside, every rank has all tokens and a part of the
heads or of the width, and what it makes is one term of a sum over the ranks; so is the gradient of whatever enters.

Shapes: N tokens, D model width, V vocabulary, P = N * top_k (token, choice) pairs, R rows.
"""

from typing import Protocol

from torch import Tensor

from llm.kernels.cross_entropy import Share


class Region:
    """Weights are whole: nothing to do at the edges."""

    def cuts(self, n_tokens: int) -> bool:
        """Whether, in a forward over so many tokens, each rank has the residual stream of its own tokens only.

        ValueError where that must be so and cannot.
        """
        return False

    def enter(self, x: Tensor, cut: bool) -> Tensor:
        """Before the linears that share x, of this rank's tokens where they are cut. May return the tokens of (B, T, D)
        as (N, D)."""
        return x

    def leave(self, y: Tensor, cut: bool) -> Tensor:
        """After the last linear: the sum over ranks of what they made, in the form of what was entered."""
        return y

    def mean(self, x: Tensor) -> Tensor:
        """Inside: the mean over the ranks of what each has of its own. What every rank makes of it, its gradient
        counts. May change x in place.
        """
        return x

    def once(self, x: Tensor) -> Tensor:
        """Inside: x, for what every rank makes of it alike; its gradient becomes one rank's term of the sum."""
        return x

    def own(self, x: Tensor) -> Tensor:
        """Inside: this rank's rows of x (N, ...), so that sums over tokens count each token on one rank."""
        return x


class VocabularyShare(Share, Protocol):
    """This rank's rows of a token table or output matrix that is cut over ranks."""

    def join(self, logits: Tensor) -> Tensor:
        """Whole logits (..., V) of every rank's part."""


class Exchange(Protocol):
    """Experts lie on several ranks, `experts_per_rank` each."""

    experts_per_rank: int

    def sizes(self, rows_E: Tensor) -> Tensor:
        """How many rows each rank sends to each expert of this rank, (ranks, experts_per_rank), on the device."""

    def swap(self, x_RD: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Send consecutive rows to the ranks, so many each; the rows received, in the order of ranks."""


WHOLE = Region()


class InRegion:
    """A module that works inside a region; where weights are cut, llm/parallel sets `region` and calls `take_share`."""

    region: Region = WHOLE

    def take_share(self, rank: int, ranks: int) -> None:
        """Its weights are the boxes of tensor-parallel rank `rank` of `ranks`, as its rows declare them: adapt what is
        not a matter of shapes, such as who adds a bias that all ranks have. Called once."""
