"""Whether warm-up, decay and traced steps fit into a run, and the warm-up of one that names none."""

from collections.abc import Mapping

DEFAULT_WARMUP = 100
"""Steps, but at most a tenth of the run."""


ONE_CYCLE_RISE = 0.3
"""Share of the steps in which one_cycle rises (the default of fastai and PyTorch's OneCycleLR)."""


def default_warmup(steps: int, decay_steps: int | None, schedule: str = "cosine") -> int:
    """optim.warmup_steps of a run of `steps` steps that leaves it out."""
    if schedule == "one_cycle":
        return max(round(ONE_CYCLE_RISE * steps), 1)
    return max(min(DEFAULT_WARMUP, steps // 10, steps - (decay_steps or 0)), 0)


def default_decay(steps: int, warmup: int) -> int:
    """optim.decay_steps of a wsd run that leaves it out: 20 % of the steps, but not of the warm-up's."""
    return max(min(steps // 5, steps - warmup), 1)


def misfit(warmup: int | None, decay: int | None, steps: int, length: str) -> str | None:
    """What is wrong with warm-up and decay as they were given (None: left out) in a run of `steps` steps, which came
    from `length`; None where they do not meet.
    """
    if decay is None or (warmup or 0) + decay <= steps:
        return None
    what = f"optim.decay_steps={decay}"
    if warmup:
        what = f"optim.warmup_steps={warmup} and {what} together"
    fitting = steps - (warmup or 0)
    remedy = f"use optim.decay_steps={fitting} or less" if fitting > 0 else "give fewer steps of both"
    return f"{what} are longer than {length}; {remedy}, or more steps"


def unwatched(watched: Mapping[str, tuple[int, int] | None], steps: int, length: str) -> str | None:
    """What is wrong with `log.trace_steps` and the like, by their keys, in a run of `steps` steps, which came from
    `length`: steps that it has not would be missed when it is over.
    """
    for key, span in watched.items():
        if span is not None and span[1] > steps:
            return f"{key}=[{span[0]}, {span[1]}]: there is no step {span[1]} in {length}"
    return None


def cut_short(schedule: str, warmup: int | None, steps: int) -> str | None:
    """What a warm-up as long as the run, or longer, leaves of the schedule; None where there is more. Not refused: who
    tries a config with a few steps means its first ones.
    """
    if warmup is None or warmup < steps or (schedule == "constant" and warmup == steps):
        return None
    reached = "reaches its peak in the last step" if warmup == steps else f"gets to {steps} of its {warmup} steps"
    falls = "" if schedule == "constant" else f", and optim.schedule={schedule} has no step to come down in"
    return (
        f"note: the warm-up {reached} (optim.warmup_steps={warmup}, train.steps={steps}){falls}; "
        f"left out, it is {default_warmup(steps, None, schedule)} for this length"
    )
