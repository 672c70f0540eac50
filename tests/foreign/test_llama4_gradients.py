"""Gradients through a converted Llama 4 text model equal those of transformers, and in float64 those of a plain
reference: every expert on every token, whole masks, autograd's own backward throughout.

Shapes: B batch, T tokens, D model width, V vocabulary, H query heads, K kv heads, d head width, E experts.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm import LLM, ModelArgs
from llm.args import AttentionSpec
from llm.args.layers import attention_specs
from llm.layers.rope import inverse_frequencies, rotation
from tests.foreign.models import CONFIGS, reference, tokens

NAMES = list(CONFIGS["llama4_text"])
Weights = dict[str, Tensor]


@pytest.fixture(params=NAMES)
def converted(request, tmp_path):
    """A model of transformers and the same read from its folder."""
    theirs = reference("llama4_text", request.param)
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, LLM.from_pretrained(tmp_path / "theirs")


def loss_of(logits_BTV: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_gradients_equal_those_of_transformers(converted):
    theirs, ours = converted
    ids = tokens(2, 26)  # past three chunks of 8
    loss_of(theirs(ids).logits, ids).backward()
    loss_of(ours(ids).logits, ids).backward()
    assert all(parameter.grad is not None for parameter in theirs.parameters())
    expected = LLM(ours.args)  # whose parameters hold gradients, in our names
    expected.load_state_dict({name: parameter.grad for name, parameter in theirs.named_parameters()})
    for (name, parameter), (_, wanted) in zip(ours.named_parameters(), expected.named_parameters(), strict=True):
        if vanishes(ours.args, name):
            assert max(largest(parameter.grad), largest(wanted)) < 1e-6, name
            continue
        # float32 sums in another order, through three layers
        assert largest(parameter.grad - wanted) <= 1e-4 * largest(wanted), name


def test_gradients_in_float64_equal_those_of_a_plain_reference(converted):
    model = converted[1].double()
    ids = tokens(2, 26)
    # of hidden states, as logits are float32 by promise; the head is a product that both do alike
    head = "tok_embeddings.weight" if model.args.tie_embeddings else "output.weight"
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    expected = loss_of(plain_hidden(model.args, weights, ids) @ weights[head].t(), ids)
    parameters = dict(model.named_parameters())
    actual = loss_of(model(ids, return_hidden=True).hidden @ parameters[head].t(), ids)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    expected.backward()
    actual.backward()
    for name, parameter in parameters.items():
        wanted = weights[name].grad
        if vanishes(model.args, name):
            assert max(largest(parameter.grad), largest(wanted)) < 1e-15, name
            continue
        assert largest(wanted) > 1e-6, name
        assert largest(parameter.grad - wanted) <= 1e-9 * largest(wanted), name


def vanishes(args: ModelArgs, name: str) -> bool:
    """Whether the gradient is 0 but for rounding: without RoPE a bias of all keys adds the same to all scores."""
    return name.endswith("attention.wk.bias") and not attention_specs(args.layer_specs())[int(name.split(".")[1])].rope


def largest(x: Tensor) -> float:
    return x.abs().max().item()


def plain_hidden(args: ModelArgs, weights: Weights, ids: Tensor) -> Tensor:
    """Final hidden states (B, T, D) by the description of Llama 4."""
    x = weights["tok_embeddings.weight"][ids]
    for spec in args.layer_specs():
        prefix = f"layers.{spec.index}."
        w = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        x = x + attention(args, spec.attention, w, rms(x, args.norm_eps) * w["attention_norm.weight"])
        y = rms(x, args.norm_eps) * w["ffn_norm.weight"]
        x = x + (experts(args, w, y) if spec.ffn == "moe" else swiglu(y, *dense(w, "feed_forward")))
    return rms(x, args.norm_eps) * weights["norm.weight"]


def rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def swiglu(x: Tensor, w1_DF: Tensor, w2_FD: Tensor, w3_DF: Tensor) -> Tensor:
    gate = x @ w1_DF
    return (gate * gate.sigmoid() * (x @ w3_DF)) @ w2_FD


def dense(w: Weights, name: str) -> list[Tensor]:
    return [w[f"{name}.w{i}.weight"].t() for i in (1, 2, 3)]


def experts(args: ModelArgs, w: Weights, x: Tensor) -> Tensor:
    """All experts on all tokens, whose inputs are 0 where they are not chosen; and the shared one."""
    assert args.moe is not None
    logits_BTE = x @ w["feed_forward.router.weight"].t()
    lowest_chosen = logits_BTE.sort(-1, descending=True).values[..., args.moe.top_k - 1, None]
    weight_BTE = logits_BTE.sigmoid() * (logits_BTE >= lowest_chosen)
    y = swiglu(x, *dense(w, "feed_forward.shared_expert"))
    for e in range(args.moe.n_experts):
        y = y + swiglu(x * weight_BTE[..., e, None], *(w[f"feed_forward.experts.w{i}"][e] for i in (1, 2, 3)))
    return y


def attention(args: ModelArgs, spec: AttentionSpec, w: Weights, x: Tensor) -> Tensor:
    n_tokens, width = x.shape[1], args.head_width
    position = torch.arange(n_tokens)
    q, k, v = (linear(w, f"attention.{name}", x).unflatten(-1, (-1, width)) for name in ("wq", "wk", "wv"))
    if spec.rope:
        # angles are float32 by promise, so their cosines and sines are constants here
        turn_1T1m = rotation(position[None], inverse_frequencies(width, args.rope_theta, args.rope_scaling))
        q, k = (turned(y, turn_1T1m.real.double(), turn_1T1m.imag.double()) for y in (q, k))
        if args.qk_norm == "l2":
            q, k = rms(q, args.norm_eps), rms(k, args.norm_eps)
    elif args.attn_temperature_tuning:
        steps = torch.floor((position.float() + 1) / args.floor_scale)
        q = q * (1 + args.attn_scale * torch.log1p(steps))[:, None, None]
    seen = position[:, None] >= position
    if spec.mask == "chunk":
        assert spec.span is not None
        seen = seen & (position[:, None] // spec.span == position // spec.span)
    groups = args.n_heads // args.kv_heads
    k, v = (y.repeat_interleave(groups, dim=2) for y in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / width**0.5
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return linear(w, "attention.wo", torch.einsum("bhts,bshd->bthd", p, v).flatten(-2))


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    y = x @ w[f"{name}.weight"].t()
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring pairs rotated."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
