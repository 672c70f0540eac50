"""Which layouts a run can have, and the nearest that works in place of one that it cannot have.

Arithmetic on the numbers of a config: no process group, no torch. Of a layout that does not work the first problem is
named, with the layout of the same number of ranks that changes the fewest numbers.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, product
from typing import NamedTuple

from llm.args import ModelArgs
from llm.errors import UserError
from llm.parallel.layout import Dimension, Layout, PipelineSchedule

WHOLE_PARAMETERS_ONLY = ("log.trace_steps",)
"""Config keys whose feature, once asked for, does not know of cut parameters and activations."""

RANKS_OF_A_REPLICA: tuple[Dimension, ...] = ("tensor", "pipeline", "context")
CUTS_PARAMETERS: tuple[Dimension, ...] = ("tensor", "pipeline", "expert")
LAYOUT_NUMBERS = ("parallel.tensor", "parallel.pipeline", "parallel.expert", "parallel.zero_stage")


@dataclass(frozen=True)
class Needs:
    """What a run asks of any layout."""

    args: ModelArgs
    precision: str
    offload_optimizer: bool
    seq_len: int
    batches: tuple[tuple[str, int], ...]
    """(key, sequences) of every global batch that the run will have."""
    asked_for: tuple[str, ...] = ()
    """`key=value` of those of WHOLE_PARAMETERS_ONLY that the run asks for."""
    source_len: int | None = None
    """Source tokens of a row, of a model with an encoder; None = as many as seq_len."""

    @cached_property
    def widths(self) -> tuple[tuple[str, int], ...]:
        """(key, size) of what tensor parallelism cuts evenly: hidden widths of the kinds of feed-forward that the model
        has, heads of state-space layers, and of a vision tower its heads too."""
        kinds = {spec.ffn for spec in self.args.all_specs()}
        dense = (("model.ffn_hidden", self.args.ffn_width()),) if "dense" in kinds else ()
        widths = dense + ((("model.moe.hidden", self.args.moe_width()),) if "moe" in kinds else ())
        if self.args.ssm is not None:
            widths = (*widths, ("heads of model.ssm", self.args.ssm.widths(self.args.dim)[1]))
        vision = self.args.vision
        if vision is None:
            return widths
        return (
            *widths,
            ("model.vision.n_heads", vision.n_heads),
            ("model.vision.dim * mlp_ratio", vision.ffn_width),
            ("model.vision.output_dim", vision.output_dim),
        )

    @cached_property
    def n_experts(self) -> int:
        """Experts of a mixture-of-experts layer; 0 without such layers."""
        has_moe = any(spec.ffn == "moe" for spec in self.args.all_specs())
        return self.args.moe.n_experts if self.args.moe is not None and has_moe else 0

    @cached_property
    def common_batch(self) -> int:
        """Largest number that divides every global batch."""
        return math.gcd(*(size for _, size in self.batches))


class Choice(NamedTuple):
    """What may be chosen freely: nothing here changes the mathematics of a run."""

    layout: Layout
    micro_batch_size: int

    def settings(self) -> dict[str, int | str]:
        """What is chosen, by config key."""
        layout = self.layout
        return {
            "parallel.tensor": layout.tensor,
            "parallel.pipeline": layout.pipeline,
            "parallel.expert": layout.expert,
            "parallel.zero_stage": layout.zero_stage,
            "train.micro_batch_size": self.micro_batch_size,
            "parallel.sequence_parallel": layout.sequence_parallel,
            "parallel.pipeline_schedule": layout.pipeline_schedule,
        }


Rule = Callable[[Needs, Choice], Iterator[str]]


def _ranks(needs: Needs, choice: Choice) -> Iterator[str]:
    layout = choice.layout
    sizes = {name: layout.size(name) for name in RANKS_OF_A_REPLICA}
    if layout.world % math.prod(sizes.values()):
        keys = [f"parallel.{name}={size}" for name, size in sizes.items() if size > 1]
        does = "does" if len(keys) == 1 else "do"
        yield f"{' x '.join(keys)} {does} not divide the number of ranks, {layout.world}"


def _tensor(needs: Needs, choice: Choice) -> Iterator[str]:
    ranks, args = choice.layout.tensor, needs.args
    if args.n_heads % ranks:
        yield f"parallel.tensor={ranks} does not divide model.n_heads={args.n_heads}"
    if 0 < args.vocab_size < ranks:
        yield f"parallel.tensor={ranks} is above model.vocab_size={args.vocab_size}"
    # with fewer key and value heads than ranks, every rank holds all of them
    if args.kv_heads % ranks and ranks % args.kv_heads:
        yield f"parallel.tensor={ranks} is neither a divisor nor a multiple of model.n_kv_heads={args.kv_heads}"
    for key, width in needs.widths:
        if width % ranks:
            yield f"parallel.tensor={ranks} does not divide {key}={width}"
    if args.ssm is not None and args.ssm.groups > 1 and args.ssm.groups % ranks:
        yield f"parallel.tensor={ranks} does not divide model.ssm.groups={args.ssm.groups}, which is more than one"


def _pipeline(needs: Needs, choice: Choice) -> Iterator[str]:
    layout, args = choice.layout, needs.args
    layers, said = len(args.all_specs()), f"model.n_layers={args.n_layers}"
    if args.encoder_layers:
        said = f"model.encoder_layers={args.encoder_layers} and {said} together"
    if layout.pipeline_schedule == "dualpipev" and layout.pipeline == 1:
        yield "parallel.pipeline_schedule=dualpipev needs parallel.pipeline=2 or more, not 1"
    elif layout.stages > layout.pipeline and layout.stages > layers:
        yield (
            f"parallel.pipeline_schedule=dualpipev cuts the layers in twice parallel.pipeline={layout.pipeline}, which "
            f"is above {said}"
        )
    elif layout.stages > layers:
        yield f"parallel.pipeline={layout.pipeline} is above {said}"


def _expert(needs: Needs, choice: Choice) -> Iterator[str]:
    ranks, data = choice.layout.expert, choice.layout.data
    if ranks == 1:
        return
    if not needs.n_experts:
        yield f"parallel.expert={ranks} needs mixture-of-experts layers, and the model has none"
    if needs.n_experts % ranks:
        yield f"parallel.expert={ranks} does not divide model.moe.n_experts={needs.n_experts}"
    if data % ranks:
        yield f"parallel.expert={ranks} does not divide the number of data-parallel ranks, {data}"


def _zero_stage(needs: Needs, choice: Choice) -> Iterator[str]:
    layout = choice.layout
    if layout.zero_stage == 3 and layout.expert > 1:
        yield f"parallel.zero_stage=3 needs parallel.expert=1, not {layout.expert}"
    if layout.zero_stage > 1 and layout.pipeline > 1:
        yield f"parallel.zero_stage={layout.zero_stage} needs parallel.pipeline=1, not {layout.pipeline}"
    if layout.zero_stage == 0:
        if needs.precision != "fp32":
            yield f"parallel.zero_stage=0 needs train.precision=fp32, not {needs.precision}"
        for name in (*RANKS_OF_A_REPLICA, "expert"):
            if layout.size(name) != 1:
                yield f"parallel.zero_stage=0 needs parallel.{name}=1, not {layout.size(name)}"
        if needs.offload_optimizer:
            yield "parallel.offload_optimizer=true needs parallel.zero_stage=1, 2 or 3, not 0"


def _whole_parameters(needs: Needs, choice: Choice) -> Iterator[str]:
    for name in CUTS_PARAMETERS:
        ranks = choice.layout.size(name)
        if ranks > 1:
            yield from (f"{asked} is not available with parallel.{name}={ranks} yet" for asked in needs.asked_for)


def _batch(needs: Needs, choice: Choice) -> Iterator[str]:
    micro, data = choice.micro_batch_size, choice.layout.data
    for key, size in needs.batches:
        if size % data:
            yield f"{key}={size} is not divisible by {data} data-parallel ranks"
        if size % (micro * data):
            yield f"{key}={size} is not divisible by train.micro_batch_size={micro} x {data} data-parallel ranks"
        elif choice.layout.pipeline_schedule == "dualpipev" and size // (micro * data) < choice.layout.stages:
            yield (
                f"{key}={size} in micro-batches of {micro} on {data} data-parallel ranks makes "
                f"{size // (micro * data)} a step, and parallel.pipeline_schedule=dualpipev needs twice "
                f"parallel.pipeline={choice.layout.pipeline}"
            )


def _sequence(needs: Needs, choice: Choice) -> Iterator[str]:
    layout, micro = choice.layout, choice.micro_batch_size
    sides = [("train.seq_len", needs.seq_len)]
    if needs.args.encoder_layers and needs.source_len is not None:
        sides.append(("data.source_len", needs.source_len))
    for key, length in sides:
        if layout.sequence_parallel and micro * length % layout.tensor:
            yield (
                f"parallel.sequence_parallel=true needs train.micro_batch_size={micro} x {key}={length} "
                f"to be divisible by parallel.tensor={layout.tensor}"
            )


LAYOUT_RULES: tuple[Rule, ...] = (_ranks, _tensor, _pipeline, _expert, _zero_stage, _whole_parameters)
"""What the micro-batch and sequence parallelism have no part in. A rule may count on those before it."""
RULES: tuple[Rule, ...] = (*LAYOUT_RULES, _batch, _sequence)


def problem(needs: Needs, choice: Choice, rules: tuple[Rule, ...] = RULES) -> str | None:
    """The first thing that does not work, naming key and value; None when everything does."""
    return next(chain.from_iterable(rule(needs, choice) for rule in rules), None)


def check(needs: Needs, wanted: Choice) -> None:
    """Raise UserError with the first problem of `wanted`, if it has one, and the nearest choice that works."""
    wrong = problem(needs, wanted)
    if wrong is not None:
        raise UserError(f"{wrong}; {_advice(needs, wanted)}")


def nearest(needs: Needs, wanted: Choice, world: int) -> Choice | None:
    """The choice nearest to `wanted` that works on `world` ranks; None when nothing does.

    Near is: few changed numbers; among those few of LAYOUT_NUMBERS; then values that differ little.
    """
    return min(_working(needs, wanted, world), key=lambda choice: _distance(wanted, choice), default=None)


def changes(wanted: Choice, other: Choice) -> dict[str, int | str]:
    """The settings of `other`, by key, in which it differs from `wanted`."""
    before = wanted.settings()
    return {key: value for key, value in other.settings().items() if value != before[key]}


def _working(needs: Needs, wanted: Choice, world: int) -> Iterator[Choice]:
    for layout in _layouts(replace(wanted.layout, world=world)):
        if problem(needs, wanted._replace(layout=layout), LAYOUT_RULES) is not None or needs.common_batch % layout.data:
            continue
        for micro in divisors(needs.common_batch // layout.data):
            for sequence_parallel in {wanted.layout.sequence_parallel, False}:
                choice = Choice(replace(layout, sequence_parallel=sequence_parallel), micro)
                if problem(needs, choice, (_batch, _sequence)) is None:
                    yield choice


def _layouts(like: Layout) -> Iterator[Layout]:
    for tensor in divisors(like.world):
        # who wants no pipeline is not given one
        for pipeline in divisors(like.world // tensor) if like.pipeline > 1 else (1,):
            cut = replace(like, tensor=tensor, pipeline=pipeline)
            for expert in divisors(cut.data) if cut.data else ():
                schedules: tuple[PipelineSchedule, ...] = ("1f1b", "dualpipev")
                for zero_stage, schedule in product(range(4), schedules):
                    if schedule in ("1f1b", like.pipeline_schedule):
                        yield replace(cut, expert=expert, zero_stage=zero_stage, pipeline_schedule=schedule)


def _distance(wanted: Choice, other: Choice) -> tuple[int, ...]:
    """Order of nearness; no two choices are equally near."""
    before, changed = wanted.settings(), changes(wanted, other)
    in_layout = {key: abs(int(changed[key]) - int(before[key])) for key in LAYOUT_NUMBERS if key in changed}
    return (
        len(changed),
        len(in_layout),
        other.micro_batch_size > wanted.micro_batch_size,  # it may not fit
        "parallel.sequence_parallel" in changed,
        "parallel.pipeline_schedule" in changed,
        sum(in_layout.values()),
        abs(other.micro_batch_size - wanted.micro_batch_size),
        # another ZeRO stage before another expert, that before another tensor, and that before another pipeline; of two
        # values what takes less memory
        "parallel.pipeline" in changed,
        "parallel.tensor" in changed,
        "parallel.expert" in changed,
        -other.layout.pipeline,
        -other.layout.tensor,
        -other.layout.expert,
        -other.layout.zero_stage,
    )


def _advice(needs: Needs, wanted: Choice) -> str:
    world = wanted.layout.world
    near = nearest(needs, wanted, world)
    if near is not None:
        changed = changes(wanted, near)
        outside = changed.keys().isdisjoint(LAYOUT_NUMBERS)
        return f"{'use' if outside else f'nearest that works on {_count(world)}:'} {_described(changed)}"
    options = []
    for sizes in (range(world - 1, 0, -1), range(world + 1, 2 * world + 1)):
        size = next((size for size in sizes if _can_work(needs, wanted, size)), None)
        near = None if size is None else nearest(needs, wanted, size)
        if size is not None and near is not None:
            changed = changes(wanted, near)
            options.append(_count(size) + (f" ({_described(changed)})" if changed else ""))
    return f"no layout of {_count(world)} works" + (f": use {' or '.join(options)}" if options else "")


def _can_work(needs: Needs, wanted: Choice, world: int) -> bool:
    """Whether anything works on `world` ranks: if so, it does with everything but `tensor` at what asks for least."""
    whole = {"pipeline": 1, "expert": 1, "zero_stage": 1}
    least = replace(wanted.layout, world=world, sequence_parallel=False, pipeline_schedule="1f1b", **whole)
    return any(problem(needs, Choice(replace(least, tensor=t), 1)) is None for t in divisors(world))


def _count(ranks: int) -> str:
    return f"{ranks} rank{'' if ranks == 1 else 's'}"


def _described(numbers: dict[str, int | str]) -> str:
    return ", ".join(f"{key}={str(value).lower()}" for key, value in numbers.items())


def divisors(number: int) -> list[int]:
    """The divisors of a positive number, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]
