"""The training loop: build everything a run needs, then steps with validation, samples and checkpoints by the clock
of steps.

Order of building: what can be refused is refused before work is lost (config, files, tokenizer), then data, model,
engine, checkpoint; the run folder is made last.
"""

import dataclasses
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from llm.atomic import write_unless_same
from llm.checkpoint.lock import run_lock
from llm.checkpoint.pretrained import save_tokenizer
from llm.checkpoint.reader import Checkpoint, list_steps, resolve
from llm.checkpoint.store import CheckpointStore, SaveFailed
from llm.data.batch import StepBatch
from llm.data.heldout import HeldOut
from llm.data.loader import TrainLoader
from llm.data.mixture import Mixture
from llm.errors import UserError
from llm.foreign.tokenizer import notes_of
from llm.generate import generate
from llm.generation.text import context_length, continuation
from llm.parallel.collectives import agreed_error, all_or_none, main_decides, sum_over_ranks
from llm.parallel.grid import make_grid
from llm.parallel.launch.world import World
from llm.parallel.step import StepResult
from llm.tokenizer import Tokenizer, load_tokenizer
from llm.train.begin import read_weights
from llm.train.build import build_engine
from llm.train.config import RunConfig, check_layout
from llm.train.continued import changes, refuse, refuse_another_run
from llm.train.curves import CurveSink, TensorBoard, WeightsAndBiases
from llm.train.guard import Guard, part_passed_over, rows_and_size
from llm.train.inputs import encode_prompts, open_sources, settle_precision, settle_warmup, with_vocabulary
from llm.train.length import default_warmup, misfit, untraced
from llm.train.log import RunLog
from llm.train.metrics import StepMetrics
from llm.train.notes import config_notes
from llm.train.resume import SkippedSteps, change_lines, data_line, data_refused, guard_state
from llm.train.schedule import epoch_rows, learning_rate, steps_between
from llm.train.stop import EXIT_STOPPED, Requests
from llm.train.trace import Trace
from llm.train.validation import Best, settle_rows, validate


class Trainer:
    """One run of one config on this world of processes; `fit()` trains to its last step, resuming where the folder
    stands.

    `config` is the resolved one: with a vocabulary, a precision and a number of steps.
    """

    def __init__(self, config: RunConfig, run_dir: Path, world: World) -> None:
        self.world = world
        self.run_dir = run_dir
        self.grid = make_grid(world, check_layout(config, world.size))
        self.tokenizer: Tokenizer = all_or_none(lambda: load_tokenizer(config.tokenizer), world)
        self.prompts = encode_prompts(config, self.tokenizer, world)
        config = with_vocabulary(config, self.tokenizer)
        all_or_none(lambda: check_layout(config, world.size), world)
        self.store = CheckpointStore(
            run_dir / "checkpoints",
            world,
            keep=config.checkpoint.keep,
            keep_best=config.checkpoint.keep_best,
            keep_every=config.checkpoint.keep_every,
        )
        self.config, self.precision_reason = settle_precision(config, self.store, world)
        self.config = settle_warmup(self.config, self.store, world)
        main_decides(self._refuse_another_run, world)
        sources, valid, self._data_notes = open_sources(config, self.tokenizer, world)
        self.mixture = all_or_none(lambda: Mixture(sources, config.train.seq_len, config.train.seed), world)
        self.config, self._rows_said = settle_rows(self.config)
        rows = (config.train.seq_len, config.eval.rows)
        self.held_out = all_or_none(lambda: HeldOut(valid, *rows) if valid else None, world)
        self.step = 0
        self._saved_step = 0  # what the initial weights need no checkpoint for
        self.consumed_rows = 0
        self.earlier_rows = 0
        """Rows that were read of other data, before a checkpoint was continued on the present one."""
        self.tokens = 0
        self.skipped = SkippedSteps()
        self.guard = Guard(config.guard)
        self.best, self._notes = self._best_of({})
        self._epochs = config.train.epochs
        self._settle_steps()
        self.engine = build_engine(self.config, self.grid)
        self.engine.before_change = self.store.wait_for_copy
        self.metrics = StepMetrics(self.config.model, world, config.log.peak_flops)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        assert self.config.train.steps is not None
        return self.config.train.steps

    def _settle_steps(self) -> None:
        """What depends on where the run stands: `train.epochs` in steps, as the batch size may have been another one
        before; the warm-up that fits them; and the rows of `train.skip_steps`.
        """
        train, optim = self.config.train, self.config.optim
        if self._epochs is not None:
            end = epoch_rows(self._epochs, self.mixture.n_rows)
            steps = self.step + steps_between(train, *(self.earlier_rows + row for row in (self.consumed_rows, end)))
            train = train.model_copy(update={"steps": steps, "epochs": None})
        if optim.warmup_steps is None:
            assert train.steps is not None
            optim = optim.model_copy(update={"warmup_steps": default_warmup(train.steps, optim.decay_steps)})
        self.config = self.config.model_copy(update={"train": train, "optim": optim})
        self.skipped.settle(train, self.step, self.consumed_rows, self.earlier_rows)

    def resume(self) -> list[str]:
        """Continue the run folder's newest valid checkpoint, or begin from the one that the config names.

        Returns lines that say what was taken and what was skipped. A named checkpoint is where a new run folder begins;
        once the folder has checkpoints of its own, the same command, given by a person or by a restart, goes on there.
        """
        mode, folder = self.config.checkpoint.resume, self.store.folder
        self.store.clean()
        used = main_decides(lambda: bool(list_steps(folder)), self.world)
        if mode == "never" and used:
            raise agreed_error(
                f"{self.run_dir}: checkpoint.resume=never, but it holds checkpoints; use another --run_dir"
            )
        if mode not in ("auto", "never"):
            named = Path(main_decides(lambda: str(resolve(mode).path.resolve()), self.world))
            if named.is_relative_to(self.run_dir.resolve()):
                raise agreed_error(
                    f"checkpoint.resume={mode} lies in the run folder itself, which continues its newest checkpoint; "
                    f"to go back to an older one, give another --run_dir"
                )
            if not used:
                return self._resumed(self.store.load_exactly(named, self.read_checkpoint))
        checkpoint, skipped = self.store.load_newest(self.read_checkpoint)
        lines = [f"skipped a checkpoint, now set aside: {line}" for line in skipped]
        return lines + (self._begin() if checkpoint is None else self._resumed(checkpoint))

    def _begin(self) -> list[str]:
        """Lines about the tokenizer of a new run, and about its weights if they are to come from elsewhere
        (collective). UserError where the schedule has no room in it, which only the data says of `train.epochs`.
        """
        optim, length = self.config.optim, f"train.epochs={self._epochs}, that is {self.steps} steps"
        wrong = misfit(optim.warmup_steps, optim.decay_steps, self.steps, length)
        wrong = wrong or untraced(self.config.log.trace_steps, self.steps, length)
        if wrong and self._epochs is not None:
            raise agreed_error(wrong)
        if self.config.model.init_from is None:
            return notes_of(self.tokenizer)
        apply, lines = all_or_none(lambda: read_weights(self.engine, self.config.model), self.world)
        apply()
        return [*lines, *notes_of(self.tokenizer)]

    def _resumed(self, checkpoint: Checkpoint) -> list[str]:
        rows = self.earlier_rows + self.consumed_rows
        return [f"resumed from {checkpoint.path} (step {checkpoint.step}, {rows:,} rows seen)", *self._notes]

    def _refuse_another_run(self) -> None:
        refuse_another_run(self.config, self.store.folder, self.tokenizer)

    def read_checkpoint(self, checkpoint: Checkpoint) -> Any:
        """Compare configs, read this rank's ranges; return the function that makes the run go on from them.

        What fails has spoilt masters and optimizer state: another checkpoint has to be read, or the run ends.
        """
        meta = checkpoint.meta_with("data", "expert_counts", "optimizer_scalars", "tokens", "best", "guard")
        changed = changes(checkpoint, self.config, self.tokenizer)
        changed += data_refused(self.mixture, meta["data"], self.config.checkpoint.allow_changes)
        refuse(checkpoint, changed)
        kinds = checkpoint.kinds()
        self.engine.prepare_load(kinds, meta["optimizer_scalars"])
        places = []
        for name, kind, box, start, values in self.engine.fragments():
            if kind == "ema" and kind not in kinds[name]:
                kind = "master"  # an average that begins now begins with the weights
            elif kind != "master" and kind not in kinds[name]:
                continue  # of a parameter that was frozen until now: zeros
            places.append((name, kind, box, start, start + values.numel(), values))
        checkpoint.fill(places)

        def apply() -> None:
            self.engine.finish_load()
            if meta["expert_counts"]:
                self.engine.set_expert_counts(torch.tensor(meta["expert_counts"], dtype=torch.int64))
            self.step = self._saved_step = checkpoint.step
            self.consumed_rows = meta["data"]["consumed"]
            self.earlier_rows = meta["data"].get("earlier_rows", 0)
            self.tokens = meta["tokens"]
            self.best, other_rows = self._best_of(meta["best"])
            self.guard.load(guard_state(meta, self.step))
            self.skipped.load(meta, self.step)
            # a checkpoint from before rows were kept does not tell
            late = self.skipped.missed(self.config.train, self.step) if "skip_steps" in meta else []
            other_data = data_line(self.mixture, meta["data"])
            if other_data:
                self.earlier_rows += self.consumed_rows
                self.consumed_rows = 0
                self.guard.forget_data()
                self.skipped.forget_data()
            self._settle_steps()
            changed = change_lines(meta, self.config, self.world.size, self.step)
            self._notes = [*changed, *([other_data] if other_data else []), *other_rows, *late]

        return apply

    def _best_of(self, state: dict[str, Any]) -> tuple[Best, list[str]]:
        """A checkpoint's best validation, if it counts for this run's held-out rows, and lines where it does not."""
        best = Best(**state)
        return (best, []) if self.held_out is None else best.on(self.held_out)

    def save(self, log: RunLog | None, last: bool = False) -> None:
        """Begin the checkpoint of the current step, once the one before it is written; with checkpoint.asynchronous
        off, complete it (collective). Older ones are pruned with it. `last`: see `_attempt`.
        """
        self._attempt(self.store.finish, log)
        meta = {
            "config": self.config.model_dump(mode="json"),
            "tokenizer": self.tokenizer.fingerprint,
            "data": self.mixture.state(self.consumed_rows, self.earlier_rows),
            "expert_counts": self.engine.expert_counts().tolist(),
            "optimizer_scalars": self.engine.optimizer_scalars(),
            "tokens": self.tokens,
            "best": dataclasses.asdict(self.best),
            "guard": self.guard.state(),
            "skip_steps": self.skipped.state(),
            "layout": dataclasses.asdict(self.grid.layout),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }
        asynchronous = self.config.checkpoint.asynchronous

        def begin() -> int | None:
            owned = self.engine.owned_fragments()
            self.store.begin(self.step, self.engine.shapes, owned, meta, self.best.step, asynchronous)
            return None if asynchronous else self.store.finish()

        self._attempt(begin, log, last)

    def _attempt(self, saving: Callable[[], int | None], log: RunLog | None, last: bool = False) -> None:
        """Call what may end a save and returns its step then (collective).

        Where a save fails, training goes on if the config says so; not from the `last` one, after which nothing is
        trained that could be saved later.
        """
        try:
            step = saving()
        except SaveFailed as error:
            if last or self.config.checkpoint.on_failure == "stop":
                raise
            if log:
                log.say(f"step {self.step}: no checkpoint, as checkpoint.on_failure=continue: {error}")
        else:
            self._saved_step = self._saved_step if step is None else step

    def fit(self) -> None:
        """Train from the current step to the last one, alone in the run folder."""
        with run_lock(self.run_dir, self.world):
            try:
                self._fit()
            except UserError as error:
                if error.agreed:  # all ranks are here, and what is already on its way is worth having
                    with suppress(UserError):
                        self.store.finish()
                raise

    def _fit(self) -> None:
        found = [*self._data_notes, *self.resume()]
        notes: list[str] | None = found + config_notes(
            self.config, self.prompts, self.step, self.earlier_rows + self.consumed_rows
        )
        requests = Requests(self.run_dir)
        try:
            while notes is not None:
                log = all_or_none(partial(self._open_log, notes) if self.world.is_main else _nothing, self.world)
                try:
                    notes = self._run(log, requests)
                finally:
                    if log:
                        log.close()
        finally:
            requests.close()

    def _run(self, log: RunLog | None, requests: Requests) -> list[str] | None:
        """Train to the end; or, where a step sent the run back to its last checkpoint, stop there with notes of it."""
        end = self._end()
        if end is not None:
            if log:
                log.say(f"nothing to do: {end}")
            return None
        first = self.step + 1
        trace = Trace(
            self.engine.model, self.world, self.run_dir / "trace.jsonl", self.config.log.trace_steps, first
        )
        with self.loader() as loader:
            while end is None:
                started = time.perf_counter()
                batch, n_targets, n_tokens, stop, save, due = self._next_batch(loader, requests)
                if due:
                    self._attempt(self.store.advance, log)
                if stop or save:
                    self._obey(stop, log, requests)
                with trace.step(self.step + 1, self.engine.gradient_scale):
                    result, lr = self.take_step(batch, n_targets, n_tokens)
                if self.config.checkpoint.asynchronous and self.step == first:  # the optimizer has its state now
                    self.store.prepare(self.engine.owned_fragments())
                action, lines = self.guard.judge(self.step, result, *rows_and_size(batch))
                lines = [*trace.notes(), *part_passed_over(self.step, batch), *lines]
                if action == "rewind":
                    return [*lines, *self._rewind(log)]
                row = self.metrics.row(
                    result,
                    batch,
                    step=self.step,
                    tokens=self.tokens,
                    epoch=self.mixture.epoch(self.consumed_rows),
                    lr=lr,
                    seconds=time.perf_counter() - started,
                )
                end = self._after_step(row, log, lines, requests)
        self._attempt(self.store.finish, log, last=True)
        if log:
            how = "done" if self.step >= self.steps else end
            log.say(
                f"{how}: {self.step} steps, {self.tokens:,} tokens; curves: tensorboard --logdir {self.run_dir / 'tb'}"
            )
        return None

    def take_step(
        self, batch: StepBatch, n_targets: int, n_tokens: int, always: bool = False
    ) -> tuple[StepResult, float]:
        """The next optimizer step, on these rows, at the learning rate that is returned too (collective).

        n_targets, n_tokens: of all ranks. A step that is to be passed over is not computed, unless `always`.
        """
        step = self.step + 1
        lr = learning_rate(self.config.optim, self.steps, step)
        if batch.is_passed_over and not always:
            result = StepResult.passed_over(n_targets, n_tokens)
        else:
            _, size = rows_and_size(batch)
            result = self.engine.train_step(batch, n_targets, n_tokens, lr, self.guard.loss_limit(size))
        self.step = step
        self.consumed_rows += batch.n_rows
        self.tokens += n_tokens
        return result, lr

    def _rewind(self, log: RunLog | None) -> list[str]:
        """Go back to the newest checkpoint (collective); UserError where there is none yet."""
        self._attempt(self.store.finish, log)
        checkpoint, skipped = self.store.load_newest(self.read_checkpoint)
        if checkpoint is None:
            raise agreed_error(
                f"step {self.step} is to be passed over, but there is no checkpoint yet to go back to; "
                f"give --train.skip_steps=[{self.step}], or a shorter checkpoint.interval"
            )
        return [f"skipped a checkpoint, now set aside: {line}" for line in skipped] + self._resumed(checkpoint)

    def _end(self) -> str | None:
        """Why there is no next step, in words; None when there is one."""
        patience, best = self.config.eval.patience, self.best
        if self.step >= self.steps:
            return f"the run is at step {self.step} of train.steps={self.steps}"
        if best.exhausted(patience):
            return (
                f"stopped early at step {self.step} of train.steps={self.steps}, after {best.since} validations "
                f"(eval.patience={patience}) without a loss below the {best.valid_loss:.4f} of step {best.step}"
            )
        return None

    def loader(self) -> TrainLoader:
        """This rank's steps from where the run stands."""
        train, data = self.config.train, self.grid.data
        return TrainLoader(
            self.mixture,
            seq_len=train.seq_len,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            dp_rank=data.rank,
            dp_size=data.size,
            start_row=self.consumed_rows,
            batch_schedule=train.batch_schedule,
            seq_len_schedule=train.seq_len_schedule,
            earlier_rows=self.earlier_rows,
            passed_over=[*self.guard.passed_over, *self.skipped.ranges],
        )

    def _next_batch(self, loader: TrainLoader, requests: Requests) -> tuple[StepBatch, int, int, bool, bool, bool]:
        """This rank's batch, the global numbers of its targets and tokens, whether any rank was asked to stop or save,
        and whether a save is to be taken further.

        What one rank cannot read stops them all, with one message.
        """
        failure: Exception | None = None
        batch: StepBatch | None = None
        try:
            batch = loader.next()
        except (UserError, OSError) as error:
            failure = error
        flags = [batch is None, requests.stop is not None, self.world.is_main and requests.save_wanted()]
        flags += self.store.flags()
        counts = [0, 0] if batch is None or not self.grid.reports_loss else [batch.n_targets, batch.n_tokens]
        sums = [int(n) for n in sum_over_ranks([*counts, *flags], self.world)]
        n_targets, n_tokens, failed, stop, save, *saving = sums
        if failed:
            all_or_none(partial(_raise, failure), self.world)
        assert batch is not None
        return batch, n_targets, n_tokens, stop > 0, save > 0, self.store.due(*saving)

    def _obey(self, stop: bool, log: RunLog | None, requests: Requests) -> None:
        """Save at this step boundary; then leave with EXIT_STOPPED if that was asked for (collective)."""
        self._attempt(self.store.finish, log)
        if self.step != self._saved_step:
            self.save(log, last=stop)
            self._attempt(self.store.finish, log, last=stop)
            if log and self.step == self._saved_step:
                log.say(f"saved on request: {self.store.path(self.step)}")
        main_decides(requests.save_done, self.world)
        if stop:
            if log:
                log.say(f"stopped on request after step {self.step}; the same command goes on")
            # the store may end with the first rank that leaves, and others may still be asking it for the decision
            sum_over_ranks([0.0], self.world)
            sys.exit(EXIT_STOPPED)

    def _after_step(
        self, row: dict[str, Any], log: RunLog | None, notes: list[str], requests: Requests
    ) -> str | None:
        """Validate, record, save and sample, each when its time has come; why the run ends here, or None."""
        config = self.config
        new_best = False
        if self.held_out and (self.step == self.steps or self.step % config.eval.interval == 0):
            found = validate(self.engine, self.held_out, self.tokenizer, config, lambda: bool(requests.stop))
            if found is None:
                notes = [*notes, f"step {self.step}: validation given up, as the run is to stop"]
            else:
                row.update(found)
                if not math.isfinite(found["valid_loss"]):
                    raise agreed_error(
                        f"step {self.step}: valid_loss is {found['valid_loss']}; the last checkpoint is intact"
                    )
                new_best = self.best.update(found["valid_loss"], self.step)
        end = self._end()
        if log:
            for line in notes:
                log.say(line)
            log.step(row)
        if end or self.step % config.checkpoint.interval == 0 or (new_best and config.checkpoint.keep_best):
            self.save(log, last=end is not None)
        if config.eval.sample_interval and (end or self.step % config.eval.sample_interval == 0):
            self._sample(log, requests)
        return end

    def _sample(self, log: RunLog | None, requests: Requests) -> None:
        """Continue the prompts; by rank 0, unless it was asked to stop, or where a forward needs the other ranks, by
        all alike.
        """
        config, layout = self.config, self.grid.layout
        if layout.zero_stage == 3 or max(layout.tensor, layout.pipeline, layout.expert) > 1:
            texts = self._continuations()
        else:
            texts = main_decides(lambda: [] if requests.stop else self._continuations(), self.world)
        if log and texts:
            for prompt, text in zip(config.eval.prompts, texts, strict=True):
                log.sample(self.step, prompt, prompt + text)

    def _continuations(self) -> list[str]:
        most, context = self.config.eval.sample_tokens, context_length(self.config.model)
        try:
            continuations = generate(
                self.engine.decoder(),
                self.prompts,
                max_new_tokens=[min(most, context - len(ids)) for ids in self.prompts],
                temperature=self.config.eval.temperature,
                stop_ids=self.tokenizer.end_ids,
                seed=self.step,
                n_ids=self.tokenizer.vocab_size,
            )
        except FloatingPointError as error:  # on all ranks alike; whether such a run goes on is the guard's to say
            return [f" ({error})"] * len(self.prompts)
        return [continuation(self.tokenizer, *row) for row in zip(self.prompts, continuations, strict=True)]

    def _describe(self, write: Callable[[], str | None]) -> str | None:
        """Write a description of the run into its folder. OSError where a new run has none; one that goes on says so.
        """
        try:
            return write()
        except OSError as error:
            if not self.step:
                raise
            return f"{error.filename or self.run_dir} cannot be written ({error.strerror}); the run goes on without"

    def _open_log(self, notes: Sequence[str | None]) -> RunLog:
        """The run folder and its log with the opening lines (rank 0)."""
        config = self.config
        self.run_dir.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        described = (
            lambda: write_unless_same(self.run_dir / "config.yaml", text.encode()),
            lambda: save_tokenizer(self.tokenizer, self.run_dir),
        )
        notes = [*notes, *(self._describe(write) for write in described)]
        curves: list[CurveSink] = []
        if config.log.tensorboard:
            curves.append(TensorBoard(self.run_dir, self.step + 1))
        if config.log.wandb:
            curves.append(WeightsAndBiases(self.run_dir, config.model_dump(mode="json"), resumed=self.step > 0))
        log = RunLog(
            self.run_dir,
            first_step=self.step + 1,
            steps=self.steps,
            interval=config.log.interval,
            curves=curves,
        )
        for line in filter(None, notes):
            log.say(line)
        log.say(
            f"{self.engine.n_parameters:,} parameters, {self.world.size} process(es) on {self.world.device.type}: "
            f"{self.grid.layout}, {config.train.precision} ({self.precision_reason}); one epoch is "
            f"{self.mixture.n_rows:,} rows of {config.train.seq_len} tokens; run folder {self.run_dir}"
        )
        if self.held_out is not None:
            log.say(f"a validation reads {self.held_out.described()} ({self._rows_said})")
        return log


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def _nothing() -> None:
    return None
