"""Low-rank adapters: what they compute, what they begin with, and what they are added to."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llm import LLM
from llm.adapters.merge import CHUNK_ELEMENTS, Merged, refuse_incomplete
from llm.args import LoraArgs
from llm.boxes import whole
from llm.checkpoint.weights import ModuleWeights
from llm.errors import UserError
from llm.layers.dropout import token_keys
from llm.layers.lora import adapters_in
from llm.parameters import ParameterTable
from tests.model.models import MOE, llama4, tokens

EVERYWHERE = ["wq", "wk", "wv", "wo", "w1", "w2", "w3", "experts", "tok_embeddings", "output"]
INPUT_WEIGHTED = {**MOE, "top_k": 2, "interleave": 2}
OUTPUT_WEIGHTED = {
    **MOE, "top_k": 2, "score": "softmax", "apply": "output", "renorm": True, "shared": False
}  # fmt: skip


def adapted(targets: list[str] | None = None, learned: bool = True, **changes: Any) -> LLM:
    """A model with adapters of rank 4; learned: B is not 0 any more."""
    lora = {"rank": 4, "alpha": 8.0, "targets": targets, **changes.pop("lora", {})}
    model = llama4(**{"moe": INPUT_WEIGHTED, **changes}, lora=lora)
    for name, parameter in model.named_parameters():
        if learned and name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def merged(model: LLM) -> LLM:
    """A model without adapters whose weights are base and adapter together."""
    weights, made = Merged(ModuleWeights(model), model.args), LLM(model.args.merged)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            weights.read(name, whole(tuple(parameter.shape)), parameter)
    return made


def gradients(model: LLM, names: list[str]) -> dict[str, Tensor]:
    ids = tokens(2, 16)
    out = model(ids, labels=ids)
    assert out.loss_sum is not None
    return dict(zip(names, torch.autograd.grad(out.loss_sum, [model.get_parameter(n) for n in names]), strict=True))


def test_rows_are_those_of_the_models_own_parameters_in_their_order() -> None:
    for tied in (False, True):
        model = adapted(EVERYWHERE[: 9 if tied else 10], tie_embeddings=tied)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert list(ParameterTable.of(model.args).shapes.items()) == list(shapes.items())


def test_a_new_adapter_adds_nothing_and_leaves_the_base_as_it_is_drawn() -> None:
    model, base = adapted(EVERYWHERE, learned=False), llama4(moe=INPUT_WEIGHTED)
    assert all(torch.equal(model.get_parameter(name), parameter) for name, parameter in base.named_parameters())
    assert torch.equal(model(tokens(2, 16)).logits, base(tokens(2, 16)).logits)
    a = model.get_parameter("layers.1.feed_forward.experts.w2_lora_a").detach()
    assert 0.9 / 40**0.5 < a.abs().max() < 1 / 40**0.5 and abs(a.mean()) < 0.02  # uniform over its bound


@pytest.mark.parametrize("moe", [INPUT_WEIGHTED, OUTPUT_WEIGHTED], ids=["input", "output"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [None, EVERYWHERE], ids=["usual", "everywhere"])
def test_adapters_beside_their_weights_are_the_merged_weights(moe: Any, tied: bool, targets: Any) -> None:
    model = adapted(targets and targets[: 9 if tied else 10], moe=moe, tie_embeddings=tied)
    plain, ids = merged(model), tokens(2, 16)
    ours, theirs = model(ids).logits, plain(ids).logits
    assert ours is not None and theirs is not None
    assert (theirs - llama4(moe=moe, tie_embeddings=tied)(ids).logits).abs().max() > 0.5, "the adapters do nothing"
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()  # float32: products in another order
    losses = [m(ids, labels=ids).loss_sum for m in (model, plain)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_a_repeated_forward_drops_the_same(mode: Any) -> None:
    model, ids = adapted(lora={"dropout": 0.5}), tokens(2, 16)
    keys, found = token_keys(0, 1, torch.arange(2), 32), []
    names = list(ParameterTable.of(model.args).adapters_alone())
    for model.activation_checkpointing in ("none", mode):
        loss = model(ids, labels=ids, keys_N=keys).loss_sum
        assert loss is not None
        found.append([loss, *torch.autograd.grad(loss, [model.get_parameter(name) for name in names])])
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))
    assert found[0][0] != model(ids, labels=ids).loss_sum
    assert found[0][0] != model(ids, labels=ids, keys_N=token_keys(0, 2, torch.arange(2), 32)).loss_sum


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_new_tokens_train_whole_and_are_merged(tied: bool) -> None:
    model = adapted(["wq"], tie_embeddings=tied, lora={"token_rows": (90, 95)})
    named = [name for name in ParameterTable.of(model.args).adapters_alone() if name.endswith("token_rows")]
    assert named == ["tok_embeddings.token_rows"] + ([] if tied else ["output.token_rows"])
    for name in named:
        torch.nn.init.normal_(model.get_parameter(name), std=0.3)
    plain, ids = merged(model), torch.arange(80, 97).view(1, -1)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)
    assert not torch.equal(plain.tok_embeddings.weight[90:95], model.tok_embeddings.weight[90:95])
    assert torch.equal(plain.tok_embeddings.weight[95:], model.tok_embeddings.weight[95:])
    weights = [name.replace("token_rows", "weight") for name in named]
    model.requires_grad_(True)

    def of(model: LLM, names: list[str]) -> list[Tensor]:
        loss = model(ids[:, :-1], labels=ids[:, 1:]).loss_sum
        assert loss is not None
        return list(torch.autograd.grad(loss, [model.get_parameter(name) for name in names]))

    for ours, theirs in zip(of(model, named), of(plain, weights), strict=True):
        # float32: sums in another order, of terms as large as the largest
        torch.testing.assert_close(ours, theirs[90:95], rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_gradients_of_an_adapter_are_those_of_the_merged_weights_through_its_product() -> None:
    model = adapted(EVERYWHERE)
    pairs = adapters_in(ParameterTable.of(model.args))
    ours = gradients(model, [key for pair in pairs.values() for key in pair[:2]])
    of_weights = gradients(merged(model), list(pairs))
    scale = 8.0 / 4
    for weight, (a, b, _) in pairs.items():
        grad, first, last = of_weights[weight], model.get_parameter(a), model.get_parameter(b)
        if grad.dim() == 2:
            expected = {a: last.t() @ grad * scale, b: grad @ first.t() * scale}
        else:
            expected = {a: grad @ last.mT * scale, b: first.mT @ grad * scale}
        for key, right in expected.items():  # float32: sums in another order, of terms as large as the largest
            torch.testing.assert_close(ours[key], right, rtol=1e-4, atol=1e-5 * right.detach().abs().max().item())


def test_the_scale_is_alpha_over_the_rank_or_its_root() -> None:
    assert LoraArgs(rank=16, alpha=32).scale == 2
    assert LoraArgs(rank=16, alpha=32, rslora=True).scale == 8


def test_a_box_of_merged_weights_is_that_part_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(EVERYWHERE)
    weights, plain = Merged(ModuleWeights(model), model.args), merged(model)
    monkeypatch.setattr("llm.adapters.merge.CHUNK_ELEMENTS", 100)
    assert CHUNK_ELEMENTS > 100
    for name, box in (
        ("layers.0.attention.wq.weight", ((5, 31), (3, 40))),
        ("tok_embeddings.weight", ((50, 97), (0, 48))),
        ("layers.1.feed_forward.experts.w2", ((1, 3), (7, 20), (4, 48))),
        ("norm.weight", ((2, 9),)),
    ):
        out = torch.empty([stop - start for start, stop in box])
        expected = plain.get_parameter(name).detach()[tuple(slice(*part) for part in box)]
        # float32: products of another shape may be added up in another order
        torch.testing.assert_close(weights.read(name, box, out), expected, rtol=1e-6, atol=1e-6)


def test_an_incomplete_adapter_is_refused_by_the_name_of_what_is_missing() -> None:
    args = adapted().args
    held = ParameterTable.of(args).shapes
    refuse_incomplete("run", args, held)
    missing = "layers.2.attention.wv.lora_b"
    with pytest.raises(UserError, match=rf"^run: its adapter is not complete: {missing} has shape None"):
        refuse_incomplete("run", args, {name: shape for name, shape in held.items() if name != missing})


def test_adapters_cost_no_gradient_of_the_weights_beside_them() -> None:
    model = adapted()
    for name, row in ParameterTable.of(model.args).adapters_alone().items():
        model.get_parameter(name).requires_grad_(row.trainable)
    ids = tokens(2, 16)
    loss = model(ids, labels=ids).loss_sum
    assert loss is not None
    loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, _ in model.named_parameters() if "lora" in n
    }
