"""The training loop: steps, with validation, samples and checkpoints by the clock of steps."""

import math
import sys
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from llm.batch import Counts
from llm.checkpoint.frozen import Seed, origin_of
from llm.checkpoint.lock import run_lock
from llm.data.batch import StepBatch
from llm.data.loader import TrainLoader
from llm.errors import UserError
from llm.parallel.collectives import agreed_error, all_or_none, main_decides, sum_over_ranks
from llm.parallel.engine.step import StepResult
from llm.parallel.launch.world import World
from llm.pretrained import taken_from
from llm.signals import EXIT_STOPPED
from llm.tokenizers.folder import notes_of
from llm.train import reference
from llm.train.best import VALID_LOSS
from llm.train.config import RunConfig
from llm.train.config.length import misfit, unwatched
from llm.train.config.outputs import is_of_validation
from llm.train.evaluation import evaluate
from llm.train.folder import close_log, open_log
from llm.train.freezing import frozen_notes
from llm.train.guard import part_passed_over, rows_and_size
from llm.train.init_from import read_adapter, read_weights
from llm.train.log import RunLog
from llm.train.metrics import StepMetrics
from llm.train.notes import config_notes
from llm.train.profiling import Profiler
from llm.train.progress import Progress
from llm.train.resume.restore import Restorer
from llm.train.run import build_run
from llm.train.sampling import sample
from llm.train.saving import Saver
from llm.train.schedule import learning_rate
from llm.train.stop import Requests
from llm.train.trace import Trace
from llm.train.validation import validate


class Work(NamedTuple):
    """What the ranks agreed on for the next step."""

    batch: StepBatch
    """This rank's rows."""
    counts: Counts
    """Of all ranks."""
    stop: bool
    """Whether any rank was asked to stop before the step."""
    save: bool
    """Whether a checkpoint was asked for."""
    advance: bool
    """Whether a checkpoint that is on its way is to be taken a step further."""


class Trainer:
    """One run of one config on this world of processes; `fit()` trains to its last step, resuming where the folder
    stands.
    """

    def __init__(self, config: RunConfig, run_dir: Path, world: World) -> None:
        self.run = build_run(config, run_dir, world)
        self.progress = Progress.new(config.guard, self.run.followed)
        self.progress.origin = Seed(self.run.config.train.seed)
        self.run.settle(self.progress)
        self.restorer = Restorer(self.run, self.progress)
        self.saver = Saver(self.run, self.progress)
        logits = any(objective.head_calls for objective in self.run.engine.objectives.final)
        self.metrics = StepMetrics(self.run.config.model, world, config.log.peak_flops, logits)

    def resume(self) -> list[str]:
        """Continue a checkpoint, as checkpoint.resume says, or begin a new run; lines that say what was done."""
        lines = self.restorer.resume()
        if not self.run.task.compares_with_start:
            return self._begin() if lines is None else lines
        if lines is not None:
            reference.reuse(self.run, self.progress.reference)
            return lines
        lines = self._begin()
        self.progress.reference, made = reference.make(self.run)
        return [*lines, *made]

    def _begin(self) -> list[str]:
        """Lines about the tokenizer of a new run, and about its weights if they are to come from elsewhere
        (collective). UserError where the schedule has no room in it, which only the data says of `train.epochs`.
        """
        run = self.run
        optim, length = run.config.optim, f"train.epochs={run.epochs}, that is {run.steps} steps"
        wrong = misfit(optim.warmup_steps, optim.decay_steps, run.steps, length)
        wrong = wrong or unwatched(run.config.log.watched, run.steps, length)
        if wrong and run.epochs is not None:
            raise agreed_error(wrong)
        lines = self._begin_with_weights() + self._begin_with_adapter()
        return [*lines, *notes_of(run.tokenizer)]

    def _begin_with_weights(self) -> list[str]:
        """Take the weights that model.init_from means, if there are any; lines about them (collective)."""
        run = self.run
        source: str | None = run.config.model.init_from
        if source is None:
            return []
        if not all(row.trainable for row in run.engine.replica.table.values()):
            taken = main_decides(lambda: taken_from(str(source)).to_json(), run.world)
            self.progress.origin, source = origin_of(taken), taken["path"]
        read = partial(read_weights, run.engine, run.config.model, Path(source), run.config.chat.add_tokens)
        apply, lines = all_or_none(read, run.world)
        apply()
        return lines

    def _begin_with_adapter(self) -> list[str]:
        """The same of the adapter that lora.init_from means."""
        run, lora = self.run, self.run.config.lora
        if lora is None or lora.init_from is None:
            return []
        assert self.progress.origin is not None
        read = partial(read_adapter, run.engine, Path(lora.init_from), self.progress.origin)
        apply, lines = all_or_none(read, run.world)
        apply()
        return lines

    def fit(self) -> None:
        """Train from the current step to the last one, alone in the run folder."""
        with run_lock(self.run.folder, self.run.world):
            try:
                self._fit()
            except UserError as error:
                if error.agreed:  # all ranks are here, and what is already on its way is worth having
                    with suppress(UserError):
                        self.run.store.finish()
                raise

    def _fit(self) -> None:
        run, progress = self.run, self.progress
        found = [*run.notes, *self.resume()]
        found += frozen_notes(run.engine.replica.table, progress.origin)
        notes: list[str] | None = found + config_notes(run.config, run.prompts.ids, progress.step, progress.rows)
        requests = Requests(run.folder)
        try:
            while notes is not None:
                opening = partial(open_log, run, progress, notes) if run.world.is_main else _nothing
                log = all_or_none(opening, run.world)
                ended = False
                try:
                    notes = self._steps(log, requests)
                    ended = notes is None
                except (SystemExit, Exception) as error:  # whatever it is, log.txt says why the run ended
                    ended = isinstance(error, SystemExit | UserError)
                    if log and isinstance(error, Exception):
                        log.failed(error)
                    raise
                finally:
                    if log:
                        close_log(run, log) if ended else log.close()
        finally:
            requests.close()

    def _steps(self, log: RunLog | None, requests: Requests) -> list[str] | None:
        """Train to the end; or, where a step sent the run back to its last checkpoint, stop there with notes of it."""
        run, progress, config = self.run, self.progress, self.run.config
        end = self._end()
        if end is not None:
            if log:
                log.say(f"nothing to do: {end}")
            return None
        first = progress.step + 1
        trace = Trace(run.engine.model, run.world, run.folder / "trace.jsonl", config.log.trace_steps, first)
        profiler = Profiler(run.grid, run.folder, config.log.profile_steps)
        if progress.step == 0 and config.eval.at_start:
            self._validate_first(log, requests)
        with self.loader() as loader, closing(profiler):
            while end is None:
                started = time.perf_counter()
                work = self._next_work(loader, requests)
                if work.advance:
                    self.saver.advance(log)
                if work.stop or work.save:
                    self._obey(work.stop, log, requests)
                step = progress.step + 1
                with profiler.step(step), trace.step(step, run.engine.gradient_scale):
                    result, lr = self.take_step(work.batch, work.counts)
                if config.checkpoint.asynchronous and progress.step == first:  # the optimizer has its state now
                    run.store.prepare(run.engine.state.owned_fragments())
                action, lines = progress.guard.judge(progress.step, result, *rows_and_size(work.batch))
                lines = [*trace.notes(), *profiler.notes(), *part_passed_over(progress.step, work.batch), *lines]
                if action == "rewind":
                    return [*lines, *self._rewind(log)]
                row = self.metrics.row(
                    result,
                    work.batch,
                    step=progress.step,
                    tokens=progress.tokens,
                    epoch=run.mixture.epoch(progress.consumed_rows),
                    lr=lr,
                    seconds=time.perf_counter() - started,
                )
                if log:
                    log.experts(progress.step, result.expert_counts)
                end = self._after_step(row, log, lines, requests)
        self.saver.finish(log, last=True)
        if log:
            how = "done" if progress.step >= run.steps else end
            drawn = run.config.log.tensorboard
            curves = f"curves: tensorboard --logdir {run.folder / 'tb'}" if drawn else f"run folder {run.folder}"
            log.say(f"{how}: {progress.step} steps, {progress.tokens:,} tokens; {curves}")
        return None

    def take_step(self, batch: StepBatch, counts: Counts, always: bool = False) -> tuple[StepResult, float]:
        """The next optimizer step, on these rows, at the learning rate that is returned too (collective).

        counts: of all ranks. A step that is to be passed over is not computed, unless `always`.
        """
        run, progress = self.run, self.progress
        step = progress.step + 1
        lr = learning_rate(run.config.optim, run.steps, step)
        if batch.is_passed_over and not always:
            result = StepResult.passed_over(counts, run.engine.objectives.measured)
        else:
            _, size = rows_and_size(batch)
            result = run.engine.step(batch, counts, lr, progress.guard.loss_limit(size), number=step)
        progress.step = step
        progress.consumed_rows += batch.n_rows
        progress.tokens += counts.tokens
        return result, lr

    def _rewind(self, log: RunLog | None) -> list[str]:
        """Go back to the newest checkpoint (collective); UserError where there is none yet."""
        self.saver.finish(log)
        step = self.progress.step
        lines = self.restorer.newest()
        if lines is None:
            raise agreed_error(
                f"step {step} is to be passed over, but there is no checkpoint yet to go back to; "
                f"give --train.skip_steps=[{step}], or a shorter checkpoint.interval"
            )
        return lines

    def _end(self) -> str | None:
        """Why there is no next step, in words; None when there is one."""
        progress, steps = self.progress, self.run.steps
        patience, best = self.run.config.eval.patience, progress.best
        if progress.step >= steps:
            return f"the run is at step {progress.step} of train.steps={steps}"
        if best.exhausted(patience):
            return f"stopped early at step {progress.step} of train.steps={steps}, after {best.gave_up(patience)}"
        return None

    def loader(self) -> TrainLoader:
        """This rank's steps from where the run stands."""
        train, data, progress = self.run.config.train, self.run.grid.rows, self.progress
        return TrainLoader(
            self.run.mixture,
            seq_len=train.seq_len,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            dp_rank=data.rank,
            dp_size=data.size,
            count=partial(self.run.engine.objectives.count, sources=self.run.mixture.names),
            start_row=progress.consumed_rows,
            batch_schedule=train.batch_schedule,
            seq_len_schedule=train.seq_len_schedule,
            earlier_rows=progress.earlier_rows,
            passed_over=[*progress.guard.passed_over, *progress.skipped.ranges],
        )

    def _next_work(self, loader: TrainLoader, requests: Requests) -> Work:
        """This rank's batch and what all ranks agree on (collective). What one rank cannot read stops them all, with
        one message.
        """
        world, store = self.run.world, self.run.store
        failure: Exception | None = None
        batch: StepBatch | None = None
        try:
            batch = loader.next()
        except (UserError, OSError) as error:
            failure = error
        flags = [batch is None, requests.stop is not None, world.is_main and requests.save_wanted(), *store.flags()]
        none = self.run.engine.objectives.count((), self.run.mixture.names)
        counts = batch.counts if batch is not None and self.run.grid.reports_loss else none
        sums = sum_over_ranks([*flags, *counts.values()], world)
        failed, stop, save, *saving = (int(n) for n in sums[: len(flags)])
        if failed:
            all_or_none(partial(_raise, failure), world)
        assert batch is not None
        return Work(batch, counts.with_values(sums[len(flags) :]), stop > 0, save > 0, store.due(*saving))

    def _obey(self, stop: bool, log: RunLog | None, requests: Requests) -> None:
        """Save at this step boundary; then leave with EXIT_STOPPED if that was asked for (collective)."""
        world, step = self.run.world, self.progress.step
        if self.saver.save_and_finish(log, last=stop) and log:
            log.say(f"saved on request: {self.run.store.path(step)}")
        main_decides(requests.save_done, world)
        if stop:
            if log:
                log.say(f"stopped on request after step {step}; the same command goes on")
            # the store may end with the first rank that leaves, and others may still be asking it for the decision
            sum_over_ranks([0.0], world)
            sys.exit(EXIT_STOPPED)

    def _after_step(
        self, row: dict[str, Any], log: RunLog | None, notes: list[str], requests: Requests
    ) -> str | None:
        """Validate, record, save and sample, each when its time has come; why the run ends here, or None."""
        run, step, config = self.run, self.progress.step, self.run.config
        for due, measure, what in (
            (run.held_out and self._is_due(config.eval.interval), self._validation, "validation"),
            (run.tasks.opened and self._is_due(config.eval.interval_of_tasks), self._evaluation, "evaluation"),
        ):
            found = measure(requests) if due else {}
            if found is None:
                notes = [*notes, f"step {step}: {what} given up, as the run is to stop"]
            row.update(found or {})
        new_best = self._new_best(row)
        end = self._end()
        if log:
            for line in notes:
                log.say(line)
            log.step(row)
        if end or step % config.checkpoint.interval == 0 or (new_best and config.checkpoint.keep_best):
            self.saver.save(log, last=end is not None)
        if config.eval.sample_interval and (end or step % config.eval.sample_interval == 0):
            sample(run, step, log, requests)
        return end


    def _validate_first(self, log: RunLog | None, requests: Requests) -> None:
        """What the weights that the run begins with give on the held-out rows and the tasks: row 0 of metrics.jsonl,
        and the first that later validations are compared with (collective).
        """
        found: dict[str, float | None] = {**(self._validation(requests) or {}), **(self._evaluation(requests) or {})}
        self._new_best(found)
        if log and found:
            log.first({"step": 0, **found})

    def _is_due(self, interval: int) -> bool:
        return self.progress.step == self.run.steps or self.progress.step % interval == 0

    def _new_best(self, row: Mapping[str, Any]) -> bool:
        """Whether what the run follows was measured at this step, and is the best so far."""
        best = self.progress.best
        return best.metric in row and best.update(row[best.metric], self.progress.step)

    def _evaluation(self, requests: Requests) -> dict[str, float | None] | None:
        """What eval.tasks say, None where there are none or the run is to stop (collective)."""
        run = self.run
        if not run.tasks.opened:
            return None
        asked = (run.engine.replica, run.tasks, run.tokenizer, run.template, run.config)
        return evaluate(*asked, lambda: bool(requests.stop))

    def _validation(self, requests: Requests) -> dict[str, float | None] | None:
        """What a validation says, None where there are no held-out rows or the run is to stop (collective). UserError
        where its loss is not finite.
        """
        run = self.run
        if run.held_out is None:
            return None
        asked = (run.engine, run.task, run.held_out, run.tokenizer, run.config)
        found = validate(*asked, lambda: bool(requests.stop))
        if found is None:
            return None
        loss = found[VALID_LOSS]
        if loss is None or not math.isfinite(loss):
            raise agreed_error(f"step {self.progress.step}: valid_loss is {loss}; the last checkpoint is intact")
        best = self.progress.best.metric
        if is_of_validation(best) and best not in found:
            raise agreed_error(f"eval.best={best}: a validation of this run says {', '.join(found)}")
        return found


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def _nothing() -> None:
    return None
