"""A run put where a checkpoint stands: the newest one of its folder, or the one that its config names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llm.checkpoint.frozen import Frozen, frozen_in, origin_of
from llm.checkpoint.reader import Checkpoint, list_steps, resolve
from llm.checkpoint.run_folder import model_args
from llm.layers.routed import thresholds_of
from llm.parallel.collectives import agreed_error, all_or_none, main_decides
from llm.pretrained import open_origin
from llm.train.best import best_on
from llm.train.init_from import read_fragment, read_frozen
from llm.train.progress import Progress
from llm.train.resume.changes import change_notes, data_note, refused_data_changes
from llm.train.resume.choose import origin_now, refuse, refuse_newly_frozen, refused_by
from llm.train.resume.skipped_steps import guard_state
from llm.train.run import Run


class Restorer:
    """Puts a run and its progress where a checkpoint stands."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self.run = run
        self.progress = progress
        self._notes: list[str] = []

    def resume(self) -> list[str] | None:
        """Continue the run folder's newest valid checkpoint, or begin from the one that the config names (collective).

        Returns lines that say what was taken and what was skipped; None where there is no checkpoint. A named one is
        where a new run folder begins; once the folder has checkpoints of its own, the same command, given by a person
        or by a restart, goes on there.
        """
        run = self.run
        mode, folder = run.config.checkpoint.resume, run.store.folder
        run.store.clean()
        used = main_decides(lambda: bool(list_steps(folder)), run.world)
        if mode == "never" and used:
            raise agreed_error(
                f"{run.folder}: checkpoint.resume=never, but it holds checkpoints; use another --run_dir"
            )
        if mode not in ("auto", "never"):
            named = Path(main_decides(lambda: str(resolve(mode).path.resolve()), run.world))
            if named.is_relative_to(run.folder.resolve()):
                raise agreed_error(
                    f"checkpoint.resume={mode} lies in the run folder itself, which continues its newest checkpoint; "
                    f"to go back to an older one, give another --run_dir"
                )
            if not used:
                return self._lines(run.store.load_exactly(named, self.read))
        return self.newest()

    def newest(self) -> list[str] | None:
        """Go back to the newest valid checkpoint of the run folder; None where there is none (collective)."""
        checkpoint, skipped = self.run.store.load_newest(self.read)
        if checkpoint is None:
            return None
        return [f"skipped a checkpoint, now set aside: {line}" for line in skipped] + self._lines(checkpoint)

    def _lines(self, checkpoint: Checkpoint) -> list[str]:
        rows = self.progress.rows
        return [f"resumed from {checkpoint.path} (step {checkpoint.step}, {rows:,} rows seen)", *self._notes]

    def read(self, checkpoint: Checkpoint) -> Callable[[], None]:
        """Compare configs, read this rank's ranges; return the function that makes the run go on from them.

        What fails has spoilt masters and optimizer state: another checkpoint has to be read, or the run ends.
        """
        run = self.run
        meta = checkpoint.meta_with("data", "expert_counts", "optimizer_scalars", "tokens", "best", "guard")
        refused = refused_by(checkpoint, run.config, run.tokenizer)
        refused += refused_data_changes(run.mixture, meta["data"], run.config.checkpoint.allow_changes)
        refuse(checkpoint, refused)
        refuse_newly_frozen(checkpoint, run.config)
        frozen = frozen_in(checkpoint)
        elsewhere = {} if frozen is None else frozen.shapes
        kinds = {name: {"master"} for name in elsewhere} | checkpoint.kinds()
        run.engine.prepare_load(kinds, meta["optimizer_scalars"])
        places = []
        for name, kind, box, start, values in run.engine.state.fragments():
            if name in elsewhere:
                continue
            if kind == "ema" and kind not in kinds[name]:
                kind = "master"  # an average that begins now begins with the weights
            elif kind != "master" and kind not in kinds[name]:
                continue  # of a parameter that had no update until now: zeros
            places.append((name, kind, box, start, start + values.numel(), values))
        checkpoint.fill(places)

        def apply() -> None:
            if frozen is not None:
                self._take_frozen(frozen, meta["config"]["model"].get("init_from"))
            run.engine.finish_load()
            if meta["expert_counts"]:
                run.engine.replica.set_expert_counts(torch.tensor(meta["expert_counts"], dtype=torch.int64))
            run.engine.replica.set_thresholds(thresholds_of(model_args(checkpoint)))
            self._notes = self._take_over(checkpoint, meta)

        return apply

    def _take_frozen(self, frozen: Frozen, source: str | None) -> None:
        """Put in place what the checkpoint does not hold, from where it came from: what is frozen still, and the
        masters and averages of what is not any more (collective). source: its run's model.init_from.
        """
        run = self.run
        given = run.config.model.init_from
        origin = origin_of(main_decides(lambda: origin_now(frozen.origin, source, given).to_json(), run.world))
        thawed = [f for f in run.engine.state.fragments() if f.name in frozen.shapes and f.kind in ("master", "ema")]

        def read() -> None:
            weights = open_origin(origin, run.config.model)
            if origin != self.progress.origin:
                read_frozen(run.engine, weights)
            for fragment in thawed:
                fragment.values.copy_(read_fragment(weights, fragment))

        all_or_none(read, run.world)
        self.progress.origin = origin

    def _take_over(self, checkpoint: Checkpoint, meta: dict[str, Any]) -> list[str]:
        """Set the progress to the checkpoint's; lines about what is other than it was there."""
        run, progress = self.run, self.progress
        progress.step = progress.saved_step = checkpoint.step
        progress.consumed_rows = meta["data"]["consumed"]
        progress.earlier_rows = meta["data"].get("earlier_rows", 0)
        progress.tokens = meta["tokens"]
        progress.reference = meta.get("reference")
        progress.best, other_rows = best_on(run.followed, meta["best"])
        progress.guard.load(guard_state(meta, progress.step))
        progress.skipped.load(meta, progress.step)
        # a checkpoint from before rows were kept does not say
        late = progress.skipped.missed(run.config.train, progress.step) if "skip_steps" in meta else []
        other_data = data_note(run.mixture, meta["data"])
        if other_data:
            progress.count_rows_anew()
        run.settle(progress)
        changed = change_notes(meta, run.config, run.world.size, progress.step)
        return [*changed, *([other_data] if other_data else []), *other_rows, *late]
