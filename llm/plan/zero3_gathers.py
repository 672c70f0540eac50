"""Which weights ZeRO-3 gathers in a micro-batch, and how often: its decisions, replayed without weights.

DeepSpeed's hooks fetch a module's weights before its forward and before its backward, and let go of them after it,
unless the recorded order of modules says that they are needed soon again; and it fetches ahead. The rules below are
those of DeepSpeed 0.19.8 (runtime/zero/partitioned_param_coordinator.py), once it has recorded the order.

It decides what to let go of once and for all, in the first micro-batch after the one that it records. Small weights,
which stay gathered from then on, are gathered in that one where no optimizer step came before it, and so change what is
fetched ahead: the decisions of a run depend on whether its first step has more than one micro-batch (measured). Those
of modules whose backward nothing ended in the recorded micro-batch are there in the next one already (measured).
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from llm.args import LayerSpec, ModelArgs
from llm.args.lora import TOWER
from llm.layers.encoder import ENCODER_NORM
from llm.layers.positions import POSITION_TABLE
from llm.layers.prediction import PREDICTION
from llm.plan.gradient_flow import (
    ADAPTER,
    CROSS,
    HEAD,
    MEMORY,
    PROJECTION,
    SOURCE_POSITIONS,
    Flow,
    attention_modules,
    cross_modules,
    feed_forward_modules,
)
from llm.plan.workload import Workload
from vision.encoder import layer_args

Decisions = dict[tuple[str, int], set[str]]
"""What is let go of when a module ends at a step."""


class Event(NamedTuple):
    """A module begins (its weights are fetched), or has ended (they may go)."""

    module: str
    what: Literal["fetch", "release"]


def gathers(work: Workload, sizes: Mapping[str, int]) -> Counter[str]:
    """How often each parameter is gathered over the data-parallel ranks in one micro-batch; `sizes` are the elements of
    each on this rank before ZeRO cuts them.
    """
    of_module: dict[str, list[str]] = defaultdict(list)
    for name in sizes:
        of_module[name.rpartition(".")[0]].append(name)
    stay = {name for name, numel in sizes.items() if work.stays_gathered(numel)}
    order, let_go = list(events(work)), Decisions()
    last = {event.module: event.what for event in order}
    unended = {name for module, what in last.items() if what == "fetch" for name in of_module[module]}
    _MicroBatch(work, sizes, of_module, order, stay, let_go).replay(stay & unended if work.accumulation > 1 else stay)
    return _MicroBatch(work, sizes, of_module, order, stay, let_go).replay(stay)


def events(work: Workload) -> Iterator[Event]:
    """The modules of one micro-batch in their order, forward and backward."""
    args, full = work.args, work.recompute != "none"
    head = "tok_embeddings" if args.tie_embeddings else "output"
    specs, flow = args.layer_specs(), work.flow
    yield Event("", "fetch")
    yield from _call("tok_embeddings")
    if args.vision is not None:
        yield from _within(TOWER, _tower(layer_args(args.vision)))
        yield from _call(PROJECTION)
    if POSITION_TABLE in flow:
        yield from _call(POSITION_TABLE)
    if args.encoder_layers:
        yield from _encode(args, flow)
    for spec in specs:
        yield from _forward(args, spec)
    if args.has_final_norm:
        yield from _call("norm")
    for _ in range(work.head_calls):
        yield from _call(head)
    if work.predicts:
        yield from _call(PREDICTION)
    yield Event("", "release")
    if work.predicts:
        yield from _around(PREDICTION, flow[PREDICTION])
    for _ in range(work.head_gradients):
        yield from _around(head, flow[HEAD])
    if args.has_final_norm:
        yield from _around("norm", flow["norm"])
    for spec in reversed(specs):
        yield from _backward(args, spec, full, flow)
    if args.encoder_layers:
        yield from _encode_backward(args, full, flow)
    if POSITION_TABLE in flow:
        yield from _around(POSITION_TABLE, flow[POSITION_TABLE])
    if args.vision is not None:  # its call came later than that of the table
        yield from _around(PROJECTION, flow[PROJECTION])
        yield from _around(TOWER, flow[TOWER], _tower_backward(layer_args(args.vision), full, flow))
    yield from _around("tok_embeddings", flow["tok_embeddings"])


def _encode(args: ModelArgs, flow: Mapping[str, Flow]) -> Iterator[Event]:
    """The encoder of the source, from the token table on."""
    yield from _call("tok_embeddings")
    if SOURCE_POSITIONS in flow:
        yield from _call(SOURCE_POSITIONS)
    for spec in args.encoder_specs():
        yield from _forward(args, spec)
    if args.has_final_norm:
        yield from _call(ENCODER_NORM)


def _encode_backward(args: ModelArgs, recompute: bool, flow: Mapping[str, Flow]) -> Iterator[Event]:
    if args.has_final_norm:
        yield from _around(ENCODER_NORM, flow[ENCODER_NORM])
    for spec in reversed(args.encoder_specs()):
        yield from _backward(args, spec, recompute, flow)
    if SOURCE_POSITIONS in flow:
        yield from _around(SOURCE_POSITIONS, flow[SOURCE_POSITIONS])
    yield from _around("tok_embeddings", flow["tok_embeddings"])


def _tower(args: ModelArgs) -> Iterator[Event]:
    """The inside of the vision tower, whose args these are."""
    for name in ("patch", "norm_pre"):
        yield from _call(f"{TOWER}.{name}")
    for spec in args.layer_specs():
        yield from _forward(args, spec, f"{TOWER}.")
    yield from _call(f"{TOWER}.norm")
    yield from _within(f"{TOWER}.adapter", _linears(f"{TOWER}.adapter", ADAPTER))


def _tower_backward(args: ModelArgs, recompute: bool, flow: Mapping[str, Flow]) -> Iterator[Event]:
    adapter = f"{TOWER}.adapter"
    inside = (event for fc in reversed(ADAPTER) for event in _around(f"{adapter}.{fc}", flow[f"{adapter}.{fc}"]))
    yield from _around(adapter, flow[adapter], inside)
    yield from _around(f"{TOWER}.norm", flow[f"{TOWER}.norm"])
    for spec in reversed(args.layer_specs()):
        yield from _backward(args, spec, recompute, flow, f"{TOWER}.")
    for name in ("norm_pre", "patch"):
        yield from _around(f"{TOWER}.{name}", flow[f"{TOWER}.{name}"])


def _call(module: str) -> Iterator[Event]:
    yield Event(module, "fetch")
    yield Event(module, "release")


def _around(module: str, flow: Flow, inner: Iterable[Event] = ()) -> Iterator[Event]:
    """A module in the backward: one whose result has no gradient has none, and where what it reads has none, nothing
    says when it ended."""
    if flow.after:
        yield Event(module, "fetch")
        yield from inner
        if flow.before:
            yield Event(module, "release")


def _within(module: str, inner: Iterator[Event]) -> Iterator[Event]:
    yield Event(module, "fetch")
    yield from inner
    yield Event(module, "release")


def _linears(prefix: str, names: tuple[str, ...]) -> Iterator[Event]:
    for name in names:
        yield from _call(f"{prefix}.{name}")


def norms_around(args: ModelArgs) -> tuple[bool, bool]:
    """Whether there are norms before attention and feed-forward, and after them."""
    return args.norm_place in ("pre", "sandwich"), args.norm_place != "pre"


def auxiliary_losses(args: ModelArgs) -> int:
    """Losses of the router that have gradients."""
    moe = args.moe
    return 0 if moe is None else (moe.balance == "lag" and moe.aux_alpha > 0) + (moe.z_alpha > 0)


def _forward(args: ModelArgs, spec: LayerSpec, prefix: str = "") -> Iterator[Event]:
    block = f"{prefix}{spec.unit}"
    before, after = norms_around(args)

    def part(short: str, module: str, inner: tuple[str, ...]) -> Iterator[Event]:
        if before:
            yield from _call(f"{block}.{short}_norm")
        yield from _within(f"{block}.{module}", _linears(f"{block}.{module}", inner))
        if after:
            yield from _call(f"{block}.{short}_post_norm")

    def parts() -> Iterator[Event]:
        if spec.mixes:
            yield from part("attention", "attention", attention_modules(args, spec))
        if spec.cross:
            yield from part(CROSS, CROSS, cross_modules(args))
        if spec.ffn != "none":
            yield from part("ffn", "feed_forward", feed_forward_modules(args, spec))

    yield from _within(block, parts())


def _backward(
    args: ModelArgs, spec: LayerSpec, recompute: bool, flow: Mapping[str, Flow], prefix: str = ""
) -> Iterator[Event]:
    """A module with several results is fetched once for each that has a gradient."""
    block = f"{prefix}{spec.unit}"
    ffn = f"{block}.feed_forward"
    losses = auxiliary_losses(args) if spec.ffn == "moe" and flow[f"{ffn}.router"].after else 0
    yield from (Event(block, "fetch") for _ in range(flow[block].after + losses))
    repeat = _repetition(args, spec, prefix) if recompute else iter(())
    before, after = norms_around(args)
    if spec.ffn != "none":
        if after:
            yield from _around(f"{block}.ffn_post_norm", flow[f"{block}.ffn_post_norm"], repeat)
        yield from (Event(ffn, "fetch") for _ in range(flow[ffn].after + losses))
        if spec.ffn == "moe" and flow[ffn].after and repeats_after_experts(args):
            yield from repeat
        for name in reversed(feed_forward_modules(args, spec)):
            yield from _around(f"{ffn}.{name}", flow[f"{ffn}.{name}"], repeat)  # a product asks for its input
        if flow[ffn].after and flow[ffn].before:
            yield Event(ffn, "release")
        if before:
            yield from _around(f"{block}.ffn_norm", flow[f"{block}.ffn_norm"])
    parts = [("attention", attention_modules(args, spec))] if spec.mixes else []
    parts += [(CROSS, cross_modules(args))] if spec.cross else []
    for short, names in reversed(parts):
        module = f"{block}.{short}"
        if after:
            yield from _around(f"{module}_post_norm", flow[f"{module}_post_norm"], repeat)
        inside = (
            event
            for name in reversed(names)
            for event in _around(f"{module}.{name}", flow[f"{module}.{name}"], repeat)
        )
        yield from _around(module, _given(flow, module, module), inside)
        if before:
            yield from _around(f"{module}_norm", flow[f"{module}_norm"])
    if flow[block].after and _given(flow, block, f"{block}.{CROSS}").before:
        yield Event(block, "release")


def _given(flow: Mapping[str, Flow], module: str, cross: str) -> Flow:
    """That of a module which also reads what the encoder made, where there is cross attention: it ends when all that it
    reads has its gradient."""
    memory = flow.get(f"{cross}.{MEMORY}", Flow(False, False))
    return Flow(flow[module].before or memory.before, flow[module].after)


def repeats_after_experts(args: ModelArgs) -> bool:
    """Whether the backward of an MoE layer needs something that its forward made after its last module's call."""
    moe = args.moe
    if norms_around(args)[1]:
        return False  # a norm is the last module
    if moe is None or auxiliary_losses(args) > 0:
        return moe is not None
    return not moe.shared and (moe.apply == "output" or moe.overflow)


def _repetition(args: ModelArgs, spec: LayerSpec, prefix: str) -> Iterator[Event]:
    """The forward again, up to the last thing that the backward needs: where that is made inside the last module's
    call, the call does not end.
    """
    again = list(_forward(args, spec, prefix))
    last = max(i for i, event in enumerate(again) if event.what == "fetch")
    after_call = spec.ffn == "moe" and repeats_after_experts(args)
    yield from again[: last + 2 if after_call else last + 1]


class _MicroBatch:
    """DeepSpeed's state in one micro-batch. Steps number the fetches."""

    def __init__(
        self,
        work: Workload,
        sizes: Mapping[str, int],
        of_module: Mapping[str, list[str]],
        events: list[Event],
        stay: set[str],
        decisions: Decisions,
    ) -> None:
        self.sizes, self.of_module, self.events, self.stay = sizes, of_module, events, stay
        self.ahead = work.zero3("stage3_prefetch_bucket_size")
        self.most_available = work.zero3("stage3_max_live_parameters")
        self.reuse = work.zero3("stage3_max_reuse_distance")
        self.order = [event.module for event in events if event.what == "fetch"]
        self.queue = deque((name, step) for step, module in enumerate(self.order) for name in of_module[module])
        self.fetched_for: dict[str, int] = defaultdict(lambda: -1)
        self.available: set[str] = set()
        self.active: dict[str, set[str]] = defaultdict(set)
        self.n_available = 0
        self.step = 0
        self.decisions = decisions
        self.counts: Counter[str] = Counter()

    def replay(self, available: set[str]) -> Counter[str]:
        """How often each parameter is gathered, when these are there from the beginning."""
        self.available = set(available)
        for event in self.events:
            if event.what == "fetch":
                self._fetch(event.module)
            else:
                self._release(event.module)
        return self.counts

    def _gather(self, names: list[str]) -> None:
        for name in names:
            self.available.add(name)
            self.counts[name] += 1
            self.n_available += self.sizes[name]

    def _fetch(self, module: str) -> None:
        names = self.of_module[module]
        self._gather([name for name in names if name not in self.available])
        for name in names:
            self.active[name].add(module)
        new = {name for name in names if self.fetched_for[name] < self.step}
        passed: set[str] = set()
        while self.queue and len(passed) < len(new):
            name, step = self.queue.popleft()
            self.fetched_for[name] = step
            passed.add(name)
        if self.ahead > 0:
            self._fetch_ahead()
        self.step += 1

    def _fetch_ahead(self) -> None:
        limit, numel = min(self.most_available - self.n_available, self.ahead), 0
        found: list[str] = []
        while self.queue and numel < limit:
            name, step = self.queue.popleft()
            if name not in self.available and name not in found:
                found.append(name)
                numel += self.sizes[name]
            self.fetched_for[name] = max(self.fetched_for[name], step)
        self._gather(found)

    def _release(self, module: str) -> None:
        if (module, self.step) not in self.decisions:
            self.decisions[module, self.step] = self._not_needed_soon(module)
        for name in self.of_module[module]:
            self.active[name].discard(module)
            if name in self.decisions[module, self.step] and name in self.available and not self.active[name]:
                self.available.remove(name)
                self.n_available -= self.sizes[name]

    def _not_needed_soon(self, module: str) -> set[str]:
        names = self.of_module[module]
        found = {name for name in names if name not in self.stay and self.fetched_for[name] <= self.step}
        seen = 0
        for later in self.order[self.step :] if found else ():
            if seen >= self.reuse:
                break
            for name in self.of_module[later]:
                found.discard(name)
                seen += self.sizes[name]
        return found
