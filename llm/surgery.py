"""Surgery on trained models: from (ModelArgs, weights by canonical name) to new ones, most of the time of the same
function.

`upcycle`, `deepen` and `enlarge_vocabulary` keep what the model computes, up to rounding, or refuse; `to_nope` does
not keep it. Tensors that stay as they are are shared with the weights given, which are never changed; new ones have
their dtype and device. On the meta device, surgery only says whether it can be done.

Shapes: D model width, H width of a dense feed-forward, F width of an expert, E experts, V vocabulary.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llm.args import LayerSpec, ModelArgs, MoEArgs
from llm.args.layers import attention_specs
from llm.errors import UserError
from llm.layers.routed import thresholds_of
from llm.model import LLM
from llm.parameters import ParameterTable

State = Mapping[str, Tensor]
Where = Literal["spread", "end"]
Rows = Literal["mean", "initial"]


def build(args: ModelArgs, state: State) -> LLM:
    """A model that uses these very tensors, in evaluation mode. UserError where they are not those of `args`."""
    _check(args, state)
    with torch.device("meta"):
        model = LLM(args)
    model.load_state_dict(dict(state), assign=True)
    return model.eval()


def upcycle(args: ModelArgs, state: State, moe: MoEArgs, seed: int = 0) -> tuple[ModelArgs, dict[str, Tensor]]:
    """Dense feed-forwards become mixtures of experts, made of their weights (Komatsuzaki et al. 2022,
    arXiv:2212.05055), in the layers that `moe` says. Routers are drawn by `seed`; moe.hidden unset = H.

    Function-preserving, in one of these ways:
    - shared, hidden >= H: the shared expert is the dense feed-forward; routed experts are copies whose w2 is 0.
    - a token's weights sum to 1 (renorm, or softmax with top_k = n_experts), on the output or with top_k=1: every
      routed expert is a copy, H <= hidden. With shared, that one has the first F of the H hidden units, and the routed
      ones have the rest.
    - the same with hidden below what they must hold: G experts together are one copy, a part of the units each, and
      have one row of the router, so that a token visits all of them or none (He et al. 2024, arXiv:2410.07524). Then G
      divides n_experts and top_k, and what the weights 1/G take away their w2 makes good (apply=input, which takes
      top_k = G: w1 and w3).
    Hidden units that no weights are left for are drawn, with w2 = 0.

    Raises UserError naming the key where none of them is possible, or where feed-forwards are not what experts are.
    """
    _check(args, state)
    if args.moe is not None:
        raise UserError("model.moe is given: the model is a mixture of experts already")
    for key, value, needed in (("act", args.act, "silu"), ("gated", args.gated, True), ("ffn_bias", args.ffn_bias, 0)):
        if value != needed:
            raise UserError(
                f"model.{key}={value}: experts are gated silu feed-forwards without biases, so these cannot become any"
            )
    for key, given in (("overflow", moe.overflow), ("swiglu=false", not moe.swiglu)):
        if given:
            raise UserError(f"model.moe.{key}: the dense feed-forward has no weights for such experts; leave it out")
    if moe.hidden is None:
        moe = moe.model_copy(update={"hidden": args.ffn_width()})
    new = _changed(args, moe=moe.model_dump())
    layers = [spec.unit for spec in new.all_specs() if spec.ffn == "moe"]
    if not layers:
        raise UserError(
            f"model.moe.interleave={moe.interleave} with dense_layers={list(moe.dense_layers)} and the layer pattern "
            f"makes none of the {len(new.all_specs())} layers a mixture of experts"
        )
    split = _Split.of(moe, args.ffn_width(), new.moe_width())
    made = dict(state)
    for layer in layers:
        prefix = f"{layer}.feed_forward."
        dense = {w: made.pop(f"{prefix}{w}.weight") for w in ("w1", "w2", "w3")}
        made.update(_experts(new, split, prefix, dense, seed))
    _check(new, made)
    return new, made


@dataclass(frozen=True)
class _Split:
    """Which hidden units of a dense feed-forward each expert gets."""

    shared: tuple[int, int] | None
    """Range of the shared expert."""
    parts: tuple[tuple[int, int], ...]
    """Ranges of the routed experts of a group, one after the other; groups repeat."""
    factor_in: float
    """Of the routed experts' w1 and w3."""
    factor_out: float
    """Of their w2."""

    @classmethod
    def of(cls, moe: MoEArgs, dense: int, width: int) -> "_Split":
        held = min(dense, width) if moe.shared else 0
        shared = (0, held) if moe.shared else None
        if held == dense:
            return cls(shared, ((0, dense),), 1.0, 0.0)
        other = f"; or moe.shared with moe.hidden={dense} or more, which has room for all of the dense feed-forward"
        groups = math.ceil((dense - held) / width)
        parts = tuple((held + i * width, min(held + (i + 1) * width, dense)) for i in range(groups))
        if not (moe.renorm or (moe.score == "softmax" and moe.top_k == moe.n_experts)):
            raise UserError(
                f"model.moe.renorm=False: the weights of a token's experts do not sum to 1, so that copies of the "
                f"dense feed-forward would not add up to it; set moe.renorm{other}"
            )
        for key in ("n_experts", "top_k"):
            if getattr(moe, key) % groups:
                raise UserError(
                    f"model.moe.{key}={getattr(moe, key)}: {groups} experts of moe.hidden={width} hold what is routed "
                    f"of the dense width {dense}, so it must be a multiple of {groups}{other}"
                )
        if moe.apply == "input" and moe.top_k != groups:
            raise UserError(
                f"model.moe.apply=input: experts are not linear, so that copies of one do not add up to it where "
                f"moe.top_k={moe.top_k} is above {groups}; use apply=output, or top_k={groups}{other}"
            )
        on_input = moe.apply == "input"
        return cls(shared, parts, groups if on_input else 1.0, 1.0 if on_input else groups)


def _experts(
    args: ModelArgs, split: _Split, prefix: str, dense: dict[str, Tensor], seed: int
) -> Iterator[tuple[str, Tensor]]:
    """The parameters of one MoE layer."""
    assert args.moe is not None
    n_experts, width, groups = args.moe.n_experts, args.moe_width(), len(split.parts)
    like = dense["w1"]

    def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
        return _drawn(args, name, shape, seed, like)

    router = drawn(f"{prefix}router.weight", (n_experts, args.dim))
    yield f"{prefix}router.weight", router[::groups].repeat_interleave(groups, dim=0)

    for w in ("w1", "w2", "w3"):
        units_HD = dense[w].t() if w == "w2" else dense[w]
        if split.shared is not None:
            name, (low, high) = f"{prefix}shared_expert.{w}.weight", split.shared
            whole = (args.dim, width) if w == "w2" else (width, args.dim)
            held = like.new_zeros(whole) if w == "w2" or high - low == width else drawn(name, whole)
            (held.t() if w == "w2" else held)[: high - low] = units_HD[low:high]
            yield name, held
        name = f"{prefix}experts.{w}"
        shape = (n_experts, width, args.dim) if w == "w2" else (n_experts, args.dim, width)
        full = all(high - low == width for low, high in split.parts)
        experts = like.new_zeros(shape) if w == "w2" or full else drawn(name, shape)
        units_EFD = experts if w == "w2" else experts.transpose(1, 2)
        for part, (low, high) in enumerate(split.parts):
            factor = split.factor_out if w == "w2" else split.factor_in
            units_EFD[part::groups, : high - low] = units_HD[low:high] * factor
        yield name, experts


def deepen(
    args: ModelArgs, state: State, n_layers: int, where: Where = "spread", seed: int = 0
) -> tuple[ModelArgs, dict[str, Tensor]]:
    """More layers, n_layers in all, the new ones adding nothing to the residual stream at first (Wu et al. 2024, "LLaMA
    Pro", arXiv:2401.02415). Function-preserving, bit by bit: logits, not the losses that routers of new layers add.

    A new layer is a copy of the last old layer of its kind before it, else of the first after it, else drawn by `seed`;
    but for its wo and w2, or where they are followed by norms, these: their weights and biases are 0 (norm_offset:
    weights -1). Not both: through a norm of 0 nothing would learn.

    where: spread evenly, as in LLaMA Pro, the last ones at the end; or all at the end. The kind of a layer follows from
    its index, and no old layer may become of another kind: spread layers come in whole periods of the kinds, while at
    the end any number does. Raises UserError naming n_layers else, and for norm_place post_add, through whose norms
    nothing comes unchanged.
    """
    _check(args, state)
    added = n_layers - args.n_layers
    if args.norm_place == "post_add":
        raise UserError("model.norm_place=post_add: no layer that is added leaves what comes through it as it was")
    if added < 1:
        raise UserError(f"n_layers={n_layers} must be above the model's {args.n_layers}")
    if where not in ("spread", "end"):
        raise UserError(f"where={where} is not one of spread, end")
    period = _period(args, n_layers) if where == "spread" else added
    if added % period:
        possible = [n for n in range(args.n_layers + 1, 3 * n_layers) if not (n - args.n_layers) % _period(args, n)]
        near = sorted(sorted(possible, key=lambda n: abs(n - n_layers))[:2])
        raise UserError(
            f"n_layers={n_layers}: the kinds of layers repeat after {period}, so layers in between come by that many"
            + (f"; use {' or '.join(map(str, near))}," if near else ";")
            + " or where=end"
        )
    old_of_new = _places(args.n_layers, added, period)
    new_of_old = {old: new for new, old in enumerate(old_of_new) if old is not None}
    changes: dict[str, Any] = {"n_layers": n_layers}
    if args.moe is not None:
        changes["moe"] = args.moe.model_dump() | {"dense_layers": [new_of_old[i] for i in args.moe.dense_layers]}
    if args.route is not None:  # those of the new layers are set when it is known of which these are copies
        changes["route"] = args.route.model_dump() | {"thresholds": None}
    new = _changed(args, **changes)
    old_kinds, new_kinds = _kinds(args), _kinds(new)
    new = _with_thresholds(args, new, [
        source if source is not None else _twin(place, old_of_new, old_kinds, new_kinds[place])
        for place, source in enumerate(old_of_new)
    ])  # fmt: skip
    assert all(old_kinds[old] == new_kinds[place] for old, place in new_of_old.items())

    made = {name: tensor for name, tensor in state.items() if not name.startswith("layers.")}
    for name, shape in ParameterTable.of(new).shapes.items():
        if name in made:
            continue
        place = int(name.split(".")[1])
        rest = name.removeprefix(f"layers.{place}.")
        source = old_of_new[place]
        if source is not None:
            made[name] = state[f"layers.{source}.{rest}"]
            continue
        value = _silent(new, rest)
        twin = _twin(place, old_of_new, old_kinds, new_kinds[place])
        if value is not None:
            made[name] = state["tok_embeddings.weight"].new_full(shape, value)
        elif twin is not None:
            made[name] = state[f"layers.{twin}.{rest}"].clone()
        else:
            made[name] = _drawn(new, name, shape, seed, state["tok_embeddings.weight"])
    _check(new, made)
    return new, made


def _with_thresholds(old: ModelArgs, new: ModelArgs, source_of: list[int | None]) -> ModelArgs:
    """`new` with the thresholds of its routed layers, where they are known of `old`: each layer has that of its source,
    one without a source 0, as in a new model."""
    known = thresholds_of(old)
    if not known or new.route is None:
        return new
    routed = [source for source, spec in zip(source_of, new.layer_specs(), strict=True) if spec.mixer.name == "routed"]
    thresholds = tuple(0.0 if source is None else known[source] for source in routed)
    return _changed(new, route=new.route.model_dump() | {"thresholds": thresholds})


def _silent(args: ModelArgs, name: str) -> float | None:
    """The value of a layer's parameter that makes the layer add nothing; None for all that need not have one."""
    module, _, leaf = name.rpartition(".")
    if args.norm_place == "pre":
        return 0.0 if "wo" in name.split(".") or "w2" in name.split(".") else None
    if not module.endswith("_post_norm"):
        return None
    return -1.0 if args.norm_offset and leaf == "weight" else 0.0


def _places(n_old: int, added: int, period: int) -> list[int | None]:
    """For each new layer in order, the old one that it is, or None; `period` new ones at a time, the last at the end"""
    groups = added // period
    old_of_new: list[int | None] = []
    before = 0
    for group in range(1, groups + 1):
        upto = -(-group * n_old // groups)
        old_of_new += [*range(before, upto), *[None] * period]
        before = upto
    return old_of_new


def _twin(place: int, old_of_new: list[int | None], old_kinds: list[LayerSpec], kind: LayerSpec) -> int | None:
    """The old layer that a new one at `place` is a copy of."""
    before = [old for old in old_of_new[:place] if old is not None and old_kinds[old] == kind]
    after = [old for old in old_of_new[place:] if old is not None and old_kinds[old] == kind]
    return before[-1] if before else after[0] if after else None


def _kinds(args: ModelArgs) -> list[LayerSpec]:
    """The layers without their indices."""
    return [spec.kind for spec in args.layer_specs()]


def _period(args: ModelArgs, n_layers: int) -> int:
    """After how many layers, of n_layers, their kinds repeat; single exceptions do not count."""
    moe = None if args.moe is None else args.moe.model_copy(update={"dense_layers": ()})
    kinds = _kinds(args.model_copy(update={"n_layers": n_layers, "moe": moe}))
    return next(p for p in range(1, n_layers + 1) if kinds[p:] == kinds[: n_layers - p])


def enlarge_vocabulary(
    args: ModelArgs, state: State, vocab_size: int, rows: Rows = "mean", seed: int = 0
) -> tuple[ModelArgs, dict[str, Tensor]]:
    """More tokens, vocab_size in all. The logits of the old ones stay; their probabilities shrink, as the softmax has
    more terms.

    rows: of the new tokens in the token table and in the output matrix: the mean of the old ones (Hewitt 2021,
    "Initializing New Word Embeddings for Pretrained Language Models"), or drawn by `seed`. The exponential of a mean is
    at most the mean of the exponentials, so with the mean (and no logit_softcap) n new tokens beside V old ones cost
    any target at most ln(1 + n / V) nats.

    Raises UserError unless vocab_size is larger than the model's.
    """
    _check(args, state)
    if vocab_size <= args.vocab_size:
        raise UserError(f"vocab_size={vocab_size} must be above the model's {args.vocab_size}")
    if rows not in ("mean", "initial"):
        raise UserError(f"rows={rows} is not one of mean, initial")
    new = _changed(args, vocab_size=vocab_size)
    made = dict(state)
    for name in ("tok_embeddings.weight", "output.weight"):
        if name not in state:  # tied
            continue
        old_VD = state[name]
        if rows == "mean":
            wide = torch.promote_types(old_VD.dtype, torch.float32)
            added = old_VD.to(wide).mean(0, keepdim=True).expand(vocab_size - len(old_VD), -1)
        else:
            added = _drawn(new, name, (vocab_size, args.dim), seed, old_VD)[len(old_VD) :]
        made[name] = torch.cat([old_VD, added.to(old_VD)])
    return new, made


def to_nope(args: ModelArgs, state: State, interval: int) -> tuple[ModelArgs, dict[str, Tensor]]:
    """Every interval-th layer loses its RoPE, and its chunks where there are any (Yang et al. 2025, arXiv:2501.18795).

    NOT function-preserving: weights stay, but those layers now see no positions; the model must be trained on. Raises
    UserError where the model has such layers already, or would have none.
    """
    _check(args, state)
    if any(not spec.rope for spec in attention_specs(args.layer_specs())):
        raise UserError(
            f"model.nope_layer_interval={args.nope_layer_interval}, layer_pattern={args.layer_pattern}: "
            f"the model has NoPE layers already"
        )
    new = _changed(args, nope_layer_interval=interval)
    if _kinds(new) == _kinds(args):
        raise UserError(
            f"interval={interval} makes none of the {args.n_layers} layers a NoPE layer; use 1 to {args.n_layers}"
            + ("" if args.layer_pattern is None else ", where model.layer_pattern does not say rope")
        )
    return new, dict(state)


def _changed(args: ModelArgs, **changes: Any) -> ModelArgs:
    return ModelArgs.model_validate(args.model_dump() | changes)


def _drawn(args: ModelArgs, name: str, shape: tuple[int, ...], seed: int, like: Tensor) -> Tensor:
    """Initial values of a parameter, of the dtype and device of `like`."""
    if like.is_meta:
        return like.new_empty(shape)
    return ParameterTable.of(args)[name].init.values(seed, name, 0, math.prod(shape)).view(shape).to(like)


def _check(args: ModelArgs, state: State) -> None:
    """UserError naming the first parameter that is missing, has another shape, or is none of this model."""
    expected = ParameterTable.of(args).shapes
    for name in [*expected, *state]:
        shape = tuple(state[name].shape) if name in state else None
        if shape != expected.get(name):
            raise UserError(f"weights: {name} has shape {shape}, expected {expected.get(name)}")
