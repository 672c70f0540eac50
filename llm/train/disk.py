"""How many checkpoints a run will have at a time, and what room its disk has for them: known before the first save."""

import os
from pathlib import Path

from llm.paths import free_space
from llm.train.config import RunConfig
from llm.train.config.outputs import is_of_validation


def checkpoints_at_once(config: RunConfig) -> int:
    """Most checkpoints that lie in the run folder at a time: those that stay, the best one, and the one that is being
    written, as none is removed before it is whole. Of a run that counts epochs, as if it never ended, without those
    that stay for good.
    """
    own, steps = config.checkpoint, config.train.steps
    of_validation = is_of_validation(config.eval.best)
    followed = config.eval.interval if of_validation else config.eval.interval_of_tasks
    best = own.keep_best and (config.data.valid is not None or not of_validation)
    if steps is None:
        return own.keep + best + 1
    planned = {*range(own.interval, steps + 1, own.interval), steps}
    possible = planned | {*(range(followed, steps + 1, config.eval.interval) if best else ())}
    for_good = {step for step in possible if own.keep_every and step % own.keep_every == 0}
    kept = max(len(for_good.union(sorted(saved)[-own.keep :])) for saved in (planned, possible))
    return min(kept + best + 1, len(possible))


def room(run_dir: Path) -> tuple[int, int] | None:
    """Bytes that are free on the file system of a run's folder, and bytes of the checkpoints that are there already, as
    the run goes on with them; None where the file system does not say.
    """
    space = free_space(run_dir)
    files = [Path(place, name) for place, _, names in os.walk(run_dir / "checkpoints") for name in names]
    return None if space is None else (space[1], sum(file.lstat().st_size for file in files))
