"""What a run asks of its ranks, as plain numbers: how much of each parameter a rank holds, and how ZeRO flattens it.

Predictions of bytes and memory (llm/plan/traffic.py, memory.py) read this. No process group, no weights: a
model of any size on any number of ranks takes a moment.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from llm.adapters.int8 import SUMMED
from llm.args import LayerSpec, ModelArgs
from llm.boxes import box_shape
from llm.flops import usual_tiles
from llm.parallel.engine.options import ZERO3_SUB_GROUP
from llm.parallel.layout import Layout
from llm.parallel.stages import Stage, split
from llm.parameters import ParameterTable
from llm.plan.gradient_flow import Flow, gradient_flow
from llm.recompute import Recompute

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FILLER = 1
"""Elements of the parameter that stands in an optimizer group of which a stage has none (llm/train/optimizer.py)."""
ALIGNMENT = 2
"""DeepSpeed pads a flat group to this many elements a rank."""

# DeepSpeed's own defaults, which matter to who gathers what and when under ZeRO-3
ZERO3_DEFAULTS = {
    "stage3_param_persistence_threshold": 10**5,
    "stage3_prefetch_bucket_size": 5 * 10**7,
    "stage3_max_live_parameters": 10**9,
    "stage3_max_reuse_distance": 10**9,
    "sub_group_size": ZERO3_SUB_GROUP,
}


class OptimizerGroup(NamedTuple):
    """Parameters that the optimizer treats alike, in the order in which ZeRO flattens them."""

    names: tuple[str, ...]
    algorithm: str
    """adamw, sgd or muon."""
    on_expert_ranks: bool
    """Whether they are experts that lie on several ranks."""


class RankKind(NamedTuple):
    """Tensor-parallel ranks of a place of the pipeline that hold parts of the same sizes; others differ where a
    vocabulary is cut unevenly.
    """

    sizes: Mapping[str, int]
    """Elements of each parameter that such a rank owns, before ZeRO cuts them."""
    ranks: int
    """How many there are in a tensor-parallel group."""
    copied: int = 0
    """Elements of a tied token table, and of its adapter, of which it has a copy."""
    copied_gradients: int = 0
    """Of these, elements that train: their gradient is sent, which is 0 where no task reads the copy."""
    int8: tuple[int, ...] = ()
    """Elements of each weight that is kept in int8, which is no parameter."""
    int8_scales: int = 0
    """Numbers by which those are multiplied."""


@dataclass(frozen=True)
class Workload:
    """A run: model, layout, and what of its settings decides bytes and memory."""

    args: ModelArgs
    table: ParameterTable
    layout: Layout
    precision: str
    groups: tuple[OptimizerGroup, ...]
    micro_batch_size: int
    seq_len: int
    accumulation: int
    """Micro-batches of a step."""
    source_len: int | None = None
    """Source tokens of a row, where there is an encoder; None = as many as target tokens."""
    losses: int = 3
    """Sums of a step: of its objectives, and where there are several sources, of each."""
    head_calls: int = 1
    """How often a micro-batch passes the output matrix: see llm.objectives.Objective; of several tasks together."""
    head_gradients: int = 1
    """How often of these with a gradient: once for each task that does."""
    predicts: bool = False
    """Whether it passes the prediction head."""
    offload_optimizer: bool = False
    recompute: Recompute = "none"
    ema: bool = False
    tiles: float | None = None
    """Tiles of images on which a micro-batch's vision tower works, in the mean; None = as many as a quarter of its
    tokens stand for, as llm/flops.py assumes."""
    zero: Mapping[str, Any] = field(default_factory=dict)
    """Options passed through to DeepSpeed's `zero_optimization`."""

    @property
    def stage(self) -> int:
        """The ZeRO stage that the engine really runs."""
        alone = self.layout.world == 1 and self.precision == "fp32" and not self.offload_optimizer
        return 0 if alone and self.layout.zero_stage == 1 else self.layout.zero_stage

    @property
    def keeps_float32_gradients(self) -> bool:
        """Whether DeepSpeed takes its class BF16_Optimizer, which adds gradients up in whole float32 buffers."""
        return self.stage == 1 and self.precision == "bf16" and not self.offload_optimizer

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch; with an encoder, of its target."""
        return self.micro_batch_size * self.seq_len

    @property
    def source_tokens(self) -> int:
        """Source tokens of a micro-batch; 0 without an encoder."""
        length = self.seq_len if self.source_len is None else self.source_len
        return self.micro_batch_size * length if self.args.encoder_layers else 0

    def tokens_of(self, spec: LayerSpec) -> int:
        """Tokens of a micro-batch that pass a layer."""
        return self.source_tokens if spec.encoder else self.tokens

    @property
    def tiles_of_micro_batch(self) -> float:
        """See `tiles`; 0 without a tower, and never less than the one that is blank."""
        vision = self.args.vision
        if vision is None:
            return 0
        return max(1.0, float(self.tokens * usual_tiles(vision))) if self.tiles is None else self.tiles

    @property
    def n_parameters(self) -> int:
        """Elements of the whole model."""
        return sum(row.numel for row in self.table.values())

    @property
    def held(self) -> list[int]:
        """Elements on a rank of each kind, before ZeRO cuts them."""
        return [sum(kind.sizes.values()) + kind.copied + sum(kind.int8) for kind in self.kinds]

    @cached_property
    def flow(self) -> dict[str, Flow]:
        """Which modules have gradients in the backward."""
        specs = self.args.all_specs()
        starts = {specs[stage.blocks.start].unit for stage in self.stages[1:]}
        return gradient_flow(self.args, self.table, starts)

    def has_gradient(self, name: str) -> bool:
        """Whether a backward leaves a gradient of the parameter: an output matrix that no task reads has none."""
        return self.table[name].trainable and (name != "output.weight" or self.head_gradients > 0)

    def reached(self, kind: RankKind) -> int:
        """Elements on such a rank that have gradients, before ZeRO cuts them."""
        return sum(numel for name, numel in kind.sizes.items() if self.has_gradient(name))

    def frozen(self, kind: RankKind) -> dict[str, int]:
        """Elements on such a rank that do not."""
        return {name: numel for name, numel in kind.sizes.items() if not self.table[name].trainable}

    @property
    def moe_layers(self) -> int:
        return sum(spec.ffn == "moe" for spec in self.args.all_specs())

    @cached_property
    def stages(self) -> list[Stage]:
        """The stages of the pipeline; without one, a single stage."""
        return split(self.args, self.layout.stages, self.seq_len, self.head_calls > 0, self.source_len)

    @cached_property
    def kinds(self) -> tuple[RankKind, ...]:
        """The kinds of ranks of a replica: of each place of the pipeline one, or two where the vocabulary does not
        divide evenly.
        """
        return tuple(kind for place in range(self.layout.pipeline) for kind in self._kinds(place))

    def _kinds(self, place: int) -> Iterator[RankKind]:
        layout, args = self.layout, self.args
        stages = [self.stages[number] for number in layout.stages_of(place)]
        owned = {name: row for name, row in self.table.items() if any(stage.owns(row) for stage in stages)}
        names = [name for name, row in owned.items() if not row.int8]
        int8 = [row for row in owned.values() if row.int8]
        copies = args.tie_embeddings and stages[-1].last and not stages[0].first
        copy = [name for name in self.table if copies and name.startswith("tok_embeddings.")]
        trains = [self.table[name].trainable for name in copy]
        found: Counter[tuple[tuple[int, ...], ...]] = Counter()
        for rank in range(layout.tensor):
            place_in = (rank, layout.tensor), (0, layout.expert)
            rows = [[self.table[name] for name in names], [self.table[name] for name in copy], int8]
            shapes = [[box_shape(row.box(*place_in)) for row in part] for part in rows]
            scales = sum(numel // shape[SUMMED] for shape in shapes[-1] if (numel := math.prod(shape)))
            found[(*(tuple(map(math.prod, part)) for part in shapes), (scales,))] += 1
        for (sizes, copied, weights, (scales,)), ranks in found.items():
            gradients = sum(size for size, train in zip(copied, trains, strict=True) if train)
            yield RankKind(
                dict(zip(names, sizes, strict=True)), ranks, sum(copied), gradients, int8=weights, int8_scales=scales
            )

    def members(self, group: OptimizerGroup, kind: RankKind) -> list[int]:
        """Elements of each parameter of the group on such a rank; a group without any has a filler of one element."""
        return [kind.sizes[name] for name in group.names if name in kind.sizes] or [FILLER]

    def cut_over(self, group: OptimizerGroup) -> int:
        """Ranks over which ZeRO cuts the group, and over which its gradients are summed."""
        return self.layout.size("expert_data" if group.on_expert_ranks else "data")

    def flat_numel(self, group: OptimizerGroup, kind: RankKind) -> int:
        """Elements of the flat group of ZeRO 1 and 2, with padding."""
        return _padded(sum(self.members(group, kind)), ALIGNMENT * self.cut_over(group))

    def share_numel(self, numel: int) -> int:
        """Elements of a rank's share under ZeRO-3, with padding."""
        return -(-numel // self.layout.data)

    def sub_groups(self, group: OptimizerGroup, kind: RankKind) -> list[int]:
        """Elements of a rank's flat tensors under ZeRO-3, which steps some parameters at a time."""
        limit, shares = self.zero3("sub_group_size"), [self.share_numel(kind.sizes[name]) for name in group.names]
        if limit >= sum(shares):
            return [sum(shares)]
        sizes, filled = [], 0
        for i, share in enumerate(shares):
            filled += share
            if filled >= limit or i == len(shares) - 1:
                sizes.append(filled)
                filled = 0
        return sizes

    def zero3(self, option: str) -> int:
        """One of ZERO3_DEFAULTS, or what the run sets instead."""
        return int(self.zero.get(option, ZERO3_DEFAULTS[option]))

    def stays_gathered(self, numel: int) -> bool:
        """Whether a parameter of this size stays whole on every rank between steps of ZeRO-3."""
        return numel <= self.zero3("stage3_param_persistence_threshold")


def _padded(numel: int, multiple: int) -> int:
    return -(-numel // multiple) * multiple
