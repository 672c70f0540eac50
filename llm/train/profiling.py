"""`log.profile_steps`: PyTorch's own profile of a few chosen steps, one file a rank in `profile/` of the run folder.

Each is a Chrome trace (chrome://tracing, ui.perfetto.dev) of what the CPU called and the GPU ran, with a span for every
step; validations and checkpoints in between are in it too. It is written by the ranks that together hold the model
once, the others have much the same. What is computed stays as it is to the last bit; how long it takes does not. A run
that goes on in the middle of these steps profiles those that are left, in a file of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from llm.atomic import new_file
from llm.parallel.grid import Grid
from llm.train.reporting import reason_of

FOLDER = "profile"


class Profiler:
    """Profiles steps `steps` (first and last) of a run in `folder`, where this rank is one of those that do."""

    def __init__(self, grid: Grid, folder: Path, steps: tuple[int, int] | None) -> None:
        place = grid.layout.place(grid.world.rank)
        taken = steps is not None and place.expert_data == 0
        self.steps = range(steps[0], steps[1] + 1) if steps and taken else range(0)
        self._folder, self._rank = folder / FOLDER, grid.world.rank
        self._gpu = grid.world.device.type == "cuda"
        self._running: profile | None = None
        self._span: list[int] = []
        self._notes: list[str] = []

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Profile what is computed inside as step number `step`, if it is one of those."""
        if step not in self.steps:
            yield
            return
        if self._running is None:
            self._begin()
        self._span.append(step)
        with record_function(f"step {step}"):
            yield
            if self._gpu and step == self.steps[-1]:
                torch.cuda.synchronize()  # what is still at work belongs to the step
        if step == self.steps[-1]:
            self.close()

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._gpu else [])]
        try:
            running = profile(activities=activities)
            running.start()
        except Exception as error:  # another profiler may be at work, or the driver has none
            self._give_up(error)
        else:
            self._running = running

    def close(self) -> None:
        """Write what was profiled, if anything was: also where the run ends or goes back in between."""
        running, self._running = self._running, None
        if running is None:
            return
        first, last, self._span = self._span[0], self._span[-1], []
        path = self._folder / f"steps_{first}-{last}_rank_{self._rank}.json.gz"
        try:
            running.stop()
            with new_file(path) as temporary:
                self._export(running, temporary)
            self._notes.append(f"profile of steps {first} to {last}: {path}")
        except Exception as error:
            self._give_up(error)

    @staticmethod
    def _export(running: Any, temporary: Path) -> None:
        """The file's ending decides that it is compressed."""
        packed = temporary.with_name(f"{temporary.name}.json.gz")
        try:
            running.export_chrome_trace(str(packed))
            packed.replace(temporary)
        finally:
            packed.unlink(missing_ok=True)

    def _give_up(self, error: BaseException) -> None:
        self.steps = range(0)
        with suppress(Exception):
            if self._running is not None:
                self._running.stop()
        self._notes.append(f"log.profile_steps: rank {self._rank} has no profile ({reason_of(error)}); the run goes on")

    def notes(self) -> list[str]:
        """Lines about what was written, or could not be, since the last call; those of rank 0 are said."""
        notes, self._notes = self._notes, []
        return notes
