"""What changes during a run by a plan made before it: the learning rate by steps, batch size and sequence length by
rows, and how many steps a number of epochs is.

Everything is a pure function of the step or of the rows seen, so that a resumed run goes on as an uninterrupted one.
"""

import math

from llm.data.loader import in_force
from llm.train.config import OptimConfig, TrainConfig
from llm.train.config.length import default_decay, default_warmup

ONE_CYCLE_DIV = 25.0
"""one_cycle begins at the peak divided by this (the default of fastai's and PyTorch's OneCycleLR)."""


def lr_factor(optim: OptimConfig, steps: int, step: int) -> float:
    """Learning rate of step `step` (1-based) of `steps`, divided by its peak, so that it serves groups of any peak.

    Rises from step 1 to `warmup_steps`, linearly; one_cycle (Smith & Topin 2018, arXiv:1708.07120) by a half cosine
    from 1/25. The last step has min_lr / lr, except with `constant`.
    """
    warmup, low = optim.warmup_steps, optim.min_lr / optim.lr
    if warmup is None:
        warmup = default_warmup(steps, optim.decay_steps, optim.schedule)
    if step <= warmup:
        if optim.schedule != "one_cycle":
            return step / warmup
        start = 1 / ONE_CYCLE_DIV
        return 1.0 if warmup == 1 else start + (1 - start) * _half_cosine((step - 1) / (warmup - 1))
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "wsd":
        decay = optim.decay_steps or default_decay(steps, warmup)
        progress = max(step - (steps - decay), 0) / decay
        return 1.0 - (1.0 - low) * math.sqrt(progress) if progress < 1 else low
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return 1.0 - (1.0 - low) * (progress if optim.schedule == "linear" else _half_cosine(progress))


def learning_rate(optim: OptimConfig, steps: int, step: int) -> float:
    """Learning rate of step `step` (1-based) of `steps`: optim.lr times the factor."""
    return optim.lr * lr_factor(optim, steps, step)


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 - math.cos(math.pi * progress))


def rows_of_step(train: TrainConfig, step: int, row: int, asked: int) -> tuple[int, int]:
    """(first row, end row) of step `asked` of a run that has seen `row` rows after step `step`, which lies before."""
    for _ in range(step + 1, asked):
        row += in_force(train.global_batch_size, train.batch_schedule, row)
    return row, row + in_force(train.global_batch_size, train.batch_schedule, row)


def steps_between(train: TrainConfig, first_row: int, end_row: int) -> int:
    """Steps from row `first_row` until `end_row` rows have been seen; the last one may go beyond."""
    row, steps = first_row, 0
    for change in [*(rows for rows, _ in train.batch_schedule if first_row < rows < end_row), end_row]:
        size = in_force(train.global_batch_size, train.batch_schedule, row)
        more = max(-(-(change - row) // size), 0)
        row, steps = row + more * size, steps + more
    return steps


def epoch_rows(epochs: float, n_rows: int) -> int:
    """Rows in `epochs` passes over `n_rows` rows, rounded up (but not because 0.1 is no binary fraction)."""
    return math.ceil(round(epochs * n_rows, 6))
