"""The training loader: one thread that reads ahead.

Rows have one global order (`mixture`). Step s of global batch G covers rows [c, c + G), where c counts the rows
consumed before; micro-batch m of data-parallel rank d takes the b rows from c + m D b + d b on, or where rows have
images those that llm/data/balance.py deals to it. So what a step contains does not depend on the number of ranks D or
on b, and a checkpoint needs no more than c. Tensor-parallel and pipeline ranks of one data-parallel rank ask with the
same d and get the same rows.

A run may pass over ranges of rows. In a step that has other rows too, rows of such a range are padding without labels
(a row that is not there), so that the step is one of its other rows; a step that lies within them is marked as a whole.

The batch size G and the length of the sequences that a row is read as may change during a run, at numbers of rows seen;
a step has what is in force at its first row c. Neither touches the order of rows.
"""

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

import numpy as np

from llm.batch import Batch, Counts, Rows
from llm.data.balance import dealt
from llm.data.batch import StepBatch, collate
from llm.data.mixture import Mixture
from llm.data.ranges import Range, within
from llm.errors import UserError

Schedule = Sequence[tuple[int, int]]
"""(rows, value), by increasing rows: the value from that many rows seen on."""


def in_force(first: int, schedule: Schedule, rows: int) -> int:
    """The schedule's value when `rows` rows have been seen; `first` before its first entry."""
    value = first
    for start, later in schedule:
        if start > rows:
            break
        value = later
    return value


class TrainLoader:
    """Endless steps of one rank. A thread, not worker processes: gathering rows is a thousand times faster than handing
    tensors between processes.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        seq_len: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        count: Callable[[Sequence[Batch]], Counts],
        start_row: int = 0,
        prefetch: int = 2,
        batch_schedule: Schedule = (),
        seq_len_schedule: Schedule = (),
        earlier_rows: int = 0,
        passed_over: Sequence[Range] = (),
    ) -> None:
        """global_batch_size and micro_batch_size count rows; `count` makes StepBatch.counts; `start_row` is the number
        of rows consumed so far; `prefetch` steps are read ahead. The schedules change global_batch_size, and the length
        of the sequences that each row of seq_len tokens is cut into; they count `earlier_rows` too, which were read of
        other data.
        `passed_over`: global rows that are not to be trained on.

        UserError when a batch cannot be cut evenly.
        """
        if seq_len != mixture.seq_len:
            raise ValueError(f"seq_len={seq_len}, but the mixture was made for {mixture.seq_len}")
        sizes = {"train.global_batch_size": global_batch_size}
        sizes |= {f"train.batch_schedule.{i}.1": size for i, (_, size) in enumerate(batch_schedule)}
        for key, size in sizes.items():
            if size % (micro_batch_size * dp_size):
                raise UserError(
                    f"{key}={size} is not a multiple of train.micro_batch_size="
                    f"{micro_batch_size} times {dp_size} data-parallel ranks; with this micro batch it can be cut for "
                    f"{_valid_dp_sizes(size, micro_batch_size)} ranks"
                )
        self.mixture = mixture
        self._global_batch_size = global_batch_size
        self._batch_schedule = tuple(batch_schedule)
        self._seq_len_schedule = tuple(seq_len_schedule)
        self._earlier_rows = earlier_rows
        self._passed_over = list(passed_over)
        self._count = count
        self._part = (micro_batch_size, dp_rank, dp_size)
        self._next_row = start_row
        self._ready: queue.Queue[StepBatch | BaseException] = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="TrainLoader", daemon=True)
        self._thread.start()

    def next(self) -> StepBatch:
        """The next step's micro-batches. What went wrong in the thread is raised here; RuntimeError after close()."""
        if self._stop.is_set():
            raise RuntimeError("this TrainLoader is closed")
        began = time.perf_counter()
        item = self._ready.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        return dataclasses.replace(item, wait_s=time.perf_counter() - began)

    def close(self) -> None:
        """Stop the thread and wait for it; again is harmless."""
        self._stop.set()
        while self._thread.is_alive():
            self._drop_one()  # the thread may be waiting for room
            self._thread.join(timeout=0.01)

    def __enter__(self) -> "TrainLoader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_ahead(self) -> None:
        try:
            while not self._stop.is_set():
                step = self._read_step(self._next_row)
                self._next_row += step.n_rows
                self._ready.put(step)
        except BaseException as error:  # it belongs to the trainer: next() raises it there
            self._ready.put(error)

    def _read_step(self, first_row: int) -> StepBatch:
        seen = self._earlier_rows + first_row
        n_rows = in_force(self._global_batch_size, self._batch_schedule, seen)
        sequence_len = in_force(self.mixture.seq_len, self._seq_len_schedule, seen)
        passed_over = within(self._passed_over, first_row, first_row + n_rows)
        b, rank, ranks = self._part
        every = np.arange(first_row, first_row + n_rows)
        place = self.mixture.locate(every)
        if passed_over != [(first_row, first_row + n_rows)]:
            for first, end in passed_over:
                for numbers in place:
                    numbers[(first <= every) & (every < end)] = -1
        sources, rows, epochs = place
        listed = zip(*(numbers.tolist() for numbers in place), strict=True)
        tiles_R = np.array([self.mixture.tiles(*row) for row in listed], dtype=np.int64)
        dealt_rows, tiles = dealt(tiles_R, ranks, b)
        micro_batches = [
            self._read(Rows(*(numbers[mine] for numbers in (sources, rows, every, epochs))), sequence_len)
            for mine in dealt_rows[:, rank]
        ]
        return StepBatch(
            passed_over=tuple(passed_over),
            micro_batches=micro_batches,
            counts=self._count(micro_batches),
            first_row=first_row,
            n_rows=n_rows,
            wait_s=0.0,
            tiles=tiles if tiles.total else None,
        )

    def _read(self, rows: Rows, sequence_len: int) -> Batch:
        """The rows, cut into sequences; what is not there is padding without labels."""
        mixture = self.mixture
        places = zip(rows.source.tolist(), rows.row.tolist(), rows.epoch.tolist(), strict=True)
        found = [mixture.read(*place) for place in places]
        named = mixture.targets, mixture.values, mixture.features, mixture.source_len
        batch = collate(found, mixture.seq_len, mixture.fill, sequence_len, *named)
        return dataclasses.replace(batch, rows=rows)

    def _drop_one(self) -> None:
        try:
            self._ready.get_nowait()
        except queue.Empty:
            return


def _valid_dp_sizes(global_batch_size: int, micro_batch_size: int) -> str:
    whole = global_batch_size // micro_batch_size if global_batch_size % micro_batch_size == 0 else 0
    sizes = [str(size) for size in range(1, whole + 1) if whole % size == 0]
    return ", ".join(sizes) or "no number of"
