"""The layout that a run config asks for, on a number of ranks."""

from functools import reduce
from typing import Any

from llm.parallel.layout import Layout
from llm.parallel.validate import WHOLE_PARAMETERS_ONLY, Choice, Needs, check
from llm.train.config.schema import RunConfig
from llm.train.config.train import TrainConfig


def layout_of(config: RunConfig, world: int) -> Layout:
    """The layout that the config asks for on `world` ranks, not checked."""
    parallel = config.parallel
    return Layout(
        world=world,
        tensor=parallel.tensor,
        expert=parallel.expert,
        pipeline=parallel.pipeline,
        context=parallel.context,
        zero_stage=parallel.zero_stage,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_schedule=parallel.pipeline_schedule,
    )


def check_layout(config: RunConfig, world: int) -> Layout:
    """The layout of the config on `world` ranks.

    UserError, naming the key and the nearest layout that works, when the run cannot be cut in this way. Everything of
    a config that depends on the number of ranks is checked here.
    """
    layout, train = layout_of(config, world), config.train
    settings = ((key, reduce(getattr, key.split("."), config)) for key in WHOLE_PARAMETERS_ONLY)
    needs = Needs(
        args=config.model,
        precision=train.precision,
        offload_optimizer=config.parallel.offload_optimizer,
        seq_len=train.seq_len,
        source_len=config.source_len,
        batches=_global_batches(train),
        asked_for=tuple(f"{key}={_as_typed(value)}" for key, value in settings if value),
    )
    check(needs, Choice(layout, train.micro_batch_size))
    return layout


def accumulation_steps(config: RunConfig, data_ranks: int) -> int:
    """Most micro-batches per rank and step of a layout that check_layout lets pass."""
    return max(size for _, size in _global_batches(config.train)) // (config.train.micro_batch_size * data_ranks)


def _global_batches(train: TrainConfig) -> tuple[tuple[str, int], ...]:
    later = ((f"train.batch_schedule.{i}.1", size) for i, (_, size) in enumerate(train.batch_schedule))
    return (("train.global_batch_size", train.global_batch_size), *later)


def _as_typed(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value)
