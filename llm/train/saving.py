"""The checkpoints of a run: what goes into one, and what happens where one cannot be written."""

import dataclasses
import platform
from collections.abc import Callable
from typing import Any

import torch

from llm.checkpoint.frozen import Frozen
from llm.checkpoint.store import SaveFailed
from llm.evaluate.fingerprint import FILE, fingerprint
from llm.train.log import RunLog
from llm.train.progress import Progress
from llm.train.run import Run


class Saver:
    """Saves a run where it stands (all methods are collective).

    Where a save fails, training goes on if checkpoint.on_failure says so; not from the `last` one, after which nothing
    is trained that could be saved later.
    """

    def __init__(self, run: Run, progress: Progress) -> None:
        self.run = run
        self.progress = progress

    def save(self, log: RunLog | None, last: bool = False) -> None:
        """Begin the checkpoint of the current step, once the one before it is written; with checkpoint.asynchronous
        off, complete it. Older ones are pruned with it.
        """
        self.finish(log)
        run, step = self.run, self.progress.step
        meta, asynchronous = self._meta(), run.config.checkpoint.asynchronous
        found = fingerprint(run.engine.replica)
        beside = {} if found is None else {FILE: found.to_bytes()}

        def begin() -> int | None:
            owned = run.engine.state.owned_fragments()
            best = self.progress.best.step
            run.store.begin(step, run.engine.state.shapes, owned, meta, best, asynchronous, beside)
            return None if asynchronous else run.store.finish()

        self._attempt(begin, log, last)

    def advance(self, log: RunLog | None) -> None:
        """Take a save that is on its way a step further."""
        self._attempt(self.run.store.advance, log)

    def finish(self, log: RunLog | None, last: bool = False) -> None:
        """Wait until what is on its way is written."""
        self._attempt(self.run.store.finish, log, last)

    def save_and_finish(self, log: RunLog | None, last: bool) -> bool:
        """Have the current step's checkpoint written; whether it was written by this call."""
        self.finish(log)
        if self.progress.step == self.progress.saved_step:
            return False
        self.save(log, last)
        self.finish(log, last)
        return self.progress.step == self.progress.saved_step

    def _meta(self) -> dict[str, Any]:
        run, progress = self.run, self.progress
        return {
            "config": run.config.model_dump(mode="json"),
            "tokenizer": run.tokenizer.fingerprint,
            "data": run.mixture.state(progress.consumed_rows, progress.earlier_rows),
            "expert_counts": run.engine.replica.expert_counts().tolist(),
            **({"thresholds": list(found.values())} if (found := run.engine.replica.thresholds()) else {}),
            "optimizer_scalars": run.engine.state.scalars(),
            **progress.state(),
            **self._frozen(),
            "layout": dataclasses.asdict(run.grid.layout),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }

    def _frozen(self) -> dict[str, Any]:
        table, origin = self.run.engine.replica.table, self.progress.origin
        shapes = {name: row.shape for name, row in table.items() if not row.trainable}
        if not shapes:
            return {}
        assert origin is not None
        return {"frozen": Frozen(self.run.config.train.freeze, shapes, origin).to_json()}

    def _attempt(self, saving: Callable[[], int | None], log: RunLog | None, last: bool = False) -> None:
        """Call what may end a save and returns its step then."""
        try:
            step = saving()
        except SaveFailed as error:
            if last or self.run.config.checkpoint.on_failure == "stop":
                raise
            if log:
                log.say(f"step {self.progress.step}: no checkpoint, as checkpoint.on_failure=continue: {error}")
        else:
            self.progress.saved_step = self.progress.saved_step if step is None else step
