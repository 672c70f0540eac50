"""Series as rows: windows of them, side by side with others and blind to them; each step predicts the next one.

A window of n positions reads n steps of a series and predicts those from its second one to the one after its last. With
a stride below the length of a row windows overlap, and steps are read in several, behind more or less of their past;
held-out series are always cut side by side, so that each step is predicted once.

Shapes: T positions of a row, F values of a step, W windows.
"""

import numpy as np
from numpy.typing import NDArray

from llm.data.labels import MaxLength
from llm.data.packed import Shortened
from llm.data.packing import PACKING_VERSION, Packing
from llm.data.rows import Row, RowTargets, TokenOrigin
from llm.data.samples import SampleSource, digest_of

NEXT = "autoregressive"
"""The targets of rows of series: 0 at each step whose next one is known."""


def value_of_next(number: int) -> str:
    """The values that hold a number of the next step."""
    return f"{NEXT}.{number}"


class SeriesRows:
    """Rows of `seq_len` positions of the series of a source."""

    shortened: tuple[Shortened, ...] = ()
    """None is: what is longer than a row lies in several."""
    max_length: MaxLength = "error"

    def __init__(
        self,
        source: SampleSource,
        seq_len: int,
        seed: int,
        *,
        together: bool = True,
        given: str = "",
        stride: int | None = None,
    ) -> None:
        """together: False for one window a row; stride: None for `seq_len`; given: what its user calls the source."""
        self.source, self.seq_len, self.seed = source, seq_len, seed
        self.given, self.stride = given or str(source.path), min(stride or seq_len, seq_len)
        assert source.manifest.features is not None
        self.features = source.manifest.features
        """F"""
        self.targets: tuple[str, ...] = (NEXT,)
        self.values = tuple(value_of_next(number) for number in range(self.features))
        self.windows = np.concatenate(
            [_windows(number, length, seq_len, self.stride) for number, length in enumerate(source.lengths().tolist())]
        )
        """(W, 3): number of the series, first step, first step beyond the window."""
        self.packing = Packing(self.windows[:, 2] - self.windows[:, 1], seq_len, together)
        self.n_rows, self.fill = self.packing.n_rows, self.packing.fill
        self.fingerprint = digest_of([PACKING_VERSION, source.fingerprint, together, NEXT, stride])

    def read(self, k: int, epoch: int) -> Row:
        steps, following, starts, at = [], [], [], 0
        for number, first, end in self._in_row(k, epoch):
            series = self.source.features(number)
            steps.append(series[first:end])
            following.append(series[first + 1 : end + 1])
            starts.append(at)
            at += end - first
        answers_nF, zeros = np.concatenate(following), np.zeros(at, dtype=np.int64)
        values = {name: answers_nF[:, i] for i, name in enumerate(self.values)}
        targets = {NEXT: RowTargets(zeros)}
        return Row(zeros, targets, np.array(starts, dtype=np.int64), values, features=np.concatenate(steps))

    def origin(self, k: int, epoch: int, position: int) -> TokenOrigin:
        at = 0
        for number, first, end in self._in_row(k, epoch):
            if position < at + end - first:
                length = len(self.source.features(number))
                return TokenOrigin(self.source.origin(number), number, first + position - at, length)
            at += end - first
        raise IndexError(f"position {position} of a row with {at}")

    def described(self) -> str:
        return f"({self.given}) has {self.source.n_samples} series"

    def notes(self) -> list[str]:
        """Lines about how the series lie in rows."""
        how = "side by side" if self.stride == self.seq_len else f"{self.stride:,} steps apart"
        return [
            f"{self.given}: {len(self.windows):,} windows, {how}, in {self.n_rows:,} rows of {self.seq_len:,} "
            f"positions, {self.fill:.2%} of them used"
        ]

    def listed(self) -> list[dict[str, object]]:
        """What was cut or left out: nothing."""
        return []

    def features_kept(self) -> list[NDArray[np.float32]]:
        """The values of all series, (steps, F) each."""
        return [self.source.features(number) for number in range(self.source.n_samples)]

    def _in_row(self, k: int, epoch: int) -> list[list[int]]:
        found: list[list[int]] = self.windows[self.packing.items(k, self.seed, epoch)].tolist()
        return found


def _windows(number: int, length: int, seq_len: int, stride: int) -> NDArray[np.int64]:
    """(windows, 3) of a series of so many steps."""
    n = length - 1  # the last step is only predicted
    if stride == seq_len or n <= seq_len:
        firsts = np.arange(0, n, seq_len)
    else:
        firsts = np.append(np.arange(0, n - seq_len, stride), n - seq_len)
    return np.stack([np.full(len(firsts), number), firsts, np.minimum(firsts + seq_len, n)], 1)
