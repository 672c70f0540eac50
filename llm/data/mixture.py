"""Which row of which source is global row i: exact proportions in every cycle of 4096 rows, a fresh permutation of each
source in each epoch.

Within cycle c the slots go to the sources by largest remainder and are shuffled by (seed, "mixture", c). The n-th row
asked of a source is row perm(seed, name, n div N)(n mod N) of its N rows, so an epoch of a source has each of its rows
once, whatever the other sources are. Nothing depends on ranks, batch sizes or the length of the run.
"""

import hashlib
import json
import math
from collections.abc import Sequence

import numpy as np

from llm.data.order import ORDER_VERSION, permute, round_keys
from llm.data.rows import Row, RowSource, features_in, tiles_of
from llm.errors import UserError

CYCLE = 4096


class Mixture:
    """Named, weighted sources read as one endless sequence of rows of `seq_len` tokens."""

    def __init__(
        self,
        sources: Sequence[tuple[str, RowSource, float]],
        seq_len: int,
        seed: int,
        fill: int = 0,
        source_len: int | None = None,
    ) -> None:
        """`sources`: (name, source, weight); weights count rows. fill: the token that rows are filled up with.
        source_len: positions of a row on the encoder's side; None where there is none.
        UserError when a source is too short or its weight too small.
        """
        self.names = [name for name, _, _ in sources]
        self.sources = [source for _, source, _ in sources]
        self.seq_len, self.source_len = seq_len, source_len
        self.seed = seed
        self.fill = fill
        self.targets = tuple(dict.fromkeys(name for source in self.sources for name in source.targets))
        problem = mixture_problem(self.names, [weight for _, _, weight in sources])
        if problem is not None:
            raise UserError(problem)
        self.rows_of = [source.n_rows for source in self.sources]
        for name, source, rows in zip(self.names, self.sources, self.rows_of, strict=True):
            if rows == 0:
                raise UserError(
                    f"data.train: source {name} {source.described()}, "
                    f"too few for one row of train.seq_len={seq_len} and the token after it"
                )
        self.slots = _largest_remainder([weight for _, _, weight in sources])
        self._last_cycle: tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None

    @property
    def values(self) -> tuple[str, ...]:
        """Names of the values that rows have; those of some sources are only known when a run has begun."""
        return tuple(dict.fromkeys(name for source in self.sources for name in source.values))

    @property
    def features(self) -> int | None:
        """Values of a position, where rows are of values."""
        return features_in(self.sources)

    @property
    def n_rows(self) -> int:
        """Rows of all sources together."""
        return sum(self.rows_of)

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything but the seed that decides the content of row i."""
        return hashlib.blake2b(json.dumps(self._parts(), sort_keys=True).encode(), digest_size=16).hexdigest()

    def epoch(self, i: int) -> float:
        """Passes over all rows when `i` rows have been read."""
        return i / self.n_rows

    def epochs(self, i: int) -> dict[str, float]:
        """Passes over each source when `i` rows have been read, up to one cycle's rounding."""
        return {
            name: i * slots / CYCLE / rows
            for name, slots, rows in zip(self.names, self.slots, self.rows_of, strict=True)
        }

    def locate(self, i: np.ndarray | Sequence[int] | int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source number, row in that source, pass over the source from 0) of global rows `i` (k,), each (k,) int64."""
        index = np.atleast_1d(np.asarray(i, dtype=np.int64))
        found = np.empty_like(index), np.empty_like(index), np.empty_like(index)
        cycle_of = index // CYCLE
        for cycle in np.unique(cycle_of):
            here = cycle_of == cycle
            slot = index[here] - cycle * CYCLE
            for numbers, of_slots in zip(found, self._cycle(int(cycle)), strict=True):
                numbers[here] = of_slots[slot]
        return found

    def read(self, source: int, row: int, epoch: int) -> Row | None:
        """A row by what `locate` says of it; None where the source's number is negative: a row that is not there."""
        return self.sources[source].read(row, epoch) if source >= 0 else None

    def tiles(self, source: int, row: int, epoch: int) -> int:
        """Tiles of the images in a row, by what `locate` says of it; 0 of a row that is not there."""
        return tiles_of(self.sources[source], row, epoch) if source >= 0 else 0

    def state(self, consumed: int, earlier_rows: int = 0) -> dict:
        """What a checkpoint keeps, the same on every rank and layout. earlier_rows: read of other data before this."""
        return {
            "order_version": ORDER_VERSION,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "consumed": consumed,
            "earlier_rows": earlier_rows,
            "data": self._parts(),
        }

    def changes(self, state: dict) -> dict[str, str]:
        """What differs between a checkpoint's state and this mixture: words by key; empty when the order of rows goes
        on unchanged. Keys are `seed`, `data.seq_len`, `data.sources.NAME....` and the like.
        """
        now = self.state(consumed=0)
        if all(state.get(key) == now[key] for key in ("order_version", "fingerprint", "seed")):
            return {}
        before, after = _flat(state), _flat(now)
        return {
            key: f"{before.get(key, 'absent')} in the checkpoint, {after.get(key, 'absent')} now"
            for key in sorted(before.keys() | after.keys())
            if key not in ("consumed", "earlier_rows", "fingerprint") and before.get(key) != after.get(key)
        } or {"fingerprint": f"{state.get('fingerprint')} in the checkpoint, {self.fingerprint} now"}

    def check_state(self, state: dict) -> None:
        """UserError that lists all differences between a checkpoint's state and this mixture; silent when the order of
        rows goes on unchanged.
        """
        changed = "; ".join(f"{key}: {words}" for key, words in self.changes(state).items())
        if changed:
            raise UserError(f"the training data differs from the checkpoint's, so its rows cannot go on: {changed}")

    def _parts(self) -> dict:
        return {
            "cycle": CYCLE,
            "seq_len": self.seq_len,
            **({} if self.source_len is None else {"source_len": self.source_len}),
            "sources": {
                name: {"fingerprint": source.fingerprint, "slots": slots}
                for name, source, slots in zip(self.names, self.sources, self.slots, strict=True)
            },
        }

    def _cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source number, row, epoch) of all slots of a cycle. One cycle is kept: the loader asks for its rows in
        order.
        """
        if self._last_cycle is not None and self._last_cycle[0] == cycle:
            return self._last_cycle[1]
        shuffled = permute(np.arange(CYCLE), CYCLE, round_keys(self.seed, "mixture", cycle))
        source_of_slot = np.searchsorted(np.cumsum(self.slots), shuffled, side="right")
        row_of_slot, epoch_of_slot = np.empty(CYCLE, dtype=np.int64), np.empty(CYCLE, dtype=np.int64)
        for number, (name, slots, rows) in enumerate(zip(self.names, self.slots, self.rows_of, strict=True)):
            epoch, position = np.divmod(cycle * slots + np.arange(slots, dtype=np.int64), rows)
            epochs, epoch_index = np.unique(epoch, return_inverse=True)
            keys = np.stack([round_keys(self.seed, "source", name, int(e)) for e in epochs], axis=1)
            row_of_slot[source_of_slot == number] = permute(position, rows, keys[:, epoch_index])
            epoch_of_slot[source_of_slot == number] = epoch
        self._last_cycle = (cycle, (source_of_slot, row_of_slot, epoch_of_slot))
        return self._last_cycle[1]


def mixture_problem(names: Sequence[str], weights: Sequence[float]) -> str | None:
    """Why sources of these names and weights cannot be mixed, naming them by number from 0; None when they can."""
    for number, name in enumerate(names):
        if name in names[:number]:
            return (
                f"data sources need different names, not {', '.join(names)}; the order of rows depends on the name; "
                f"give source {number} another: --data.train.{number}.name={name}_{number}"
            )
    for number, (weight, slots) in enumerate(zip(weights, _largest_remainder(weights), strict=True)):
        if slots == 0:
            return (
                f"data source {names[number]}: its weight is below 1/{2 * CYCLE} of the total, so it would never be "
                f"read; raise data.train.{number}.weight={weight} or leave it out"
            )
    return None


def _largest_remainder(weights: Sequence[float]) -> list[int]:
    """Whole slots per source that add up to CYCLE and are nearest to the weights; ties go to the earlier source."""
    total = sum(weights)
    if not math.isfinite(total):
        weights = [weight / max(weights) for weight in weights]
        total = sum(weights)
    exact = [CYCLE * weight / total for weight in weights]
    slots = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda j: (slots[j] - exact[j], j))
    for j in by_remainder[: CYCLE - sum(slots)]:
        slots[j] += 1
    return slots


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: leaf
        for name, inner in value.items()
        for key, leaf in _flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()
    }
