"""How attention scores become weights: what the layers ask of every attention kernel."""

from typing import NamedTuple


class Scores(NamedTuple):
    """How scores become weights."""

    scale: float | None = None
    """Factor on them; None = d^-1/2."""
    softcap: float | None = None
    """c: scores s become c tanh(s / c)."""
    window: int | None = None
    """How many tokens a query sees at most, its own included; where it sees both ways, so many each way. None = all."""
    causal: bool = True
    """Whether a query sees no token after its own."""
    across: bool = False
    """Whether queries and keys are of two sequences, all of the keys to be seen; without a window, and not causal."""


PLAIN = Scores()
