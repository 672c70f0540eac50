"""What `--dry_run` reports of a run before it begins: the grid of ranks, memory, disk space and traffic."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from llm.args.layers import attention_specs
from llm.args.model import OF_VALUES
from llm.data.sources import source_specs
from llm.errors import UserError
from llm.flops import tile_flops, token_flops, usual_tiles
from llm.kernels.explicit_attention import BYTES_A_WEIGHT, weights_at_once
from llm.layers.parameter import VISION
from llm.model import LLM
from llm.parallel.engine.deepspeed_private import mark
from llm.parallel.grid import stage_name
from llm.parallel.layout import Dimension, Layout
from llm.parallel.stages import bubble
from llm.plan import activations, memory, traffic
from llm.plan.workload import ZERO3_DEFAULTS, OptimizerGroup, Workload
from llm.pretrained import args_of
from llm.tokenizer import load_tokenizer
from llm.tokenizers.folder import notes_of
from llm.train.chat import run_tokenizer
from llm.train.config import RunConfig
from llm.train.config.length import default_warmup
from llm.train.disk import checkpoints_at_once, room
from llm.train.evaluation import open_run_tasks, opening_lines
from llm.train.freezing import parameter_table
from llm.train.notes import config_notes
from llm.train.optimizer import parameter_groups
from llm.train.preflight import ALONE
from llm.train.prompts import encode_prompts
from llm.train.settle import objectives_in, task_in, with_vocabulary

REPLICA: tuple[Dimension, ...] = ("tensor", "context", "data", "pipeline")
EXPERTS: tuple[Dimension, ...] = ("expert", "expert_data")
SHOWN = 4
"""Ranks of a group, and groups of a dimension, that are listed; of more, the last one and dots."""


def workload(config: RunConfig, layout: Layout) -> Workload:
    """The config as llm/parallel predicts from it. Precision `auto` counts as bf16; model.vocab_size must be set."""
    args, train, sources = config.model, config.train, source_specs(config.data.train)
    objectives = objectives_in(config)
    of_sources = len(sources) if len(sources) > 1 and objectives.of_tokens else 0
    model, table = LLM(args, device="meta"), parameter_table(config)
    names = {}
    for name, parameter in model.named_parameters():
        names[id(parameter)] = name
        mark(parameter, False, layout.expert if table[name].expert_dim is not None else 1)
    groups = tuple(
        OptimizerGroup(
            names=tuple(names[id(parameter)] for parameter in group["params"]),
            algorithm=_algorithm(group, config.optim.name),
            on_expert_ranks=group.get("moe", False),
        )
        for group in parameter_groups(model, config.optim, table)
    )
    return Workload(
        args=args,
        table=table,
        layout=layout,
        precision="bf16" if train.precision == "auto" else train.precision,
        groups=groups,
        micro_batch_size=train.micro_batch_size,
        seq_len=train.seq_len,
        source_len=config.source_len,
        losses=len(objectives.weights) + len(objectives.measured) + of_sources,
        head_calls=sum(objective.head_calls for objective in objectives.mains),
        head_gradients=sum(objective.head_calls > 0 for objective in objectives.mains),
        predicts=args.n_prediction > 0 and any(objective.predicts for objective in objectives.mains),
        accumulation=train.global_batch_size // (train.micro_batch_size * layout.data),
        offload_optimizer=config.parallel.offload_optimizer,
        recompute=train.activation_checkpointing,
        ema=config.optim.ema_decay is not None,
        zero=config.deepspeed.get("zero_optimization", {}),
    )


def _algorithm(group: dict[str, Any], name: str) -> str:
    """By the state that the optimizer keeps: none of what is frozen."""
    if group["lr_factor"] == 0 or name == "sgd":
        return "sgd"
    return "muon" if group["muon"] else "adamw"


def report(config: RunConfig, layout: Layout, run_dir: Path | None = None) -> str:
    """Lines that are comments in YAML; with the run's folder also whether its disk has room for the checkpoints."""
    return "".join(f"# {line}".rstrip() + "\n" for line in _lines(config, layout, run_dir))


def _lines(config: RunConfig, layout: Layout, run_dir: Path | None) -> Iterator[str]:
    yield from _notes(config)
    yield from _grid(layout)
    try:
        config = _with_vocabulary(config)
    except UserError as error:
        yield f"sizes are not known: model.vocab_size=-1 takes the tokenizer's, and {error}"
        return
    work = workload(config, layout)
    yield from _pipeline(work)
    passed = [f"zero_optimization.{option}" for option in work.zero.keys() - ZERO3_DEFAULTS.keys()]
    for option in sorted([*passed, *config.deepspeed.keys() - {"zero_optimization"}]):
        yield f"deepspeed.{option} is passed through; what follows does not know of it"
    if config.train.precision == "auto":
        yield "train.precision=auto counts as bf16, which GPUs take"
    if config.optim.warmup_steps is None and config.train.steps is not None:
        steps = default_warmup(config.train.steps, config.optim.decay_steps, config.optim.schedule)
        yield f"optim.warmup_steps=null is {_count(steps, 'step')} of train.steps={config.train.steps}"
    unscaled = [key for key in OF_VALUES if getattr(config.model, key) is None]
    if (config.model.input_dim or config.model.output_dim) and unscaled:
        yield "how values are scaled is learned from the training rows as the run begins"
    if config.model.n_prediction and config.model.prediction_names is None:
        yield "model.prediction_names, and how values are scaled, are learned from the training rows as the run begins"
    if task_in(config).compares_with_start:
        yield f"task={config.task}: all data is read once more, before the first step; what follows is of a step"
    if config.train.objectives:
        yield "what train.objectives keep and send, beyond a sum each, is theirs to know; what follows is without it"
    yield from _vision(work)
    yield from _memory(work, config.checkpoint.asynchronous)
    yield from _attention_dropout(work)
    yield from _disk(config, memory.checkpoint_bytes(work), run_dir)
    if run_dir is not None:
        tokenizer, template = run_tokenizer(config)
        yield from opening_lines(config, open_run_tasks(config, tokenizer, template, names_known=False))
    yield from _traffic(work)


def _notes(config: RunConfig) -> list[str]:
    """What is to be said about the folder that the weights come from, and of the config itself."""
    source = config.model.init_from
    found: list[str] = []
    if source is not None and Path(source).exists():
        args_of(source, notify=lambda line: found.append(f"note: {line}"))
        found += [f"note: {line}" for line in notes_of(load_tokenizer(config.tokenizer))]
    prompts: list[list[int]] = []
    with suppress(UserError):  # --dry_run=config has no need of the tokenizer's file
        tokenizer, template = run_tokenizer(config)
        prompts = encode_prompts(config, tokenizer, ALONE, template).ids
    return found + config_notes(config, prompts)


def _with_vocabulary(config: RunConfig) -> RunConfig:
    if config.model.vocab_size != -1 and not config.chat.add_tokens:
        return config
    return with_vocabulary(config, run_tokenizer(config)[0])


def _grid(layout: Layout) -> Iterator[str]:
    yield ""
    cut = [f"{name} {layout.size(name)}" for name in REPLICA if layout.size(name) > 1]
    experts = f", experts over {layout.expert} of the data-parallel ranks" if layout.expert > 1 else ""
    yield f"grid of {_count(layout.world, 'rank')}: {' x '.join(cut) or 'nothing is cut'}{experts}"
    for name in REPLICA + (EXPERTS if layout.expert > 1 else ()):
        if layout.size(name) > 1:
            groups = [_short([str(rank) for rank in ranks], " ") for ranks in layout.groups(name)]
            yield f"  {name:<12} {_short(groups, ' | ')}"


def _pipeline(work: Workload) -> Iterator[str]:
    layout, ranks, micro_batches = work.layout, work.layout.pipeline, work.accumulation
    if ranks == 1:
        return
    yield ""
    yield "stages, cut by estimated work (the head weighs its matrix, an expert what it is chosen):"
    for stage in work.stages:
        layers = [*_span_of("encoder layer", stage.encoder), *_span_of("layer", stage.layers)]
        parts = ["embedding"] * stage.first + layers + ["head"] * stage.last
        what, place = ", ".join(parts), layout.holder(stage.number)
        yield f"  {stage_name(layout, stage.number):<14} {what:<34} {stage.share:6.1%} of the work, pipeline {place}"
    every = map(layout.stages_of, range(ranks))
    shares = {held: sum(work.stages[number].share for number in held) for held in every}
    slowest = max(shares, key=lambda held: shares[held])
    formula = "(S-1)/(m+S-1)" if layout.pipeline_schedule == "1f1b" else "(5S-6)/(6m+5S-6)"
    yield (
        f"a rank waits {formula} = {bubble(ranks, micro_batches, layout.pipeline_schedule):.1%} of a step of "
        f"m={micro_batches} micro-batches on S={ranks} ranks ({layout.pipeline_schedule}), and all for the one with "
        f"{stage_name(layout, *slowest)}, which has {shares[slowest] * ranks:.2f} times the mean work"
    )


def _span_of(noun: str, numbers: range) -> list[str]:
    if len(numbers) < 2:
        return [f"{noun} {number}" for number in numbers]
    return [f"{noun}s {numbers[0]} to {numbers[-1]}"]


def _vision(work: Workload) -> Iterator[str]:
    vision = work.args.vision
    if vision is None:
        return
    rows = [row for row in work.table.values() if row.unit == VISION]
    trained = sum(row.numel for row in rows if row.trainable)
    share = tile_flops(work.args) * usual_tiles(vision) / token_flops(work.args, work.seq_len)
    yield ""
    yield f"vision tower and projection: {sum(row.numel for row in rows):,} parameters, of which {trained:,} train"
    yield (
        f"  a tile of {vision.image_size} x {vision.image_size} pixels is {_count(vision.tokens_per_tile, 'token')} "
        f"and {tile_flops(work.args) / 1e9:,.3g} GFLOP, forward and backward"
    )
    yield (
        f"  counted as if a quarter of all tokens stood for images: {work.tiles_of_micro_batch:,.1f} tiles a "
        f"micro-batch, {float(share):.1%} of the model's arithmetic"
    )


def _memory(work: Workload, asynchronous: bool) -> Iterator[str]:
    kinds = [rank for rank, _ in memory.predict(work)]
    yield ""
    yield f"parameters: {work.n_parameters:,}; of these on a rank, before ZeRO cuts them, {_span(work.held)}"
    trained = sum(row.numel for row in work.table.values() if row.trainable)
    if trained < work.n_parameters:
        left_out = "train.freeze leaves out" if work.args.lora is None else "beside adapters stand"
        yield f"  {trained:,} of them train; {left_out} {work.n_parameters - trained:,}"
    yield "bytes kept on a rank, without activations and buffers"
    for part in fields(memory.Memory):
        values = [getattr(rank, part.name) for rank in kinds]
        if any(values):
            yield _row(part.name, values)
    yield _row("all", [rank.total for rank in kinds])
    if work.offload_optimizer:
        yield _row("in host memory", [memory.in_host_memory(work, rank) for rank in kinds])
    yield from _activations(work)
    if asynchronous:
        copies = [(rank.masters or rank.parameters) + rank.optimizer + rank.ema for rank in kinds]
        yield f"and in host memory {_units(max(copies))} at most, for checkpoint.asynchronous, from the first save on"
    if kinds[0].gradients is None:
        yield "  gradients are not counted where the optimizer is offloaded"


def _activations(work: Workload) -> Iterator[str]:
    """What the forward keeps for the backward, where that is predicted."""
    kept = activations.predict(work)
    if kept is None:
        return
    inputs = work.recompute == "full"
    yield f"and about {_units(kept.layers)} of activations, {'the inputs of' if inputs else 'all of'} its layers"
    if inputs and kept.one is not None:
        yield f"  and {_units(kept.one)} of the one layer that is computed again at a time"


def _attention_dropout(work: Workload) -> Iterator[str]:
    """What its explicit path costs."""
    args, rate = work.args, work.args.attn_dropout
    if not rate or not attention_specs(args.layer_specs()):
        return
    heads = args.n_heads // work.layout.tensor
    queries = min(weights_at_once(work.micro_batch_size, heads, work.seq_len), work.seq_len)
    bytes_ = BYTES_A_WEIGHT * work.micro_batch_size * heads * queries * work.seq_len
    yield (
        f"model.attn_dropout={rate} takes another path than fused attention: two to four times the time of attention, "
        f"and {_units(bytes_)} for a while, for the weights of {queries} tokens of each row at a time"
    )


def _disk(config: RunConfig, one: int, run_dir: Path | None) -> Iterator[str]:
    most = checkpoints_at_once(config)
    needed = f"; {most} of them, the most that are there at a time, {_units(most * one)}" if most > 1 else ""
    yield f"a checkpoint takes {_units(one)} of disk space{needed}"
    space = None if run_dir is None else room(run_dir)
    if space is None:
        return
    free, there = space
    if free + there < most * one:
        beside = f" beside the {_units(there)} of checkpoints that are there" if there else ""
        yield (
            f"warning: the file system of {run_dir} has {_units(free)} free{beside}; use another --run_dir, or lower "
            f"checkpoint.keep={config.checkpoint.keep}"
        )


def _traffic(work: Workload) -> Iterator[str]:
    sent = traffic.predict(work)
    yield ""
    if not sent:
        yield "bytes sent in a step: none"
        return
    micro_batches = _count(work.accumulation, "micro-batch", "es")
    yield f"bytes sent in a step of {micro_batches}, by all ranks together, as rings do:"
    yield "over n ranks 2 (n-1) times the buffer of an all-reduce, (n-1) times the whole buffer of an all-gather or"
    yield "reduce-scatter, (n-1)/n of all ranks' buffers of an all-to-all"
    if traffic.estimated(work):
        yield "weights are estimated: parameters are frozen, and gathered again for activation checkpointing"
    if traffic.upper_bound(work):
        yield "tokens are those of full experts (model.moe.capacity): fewer are sent where fewer choose one"
    for along, purposes in sent.items():
        yield _sent(along, sum(purposes.values()), work.layout.world)
        if len(purposes) > 1:
            yield from (f"    {purpose:<12} {bytes_:>22,}" for purpose, bytes_ in purposes.items())
    if len(sent) > 1:
        yield _sent("all", sum(sum(purposes.values()) for purposes in sent.values()), work.layout.world)


def _row(name: str, values: Sequence[int]) -> str:
    return f"  {name:<14} {_span(values):>22}  {_units(max(values))}"


def _sent(name: str, bytes_: int, ranks: int) -> str:
    return f"  {name:<14} {bytes_:>22,}  {_units(bytes_)}, {_units(bytes_ / ranks)} a rank in the mean"


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _units(bytes_: float) -> str:
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if bytes_ >= size:
            return f"{bytes_ / size:.2f} {unit}"
    return f"{bytes_:.0f} B"


def _short(items: list[str], between: str) -> str:
    if len(items) > SHOWN:
        items = [*items[: SHOWN - 1], "...", items[-1]]
    return between.join(items)
