"""What a run is made of, built from its config before the first step.

What can be refused is refused before work is lost: config, files and tokenizer first, then data, model and engine. The
run folder is made last, when the run begins.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llm.checkpoint.store import CheckpointStore
from llm.compile import compile_blocks
from llm.data.heldout import HeldOut
from llm.data.mixture import Mixture
from llm.parallel.collectives import all_or_none, main_decides
from llm.parallel.engine.build import build_replica
from llm.parallel.engine.engine import Engine
from llm.parallel.grid import Grid, make_grid
from llm.parallel.launch.world import World
from llm.tasks import Task
from llm.tokenizer import Tokenizer
from llm.tokenizers.chat import ChatTemplate
from llm.train.best import Followed
from llm.train.chat import run_tokenizer
from llm.train.config import RunConfig, accumulation_steps, check_layout
from llm.train.evaluation import RunTasks, check_best_of_validation, followed_in, open_run_tasks
from llm.train.freezing import parameter_table
from llm.train.optimizer import make_optimizer
from llm.train.progress import Progress
from llm.train.prompts import SamplePrompts, encode_prompts
from llm.train.resume.choose import checkpoint_to_continue, refuse_another_run
from llm.train.settle import (
    objectives_in,
    rows_wanted,
    settle_length,
    settle_model,
    settle_outputs,
    settle_precision,
    settle_rows,
    settle_warmup,
    task_in,
    with_vocabulary,
)


@dataclass
class Run:
    """The parts of one run on this world of processes."""

    config: RunConfig
    """Settled: with a vocabulary, a precision, and from `settle` on a number of steps."""
    folder: Path
    world: World
    grid: Grid
    tokenizer: Tokenizer
    template: ChatTemplate | None
    """By which conversations are written, where the run has some."""
    prompts: SamplePrompts
    """Those of the samples."""
    store: CheckpointStore
    task: Task
    mixture: Mixture
    held_out: HeldOut | None
    tasks: RunTasks
    """`eval.tasks`, with what they ask"""
    followed: Followed | None
    """What says which checkpoint is the best"""
    engine: Engine
    epochs: float | None
    """`train.epochs` as it was given."""
    notes: list[str]
    """Lines about the data."""
    precision_reason: str
    """What decides train.precision, in words."""
    rows_reason: str
    """What decides the rows of a validation, in words."""

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        assert self.config.train.steps is not None
        return self.config.train.steps

    def settle(self, progress: Progress) -> None:
        """Set what depends on where the run stands: its length in steps, its warm-up, the rows of train.skip_steps."""
        place = (progress.step, progress.consumed_rows, progress.earlier_rows)
        self.config = settle_length(self.config, self.epochs, self.mixture.n_rows, *place)
        progress.skipped.settle(self.config.train, *place)


def build_run(config: RunConfig, folder: Path, world: World) -> Run:
    """The run of a config with its files in `folder` (collective); UserError on all ranks where it cannot be."""
    grid = make_grid(world, check_layout(config, world.size))
    all_or_none(lambda: objectives_in(config), world)
    tokenizer, template = all_or_none(lambda: run_tokenizer(config), world)
    prompts = encode_prompts(config, tokenizer, world, template)
    settled = with_vocabulary(config, tokenizer)
    all_or_none(lambda: check_layout(settled, world.size), world)
    kept = config.checkpoint
    checkpoints = folder / "checkpoints"
    store = CheckpointStore(
        checkpoints,
        world,
        keep=kept.keep,
        keep_best=kept.keep_best,
        keep_every=kept.keep_every,
        cut=all_or_none(lambda: parameter_table(settled), world).cut,
    )
    settled, precision_reason = settle_precision(settled, store, world)
    settled = settle_outputs(settle_warmup(settled, store, world), store, world)
    main_decides(lambda: refuse_another_run(settled, store.folder, tokenizer), world)
    settled, rows_reason = settle_rows(settled)
    task = all_or_none(lambda: task_in(settled), world)
    rows = task.open_rows(rows_wanted(settled), tokenizer, world)
    goes_on = main_decides(lambda: checkpoint_to_continue(settled, store.folder) is not None, world)
    settled = all_or_none(partial(settle_model, settled, task, rows, goes_on), world)
    all_or_none(lambda: check_best_of_validation(settled, task), world)
    tasks = all_or_none(lambda: open_run_tasks(settled, tokenizer, template), world)
    engine = build_engine(settled, grid)
    engine.before_change = store.wait_for_copy
    return Run(
        config=settled,
        folder=folder,
        world=world,
        grid=grid,
        tokenizer=tokenizer,
        template=template,
        prompts=prompts,
        store=store,
        task=task,
        mixture=rows.train,
        held_out=rows.valid,
        tasks=tasks,
        followed=followed_in(settled, rows.valid, tasks),
        engine=engine,
        epochs=config.train.epochs,
        notes=rows.notes,
        precision_reason=precision_reason,
        rows_reason=rows_reason,
    )


def build_engine(config: RunConfig, grid: Grid) -> Engine:
    """The engine of a resolved config, one with a vocabulary and a precision (collective).

    UserError on all ranks where this machine lacks what the config needs.
    """
    train, parallel, table = config.train, config.parallel, parameter_table(config)
    objectives = objectives_in(config)
    replica = build_replica(
        config.model,
        train.seed,
        grid,
        zero_stage=parallel.zero_stage,
        precision=train.precision,
        seq_len=train.seq_len,
        source_len=config.source_len,
        logits=any(objective.head_calls for objective in objectives.mains),
        table=table,
    )
    engine = Engine(
        replica,
        make_optimizer(replica.model, config.optim, table),
        objectives=objectives,
        precision=train.precision,
        micro_batch_size=train.micro_batch_size,
        max_accumulation=accumulation_steps(config, grid.rows.size),
        clip_norm=config.optim.clip_norm,
        seed=train.seed,
        zero_stage=parallel.zero_stage,
        offload_optimizer=parallel.offload_optimizer,
        ema_decay=config.optim.ema_decay,
        extra_config=dict(config.deepspeed),
    )
    replica.model.activation_checkpointing = train.activation_checkpointing
    if train.compile:
        all_or_none(partial(compile_blocks, replica.model), grid.world)
    return engine
