"""What a run is made of, built from its config before the first step.

What can be refused is refused before work is lost: config, files and tokenizer first, then data, model and engine. The
run folder is made last, when the run begins.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llm.checkpoint.store import CheckpointStore
from llm.compile import compile_blocks
from llm.data.contamination import contamination_notes
from llm.data.heldout import HeldOut
from llm.data.mixture import Mixture
from llm.data.source import TokenSource
from llm.data.sources import check_data, open_data, prepare_data, sides
from llm.parallel.collectives import all_or_none, main_decides
from llm.parallel.engine.build import build_replica
from llm.parallel.engine.engine import Engine
from llm.parallel.grid import Grid, make_grid
from llm.parallel.launch.world import World
from llm.parameters import ParameterTable
from llm.tokenizer import Tokenizer, load_tokenizer
from llm.train.config import RunConfig, accumulation_steps, check_layout
from llm.train.optimizer import make_optimizer
from llm.train.progress import Progress
from llm.train.resume.choose import refuse_another_run
from llm.train.settle import (
    encode_prompts,
    settle_length,
    settle_precision,
    settle_rows,
    settle_warmup,
    with_vocabulary,
)

VERIFY_TOKENS = 1 << 28
"""A source up to this size is verified whole before the run begins (under a second); a larger one shard by shard as
it is first read.
"""


@dataclass
class Run:
    """The parts of one run on this world of processes."""

    config: RunConfig
    """Settled: with a vocabulary, a precision, and from `settle` on a number of steps."""
    folder: Path
    world: World
    grid: Grid
    tokenizer: Tokenizer
    prompts: list[list[int]]
    """Those of the samples, in tokens."""
    store: CheckpointStore
    mixture: Mixture
    held_out: HeldOut | None
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
    tokenizer: Tokenizer = all_or_none(lambda: load_tokenizer(config.tokenizer), world)
    prompts = encode_prompts(config, tokenizer, world)
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
        cut=ParameterTable.of(settled.model).cut,
    )
    settled, precision_reason = settle_precision(settled, store, world)
    settled = settle_warmup(settled, store, world)
    main_decides(lambda: refuse_another_run(settled, store.folder, tokenizer), world)
    sources, valid, notes = open_sources(settled, tokenizer, world)
    seq_len = settled.train.seq_len
    mixture = all_or_none(lambda: Mixture(sources, seq_len, settled.train.seed), world)
    settled, rows_reason = settle_rows(settled)
    held_out = all_or_none(lambda: HeldOut(valid, seq_len, settled.eval.rows) if valid else None, world)
    engine = build_engine(settled, grid)
    engine.before_change = store.wait_for_copy
    return Run(
        config=settled,
        folder=folder,
        world=world,
        grid=grid,
        tokenizer=tokenizer,
        prompts=prompts,
        store=store,
        mixture=mixture,
        held_out=held_out,
        engine=engine,
        epochs=config.train.epochs,
        notes=notes,
        precision_reason=precision_reason,
        rows_reason=rows_reason,
    )


def open_sources(
    config: RunConfig, tokenizer: Tokenizer, world: World
) -> tuple[list[tuple[str, TokenSource, float]], list[TokenSource], list[str]]:
    """The training sources with their names and weights, the held-out sources, and lines that say what they are made
    of; raw text is sharded by rank 0."""
    cache, of_role = config.data.cache_dir, sides(config.data.train, config.data.valid)
    for side in of_role.values():  # both before the first is sharded, which may take long
        main_decides(partial(check_data, side, cache_dir=cache), world)
    opened: dict[str, list[tuple[str, TokenSource, float]]] = {"data.train": [], "data.valid": []}
    for role, side in of_role.items():
        main_decides(partial(prepare_data, side, tokenizer, cache), world)
        opened[role] = all_or_none(partial(open_data, side, tokenizer, cache), world)
        for _, source, _ in opened[role]:
            if source.n_tokens <= VERIFY_TOKENS:
                main_decides(partial(_verify, source), world)
    train, valid = ([source for _, source, _ in opened[role]] for role in ("data.train", "data.valid"))
    contamination = main_decides(partial(contamination_notes, train, valid), world)
    return opened["data.train"], valid, [note for source in train + valid for note in source.notes] + contamination


def _verify(source: TokenSource) -> None:
    TokenSource.open(source.path, verify=True)


def build_engine(config: RunConfig, grid: Grid) -> Engine:
    """The engine of a resolved config, one with a vocabulary and a precision (collective).

    UserError on all ranks where this machine lacks what the config needs.
    """
    train, parallel = config.train, config.parallel
    replica = build_replica(
        config.model,
        train.seed,
        grid,
        zero_stage=parallel.zero_stage,
        precision=train.precision,
        seq_len=train.seq_len,
    )
    engine = Engine(
        replica,
        make_optimizer(replica.model, config.optim),
        precision=train.precision,
        micro_batch_size=train.micro_batch_size,
        max_accumulation=accumulation_steps(config, grid.data.size),
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
