"""The engine that a run config asks for: model, optimizer and DeepSpeed on a grid."""

from functools import partial

from llm.compile import compile_blocks
from llm.parallel.build import build_model
from llm.parallel.collectives import all_or_none
from llm.parallel.engine import Engine
from llm.parallel.grid import Grid
from llm.parallel.pipeline import engine_class
from llm.train.config import RunConfig, accumulation_steps
from llm.train.optimizer import make_optimizer


def build_engine(config: RunConfig, grid: Grid) -> Engine:
    """The engine of a resolved config, one with a vocabulary and a precision (collective).

    UserError on all ranks where this machine lacks what the config needs.
    """
    train, parallel = config.train, config.parallel
    model = build_model(
        config.model,
        train.seed,
        grid,
        zero_stage=parallel.zero_stage,
        precision=train.precision,
        seq_len=train.seq_len,
    )
    engine = engine_class(grid)(
        model,
        make_optimizer(model, config.optim),
        grid=grid,
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
    model.activation_checkpointing = train.activation_checkpointing
    if train.compile:
        all_or_none(partial(compile_blocks, model), grid.world)
    return engine
