"""Bytes that the ranks of a run will send each other in a step, predicted from its numbers alone.

The unit is defined in llm/parallel/traffic_counter.py, whose instrument counts the same bytes in a running job.
Predicted is a step in the middle of a run: without validation, sample or checkpoint, and not dropped. Compiled blocks
choose for themselves what they recompute: for those the numbers hold without activation checkpointing. With activation
checkpointing and frozen parameters those of tensor parallelism and experts are an upper bound, as a repetition ends
with the last thing that the backward needs; ZeRO-3's weights are then only estimated: see `estimated`. Of norms over
all heads, chunks of strided attention are counted as those of one document a row, and the tokens that attend in routed
layers are left out.

Letters: t tensor-parallel, n data-parallel, e expert-parallel ranks.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import chain, pairwise
from typing import NamedTuple

from llm.args.layers import cross_attention
from llm.args.lora import TOWER, adapter
from llm.datatypes import ROUTE_NUMBERS
from llm.parallel.tensor import is_partial
from llm.parallel.traffic_counter import Along, dimension_names
from llm.plan.gradient_flow import (
    CROSS,
    HEAD,
    MEMORY,
    PROJECTION,
    SOURCE_VECTORS,
    VECTORS,
    heads_module,
    ssm_module,
)
from llm.plan.workload import BYTES, OptimizerGroup, RankKind, Workload
from llm.plan.zero3_gathers import auxiliary_losses, gathers, norms_around

FLOAT32, FLOAT64, INT64 = 4, 8, 8
QK_NORMS = ("q_norm", "k_norm")


class Sent(NamedTuple):
    """Bytes of one purpose, of all ranks together, in one step."""

    along: Along
    purpose: str
    bytes: int


def predict(work: Workload) -> dict[Along, dict[str, int]]:
    """Bytes of a step by dimension and purpose, all ranks together; dimensions with the same groups of ranks are one,
    as in TrafficCounter.
    """
    names = dimension_names(work.layout)
    table: dict[Along, Counter[str]] = {}
    parts = (_tensor, _pipeline, _experts, _sums, _zero, _muon)
    for sent in chain.from_iterable(part(work) for part in parts):
        if sent.bytes:
            along = sent.along if sent.purpose == "tokens" else names[sent.along]
            table.setdefault(along, Counter())[sent.purpose] += sent.bytes
    return {along: dict(purposes) for along, purposes in table.items()}


def estimated(work: Workload) -> bool:
    """Whether the bytes of weights are an estimate: DeepSpeed keeps weights that do not train, and are gathered for a
    repeated forward, as long as the module whose backward it is for, by rules that are not replayed here. (Off by up to
    13% in tiny models of 12 settings, either way.)
    """
    return work.stage == 3 and work.recompute != "none" and not all(row.trainable for row in work.table.values())


def upper_bound(work: Workload) -> bool:
    """Whether tokens may send less to experts than is predicted: as many as fit are, and fewer may choose an expert."""
    return work.layout.expert > 1 and work.args.moe is not None and work.args.moe.capacity is not None


def _tensor(work: Workload) -> Iterator[Sent]:
    """Edges of regions: an edge gathers, or sums and cuts, all tokens' vectors; an all-reduce is two edges."""
    layout, args = work.layout, work.args
    t = layout.tensor
    if t == 1:
        return
    times = work.accumulation * layout.world // (t * layout.pipeline)  # each stage has its layers alone
    crossings = mean_squares = 0  # of tokens
    flow, cut = work.flow, layout.sequence_parallel
    for spec in args.all_specs():
        block, tokens = spec.unit, work.tokens_of(spec)
        mixer = ["attention.ssm", "attention.attn"] if spec.mixer.name == "routed" else ["attention"] * spec.mixes
        regions = mixer + [CROSS] * spec.cross + ["feed_forward"] * (spec.ffn != "none")
        repeated = work.recompute != "none" and flow[block].after
        for region in regions:
            enter, leave = flow[f"{block}.{region}"]
            crossings += tokens * (2 + (enter + leave if cut else 2 * enter))
        if spec.cross:  # the encoder's stream enters, too
            memory = flow[f"{block}.{CROSS}.{MEMORY}"].before
            crossings += work.source_tokens * (1 + memory + repeated if cut else 2 * memory)
        attends, said = heads_module(spec), ssm_module(spec)
        if spec.heads is not None and spec.heads.qk_norm == "full" and spec.mixer.name != "routed":
            for norm, of in zip(QK_NORMS, (tokens, tokens // spec.stride), strict=True):
                mean_squares += of * _means(work, f"{block}.{attends}.{norm}", repeated)
        if said is not None and args.ssm is not None and args.ssm.groups == 1 and args.ssm.norm != "none":
            mean_squares += tokens * _means(work, f"{block}.{said}.norm", repeated)
        if spec.cross and cross_attention(args).qk_norm == "full":
            for norm, of in zip(QK_NORMS, (tokens, work.source_tokens), strict=True):
                mean_squares += of * _means(work, f"{block}.{CROSS}.{norm}", repeated)
        if repeated:
            last = not norms_around(args)[1]  # then the last leave makes nothing that the backward needs
            enters, leaves = (len(regions), len(regions) - last) if cut else (0, 2 * (len(regions) - last))
            crossings += tokens * (enters + leaves)
    # out of the embedding, unless it is the linear map of values, which every rank has whole; and into the head
    if args.input_dim is None:
        crossings += work.tokens * (1 + flow[VECTORS].after if cut else 2)
    crossings += work.tokens * (1 + flow[HEAD].before if cut else 2 * flow[HEAD].before)
    if args.encoder_layers and args.input_dim is None:
        crossings += work.source_tokens * (1 + flow[SOURCE_VECTORS].after if cut else 2)
    yield Sent("tensor", "activations", times * (t - 1) * crossings * args.dim * BYTES[work.precision])
    yield Sent("tensor", "activations", round(times * (t - 1) * BYTES[work.precision] * _tower_numbers(work)))
    yield Sent("tensor", "activations", times * mean_squares * 2 * (t - 1) * FLOAT32)
    calls = work.head_calls if args.output_dim is None else 0  # values are predicted by all ranks alike
    yield Sent("tensor", "loss", times * calls * (t - 1) * t * 2 * work.tokens * FLOAT32)
    sizes = {name: numel for kind in work.kinds for name, numel in kind.sizes.items()}
    summed = (name for name, row in work.table.items() if row.trainable and is_partial(row, layout))
    partial = sum(sizes[name] for name in summed)
    sums = times if work.stage >= 2 else times // work.accumulation
    yield Sent("tensor", "gradients", sums * 2 * (t - 1) * FLOAT32 * partial)


def _means(work: Workload, norm: str, repeated: bool) -> int:
    """How often the ranks add up what a norm over all heads, or all channels of a state-space layer, divides by."""
    return 1 + work.flow[norm].before + repeated


def _tower_numbers(work: Workload) -> float:
    """Numbers that pass the edges of the vision tower's regions in a micro-batch, whose tokens no rank has alone: as
    they leave, and the gradients of what enters.
    """
    vision, flow = work.args.vision, work.flow
    if vision is None:
        return 0
    edges = 0
    for layer in range(vision.n_layers):
        block = f"{TOWER}.layers.{layer}"
        edges += sum(2 + 2 * flow[f"{block}.{region}"].before for region in ("attention", "feed_forward"))
        edges += 2 * (work.recompute != "none" and flow[block].after)  # the last leave makes nothing that is needed
    patches, slots = vision.grid**2, vision.tokens_per_tile
    adapter = 2 * flow[f"{TOWER}.adapter"].before * patches * vision.dim + 2 * slots * vision.output_dim
    projection = 2 * flow[PROJECTION].before * slots * vision.output_dim
    return work.tiles_of_micro_batch * (edges * vision.places * vision.dim + adapter + projection)


def _pipeline(work: Workload) -> Iterator[Sent]:
    """Vectors go to the next stage, those of both sides where there is an encoder, and their gradients come back; the
    last stage's copy of a tied table sends its gradient and gets new weights; DeepSpeed sends all stages the loss.
    """
    layout = work.layout
    ranks, pipelines = layout.pipeline, layout.world // layout.pipeline
    if ranks == 1:
        return
    between = [layout.holder(stage) for stage in range(layout.stages)]
    hops = sum(here != there for here, there in pairwise(between))
    cut = layout.tensor if layout.sequence_parallel else 1
    vectors = (work.tokens + work.source_tokens) * work.args.dim * BYTES[work.precision] // cut
    yield Sent("pipeline", "activations", pipelines * work.accumulation * hops * 2 * vectors)
    copied = layout.data * sum(kind.ranks * kind.copied_gradients for kind in work.kinds)
    yield Sent("pipeline", "tied table", copied * (FLOAT32 + BYTES[work.precision]))
    yield Sent("pipeline", "loss", pipelines * (ranks - 1) * 2 * FLOAT32)
    yield Sent("data", "loss", layout.tensor * 2 * (layout.data - 1) * FLOAT32)


def _experts(work: Workload) -> Iterator[Sent]:
    """Rows go to their experts and come back, in the forward and in the backward. With a capacity it is the most that
    can be: what finds its expert full is not sent."""
    moe, e = work.args.moe, work.layout.expert
    if moe is None or e == 1:
        return
    # what comes back is needed again only where something after it keeps what it was made of
    again = 2 if moe.shared or moe.overflow or moe.apply == "output" or auxiliary_losses(work.args) else 1
    lora = adapter(work.args.lora, "experts")
    dropped = work.args.ffn_dropout or (lora is not None and lora.dropout)
    bytes_ = 0
    for spec in work.args.all_specs():
        if spec.ffn == "moe":
            repeated = work.recompute != "none" and work.flow[spec.unit].after
            rows = work.tokens_of(spec) * moe.top_k
            if moe.capacity is not None:  # what finds its expert full is not sent
                rows = min(rows, work.micro_batch_size * moe.n_experts * moe.capacity)
            keys = rows * INT64 if dropped else 0  # of the rows, to the experts
            swaps = 2 + sum(work.flow[f"{spec.unit}.feed_forward.experts"]) + repeated * again
            bytes_ += (1 + repeated) * (moe.n_experts * INT64 + keys)
            bytes_ += swaps * rows * work.args.dim * BYTES[work.precision]
    groups_of_a_layer = work.layout.world // (e * work.layout.pipeline)
    yield Sent("expert", "tokens", work.accumulation * groups_of_a_layer * (e - 1) * bytes_)


def _sums(work: Workload) -> Iterator[Sent]:
    """The engine's one sum of losses, expert counts, and what routed layers report of their scores."""
    moe, world = work.args.moe, work.layout.world
    numbers = work.losses
    if moe is not None:
        numbers += work.moe_layers * moe.n_experts + (moe.capacity is not None)
    numbers += ROUTE_NUMBERS * sum(spec.mixer.name == "routed" for spec in work.args.layer_specs())
    yield Sent("world", "loss", 2 * (world - 1) * FLOAT64 * numbers)


def _zero(work: Workload) -> Iterator[Sent]:
    """What DeepSpeed sends: gradients, new weights, norms and flags."""
    for kind in work.kinds:
        if work.stage == 3:
            yield from _zero3(work, kind)
            continue
        for group in work.groups:
            n, times = work.cut_over(group), _groups(work, group, kind)
            along: Along = "expert_data" if group.on_expert_ranks else "data"
            # ZeRO 2 reduces after each micro-batch, and then only what has a gradient
            sent = [name for name in group.names if work.stage != 2 or work.has_gradient(name)]
            exact = sum(kind.sizes.get(name, 0) for name in sent)
            flat = work.flat_numel(group, kind)
            reduced = (flat if work.keeps_float32_gradients else exact) * (work.accumulation if work.stage == 2 else 1)
            yield Sent(along, "gradients", times * 2 * (n - 1) * FLOAT32 * reduced)
            if work.stage:
                yield Sent(along, "weights", times * (n - 1) * BYTES[work.precision] * flat)
    yield from _norms(work)


def _groups(work: Workload, group: OptimizerGroup, kind: RankKind) -> int:
    """Over how many groups of ranks of this kind the optimizer's group is cut, each by itself."""
    return kind.ranks * (work.layout.expert if group.on_expert_ranks else 1)


def _zero3(work: Workload, kind: RankKind) -> Iterator[Sent]:
    n, width = work.layout.data, BYTES[work.precision]
    padded = {name: n * work.share_numel(numel) for name, numel in kind.sizes.items()}
    reduced = work.accumulation * sum(numel for name, numel in padded.items() if work.has_gradient(name))
    yield Sent("data", "gradients", kind.ranks * (n - 1) * FLOAT32 * reduced)
    often = gathers(work, kind.sizes)
    gathered = sum(
        numel if work.stays_gathered(kind.sizes[name]) else work.accumulation * often[name] * numel
        for name, numel in padded.items()
    )
    yield Sent("data", "weights", kind.ranks * (n - 1) * width * gathered)


def _norms(work: Workload) -> Iterator[Sent]:
    """Sums of squares, a number for each tensor that the optimizer steps on, and whether any gradient overflowed."""
    groups = work.groups
    if work.stage == 0:
        return
    if work.keeps_float32_gradients:
        experts = any(group.on_expert_ranks for group in groups)
        yield _numbers(work, "replica", FLOAT32 * (1 + experts))
        yield _numbers(work, "expert", FLOAT32 * experts)
        return
    flags = int(work.precision == "fp16" or (work.precision == "bf16" and work.stage < 3))
    if work.stage == 3:
        steps = len([size for group in groups for size in work.sub_groups(group, work.kinds[0])])
        squares = steps * (FLOAT32 if work.offload_optimizer else FLOAT64)
    else:
        squares = len(groups) * FLOAT32
        yield _numbers(work, "expert_data", FLOAT32 * sum(group.on_expert_ranks for group in groups))
    for along in ("data", "replica"):
        yield _numbers(work, along, squares + flags)


def _numbers(work: Workload, along: Along, bytes_: int) -> Sent:
    """So many bytes all-reduced once in every group along a dimension."""
    size = work.layout.size(along) if along != "world" else work.layout.world
    return Sent(along, "norms", work.layout.world // size * 2 * (size - 1) * bytes_)


def _muon(work: Workload) -> Iterator[Sent]:
    """Momenta are put together, and the updates spread, in float32 (llm/parallel/muon.py)."""
    t = work.layout.tensor
    for group in work.groups:
        if group.algorithm != "muon" or work.stage == 0:
            continue
        n = work.cut_over(group)
        along: Along = "expert_data" if group.on_expert_ranks else "data"
        for kind in work.kinds:
            numel = sum(kind.sizes.get(name, 0) for name in group.names)
            yield Sent(along, "Muon", _groups(work, group, kind) * 4 * (n - 1) * FLOAT32 * numel)
            # kinds of a stage differ in the vocabulary only, which is not Muon's: of a tensor group all have as much
            yield Sent("tensor", "Muon", kind.ranks * work.layout.data * 2 * (t - 1) * FLOAT32 * numel)
