"""Where gradients pass in a backward: not into what no parameter that trains lies before, and not out of it.

What has no gradient to pass on sends nothing, and is not fetched for a backward.
"""

from collections.abc import Collection
from typing import NamedTuple

from llm.args import LayerSpec, ModelArgs
from llm.args.layers import cross_attention
from llm.args.lora import TOWER
from llm.layers.encoder import ENCODER_NORM
from llm.layers.feed_forwards import FFNS
from llm.layers.mixers import MIXERS
from llm.layers.parameter import Rows
from llm.layers.positions import POSITION_TABLE
from llm.layers.prediction import PREDICTION
from llm.parameters import ParameterTable
from vision.encoder import layer_args

QKV = ("wq", "wk", "wv")
CROSS = "cross"
SOURCE_POSITIONS = f"encoder.{POSITION_TABLE}"
ROUTED = ("router", "experts")
GATED, PLAIN = ("w1", "w3", "w2"), ("w1", "w2")
ADAPTER = ("fc1", "fc2")
HEAD = "head"
"""The output, or the table that stands for it."""
VECTORS = "vectors"
"""Token vectors, with those of images among them."""
SOURCE_VECTORS = "encoder.vectors"
"""Those of the source, where there is an encoder."""
MEMORY = "memory"
"""What a layer is given of the encoder, by the name of its cross attention."""
PROJECTION = "vision_projection"


class Flow(NamedTuple):
    """A module in a backward."""

    before: bool
    """Whether what it reads has a gradient."""
    after: bool
    """Whether its result has one."""


def gradient_flow(args: ModelArgs, table: ParameterTable, starts: Collection[str] = ()) -> dict[str, Flow]:
    """The modules of a model by name. starts: layers that later stages of a pipeline begin with, which always hand a
    gradient back: of both sides, where there is an encoder."""
    walk = _Walk(args, table)
    x = walk.call("tok_embeddings", False)
    if args.vision is not None:
        seen = _Walk(layer_args(args.vision), table, walk.found, f"{TOWER}.").tower()
        x = walk.call(PROJECTION, seen) or x
    if any(name.startswith(f"{POSITION_TABLE}.") for name in table):
        x = walk.call(POSITION_TABLE, False) or x
    walk.found[VECTORS] = Flow(False, x)
    memory, reached = False, False
    if args.encoder_layers:
        memory = walk.call("tok_embeddings", False)
        if any(name.startswith(f"{SOURCE_POSITIONS}.") for name in table):
            memory = walk.call(SOURCE_POSITIONS, False) or memory
        walk.found[SOURCE_VECTORS] = Flow(False, memory)
    for spec in args.encoder_specs():
        reached = reached or spec.unit in starts
        memory = walk.layer(spec, memory or spec.unit in starts)
    if args.encoder_layers and args.has_final_norm:
        memory = walk.call(ENCODER_NORM, memory)
    x = x or reached
    for spec in args.layer_specs():
        start = spec.unit in starts
        x, memory = x or start, memory or start
        x = walk.layer(spec, x, memory)
    x = walk.call("norm", x) if args.has_final_norm else x
    trains = ("tok_embeddings" if args.tie_embeddings else "output") in walk.training
    walk.found[HEAD] = Flow(x, x or trains)
    if args.n_prediction:
        walk.call(PREDICTION, x)
    return walk.found


class _Walk:
    """Through the modules in the order of their calls; each method returns whether its result has a gradient."""

    def __init__(
        self, args: ModelArgs, table: ParameterTable, found: dict[str, Flow] | None = None, prefix: str = ""
    ) -> None:
        """found: what is known already. prefix: what the names of layers begin with."""
        self.args, self.prefix = args, prefix
        self.training = {name.rpartition(".")[0] for name, row in table.items() if row.trainable}
        self.found: dict[str, Flow] = {} if found is None else found

    def call(self, module: str, before: bool) -> bool:
        after = before or module in self.training
        self.found[module] = Flow(before, after)
        return after

    def tower(self) -> bool:
        """The vision tower, whose args these are."""
        x = self.call(f"{TOWER}.patch", False) or TOWER in self.training  # vectors of its own for the places
        x = self.call(f"{TOWER}.norm_pre", x)
        for spec in self.args.layer_specs():
            x = self.layer(spec, x)
        x = self.call(f"{TOWER}.norm", x)
        after = self._linears(f"{TOWER}.adapter", ADAPTER, x)
        self.found[f"{TOWER}.adapter"], self.found[TOWER] = Flow(x, after), Flow(False, after)
        return after

    def layer(self, spec: LayerSpec, x: bool, memory: bool = False) -> bool:
        """memory: whether what its cross attention reads of an encoder has a gradient, where it has any."""
        block = f"{self.prefix}{spec.unit}"
        mid = (spec.mixes and self._part(block, "attention", "attention", spec, x)) or x
        if spec.cross:
            self.found[f"{block}.{CROSS}.{MEMORY}"] = Flow(memory, memory)
            mid = self._part(block, CROSS, CROSS, spec, mid) or mid
        y = mid
        if spec.ffn != "none":
            y = self._part(block, "ffn", "feed_forward", spec, x if spec.parallel else mid) or mid
        self.found[block] = Flow(x, y)
        return y

    def _part(self, block: str, short: str, module: str, spec: LayerSpec, x: bool) -> bool:
        before = self.call(f"{block}.{short}_norm", x) if spec.norms.before else x
        inside = {"attention": self._attention, CROSS: self._cross}.get(short, self._feed_forward)
        after = inside(f"{block}.{module}", spec, before)
        self.found[f"{block}.{module}"] = Flow(before, after)
        of_norm = after or (x and spec.norms.of_sum)
        return self.call(f"{block}.{short}_post_norm", of_norm) if spec.norms.after else after

    def _attention(self, module: str, spec: LayerSpec, x: bool) -> bool:
        """Whatever the mixer is."""
        said, attends = ssm_module(spec), heads_module(spec)
        block = module.removesuffix("attention")
        made, modules = [], {"ssm": f"{block}{said}", "heads": f"{block}{attends}"}
        if said is None and spec.heads is None:
            return any([self.call(f"{module}.{name}", x) for name in attention_modules(self.args, spec)])
        if said is not None:
            made.append(self._ssm(modules["ssm"], spec, x))
            self.found[modules["ssm"]] = Flow(x, made[-1])
        if spec.heads is not None:
            scores = spec.mixer.name == "routed" and self.call(f"{module}.route", x)
            made.append(self._heads(modules["heads"], spec, x, self._pooled(module, spec, x)) or scores)
            self.found[modules["heads"]] = Flow(x, made[-1])
        return any(made)

    def _pooled(self, module: str, spec: LayerSpec, x: bool) -> bool:
        return self.call(f"{module}.pool", x) if spec.stride > 1 else x

    def _heads(self, module: str, spec: LayerSpec, x: bool, memory: bool) -> bool:
        """memory: whether what keys and values are made of has a gradient."""
        assert spec.heads is not None
        q, k, v = (self.call(f"{module}.{name}", x if name == "wq" else memory) for name in QKV)
        if spec.heads.qk_norm in ("head", "full"):
            q, k = self.call(f"{module}.q_norm", q), self.call(f"{module}.k_norm", k)
        gate = spec.heads.gate and self.call(f"{module}.wg", x)
        return self.call(f"{module}.wo", q or k or v or gate)

    def _ssm(self, module: str, spec: LayerSpec, x: bool) -> bool:
        gate, pooled = self.call(f"{module}.wz", x), self._pooled(module, spec, x)
        said = [self.call(f"{module}.wdt", pooled), module in self.training]  # decay, skip and steps are its own
        for linear, taps in (("wx", "conv_x"), ("wbc", "conv_bc")):
            said.append(self.call(f"{module}.{taps}", self.call(f"{module}.{linear}", pooled)))
        norm = None if self.args.ssm is None else self.args.ssm.norm
        if norm == "none":
            return self.call(f"{module}.wo", gate or any(said))
        if norm == "before_gate":
            return self.call(f"{module}.wo", self.call(f"{module}.norm", any(said)) or gate)
        return self.call(f"{module}.wo", self.call(f"{module}.norm", gate or any(said)))

    def _cross(self, module: str, spec: LayerSpec, x: bool) -> bool:
        memory, found = self.found[f"{module}.{MEMORY}"].before, [False]
        reads = {"q_norm": "wq", "k_norm": "wk"}
        for name in cross_modules(self.args)[:-1]:
            before = memory if name in ("wk", "wv") else x
            if name in reads:
                before = self.found[f"{module}.{reads[name]}"].after
            found.append(self.call(f"{module}.{name}", before))
        return self.call(f"{module}.wo", any(found))

    def _feed_forward(self, module: str, spec: LayerSpec, x: bool) -> bool:
        if spec.ffn == "dense":
            return self._linears(module, GATED if self.args.gated else PLAIN, x)
        if spec.ffn != "moe":
            return any([self.call(f"{module}.{name}", x) for name in feed_forward_modules(self.args, spec)])
        moe = self.args.moe
        assert moe is not None
        weights = self.call(f"{module}.router", x)
        routed = self.call(f"{module}.experts", x or (moe.apply == "input" and weights))
        linears, into = _linears_of_experts(self.args), x or (moe.apply == "input" and weights)
        overflow = moe.overflow and self._linears(f"{module}.overflow_expert", linears, into)
        shared = moe.shared and self._linears(f"{module}.shared_expert", linears, x)
        return routed or weights or overflow or shared

    def _linears(self, module: str, names: tuple[str, ...], x: bool) -> bool:
        *first, last = names
        return self.call(f"{module}.{last}", any([self.call(f"{module}.{name}", x) for name in first]))


def ssm_module(spec: LayerSpec) -> str | None:
    """The state-space mixer of a block by its name; None without one."""
    return {"ssm": "attention", "routed": "attention.ssm", "sum": "attention.ssm"}.get(spec.mixer.name)


def heads_module(spec: LayerSpec) -> str:
    """Where a block that attends has its projections."""
    return "attention.attn" if spec.mixer.name in ("routed", "sum") else "attention"


def attention_modules(args: ModelArgs, spec: LayerSpec) -> tuple[str, ...]:
    """The modules with weights inside a mixer, in the order of their calls."""
    if spec.attention is None:
        return _declared(MIXERS[spec.mixer.name].declare(args, spec))
    norms = ("q_norm", "k_norm") if spec.attention.qk_norm in ("head", "full") else ()
    return (*QKV, *norms, *(("wg",) if spec.attention.gate else ()), "wo")


def cross_modules(args: ModelArgs) -> tuple[str, ...]:
    """The modules with weights inside cross attention, in the order of their calls."""
    spec = cross_attention(args)
    normed = spec.qk_norm in ("head", "full")
    queries, keys = ("wq", *["q_norm"] * normed), ("wk", "wv", *["k_norm"] * normed)
    return (*queries, *keys, *["wg"] * spec.gate, "wo")


def _declared(rows: Rows) -> tuple[str, ...]:
    """In the order of their declaration, which is the best guess; weights of the mixer itself come with it."""
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in rows if "." in name))


def feed_forward_modules(args: ModelArgs, spec: LayerSpec) -> tuple[str, ...]:
    """The modules with weights inside a feed-forward, in the order of their calls."""
    if spec.ffn == "dense":
        return GATED if args.gated else PLAIN
    if spec.ffn != "moe":
        return _declared(FFNS[spec.ffn].declare(args))
    moe = args.moe
    assert moe is not None
    beside = (*["overflow_expert"] * moe.overflow, *["shared_expert"] * moe.shared)
    return (*ROUTED, *(f"{expert}.{name}" for expert in beside for name in _linears_of_experts(args)))


def _linears_of_experts(args: ModelArgs) -> tuple[str, ...]:
    """Of an expert that every token, or any that overflows, visits."""
    assert args.moe is not None
    return GATED if args.moe.swiglu or args.gated else PLAIN
