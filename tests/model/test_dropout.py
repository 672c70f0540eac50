"""Dropout in a model: when it acts, by which random numbers, and that it costs nothing where it is off."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from llm import LLM, ModelArgs
from llm.datatypes import TransformerInput
from llm.errors import UserError
from llm.generate import generate
from llm.kernels.keyed import with_numbers
from llm.layers.dropout import Dropout, dropped, key_of, token_keys
from llm.train.config import load_config
from tests.distributed.harness import tiny_config, write_config, write_text
from tests.model.models import MOE, llama4, tokens

RATES = dict(attn_dropout=0.2, resid_dropout=0.2, embed_dropout=0.1, ffn_dropout=0.3)
EXPERTS = {**MOE, "top_k": 2, "interleave": 2}


def keys(rows: list[int], length: int = 16, step: int = 1) -> Tensor:
    return token_keys(0, step, torch.tensor(rows), length * len(rows))


def loss_of(model: LLM, ids: Tensor, keys_N: Tensor | None = None) -> Tensor:
    loss = model(ids, labels=ids, keys_N=keys_N).loss_sum
    assert loss is not None
    return loss


def places(model: LLM) -> list[Dropout]:
    """All in which something is dropped."""
    return [x for module in model.modules() for x in vars(module).values() if isinstance(x, Dropout)]


def operations(x: Tensor) -> list[str]:
    """The kinds of all nodes of the graph that made x, sorted."""
    seen, left = set(), [x.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [before for before, _ in node.next_functions]
    return sorted(node.name() for node in seen if node is not None)


@pytest.mark.parametrize("site", RATES)
@pytest.mark.parametrize("moe", [None, EXPERTS], ids=["dense", "experts"])
def test_each_site_changes_training_and_nothing_else(site: str, moe: Any) -> None:
    plain, model, ids = llama4(moe=moe), llama4(moe=moe, **{site: 0.3}), tokens(2, 16)
    assert loss_of(model, ids, keys([0, 1])) != loss_of(plain, ids)
    with torch.no_grad():
        assert loss_of(model, ids) == loss_of(plain, ids)
    assert loss_of(model.eval(), ids) == loss_of(plain, ids)
    prompts = ids.tolist()
    assert generate(model.train(), prompts, max_new_tokens=4) == generate(plain, prompts, max_new_tokens=4)


def test_without_rates_the_graph_has_nothing_of_dropout_and_no_random_number_is_drawn() -> None:
    before, ids = torch.random.get_rng_state(), tokens(2, 16)
    model = llama4(moe=EXPERTS, dropout=0.0)
    losses = loss_of(model, ids), loss_of(model, ids, keys([0, 1]))
    assert torch.equal(*losses) and operations(losses[0]) == operations(losses[1])
    assert not places(model) and not any("Dropped" in name for name in operations(losses[1]))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_keys_torchs_generator_chooses() -> None:
    model, ids, found = llama4(**RATES), tokens(2, 16), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append([loss_of(model, ids), loss_of(model, ids)])
    assert found[0] == found[1] and found[0][0] != found[0][1] and found[0][0] != found[2][0]


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("drawn", [False, True], ids=["keys", "generator"])
def test_a_repeated_forward_drops_the_same(mode: Any, drawn: bool) -> None:
    model, ids, found = llama4(moe=EXPERTS, **RATES), tokens(2, 16), []
    for model.activation_checkpointing in ("none", mode):
        torch.manual_seed(0)
        loss = loss_of(model, ids, None if drawn else keys([0, 1]))
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


def test_a_row_drops_the_same_whatever_rows_are_beside_it() -> None:
    model, ids = llama4(moe=EXPERTS, **RATES), tokens(3, 16)
    whole = model(ids, return_hidden=True, keys_N=keys([7, 8, 9])).hidden
    alone = [model(ids[i : i + 1], return_hidden=True, keys_N=keys([7 + i])).hidden for i in range(3)]
    torch.testing.assert_close(whole, torch.cat(alone), rtol=1e-5, atol=1e-5)  # products of other sizes


def test_rows_that_are_scored_together_have_no_attention_dropout() -> None:
    model = llama4(attn_dropout=0.1, rope_scaling=None)
    inputs = TransformerInput(
        tokens(1, 9), cu_seqlens=torch.tensor([0, 5, 7, 9], dtype=torch.int32), parents=torch.tensor([-1, 0, 0])
    )
    with pytest.raises(ValueError, match=r"or inputs\.parents drop no attention weights: give no keys_N"):
        model(inputs)
    with torch.no_grad():
        model(inputs)


def test_each_place_of_a_model_chooses_for_itself() -> None:
    model = llama4(moe={**EXPERTS, "shared": True}, **RATES)
    found = places(model)
    # the embedding, two updates a layer, hidden units of two dense layers and of two with experts and shared expert
    assert len(found) == 1 + 2 * 4 + 2 + 2 * 2 and len({place.site for place in found}) == len(found)


def test_experts_drop_hidden_units_of_each_token_apart() -> None:
    model = llama4(n_layers=1, nope_layer_interval=None, moe={**EXPERTS, "interleave": 1}, ffn_dropout=0.4)
    layer, keys_N = model.layers[0].feed_forward, keys([3], 8)
    experts, x = layer.experts, torch.randn(8, 48, generator=torch.Generator().manual_seed(0))
    weight_Nk, expert_Nk = torch.rand(8, 2), tokens(8, 2) % 4
    expert_Nk[:, 1] = (expert_Nk[:, 0] + 1) % 4
    expected = torch.zeros_like(x)
    for n in range(8):
        for k in range(2):
            e, taken = int(expert_Nk[n, k]), x[n] * weight_Nk[n, k]
            hidden = torch.nn.functional.silu(taken @ experts.w1[e]) * (taken @ experts.w3[e])
            key = with_numbers(keys_N[n : n + 1], expert_Nk[n, k])
            place = experts.hidden_dropout
            expected[n] = expected[n] + dropped(hidden[None], key, place.site, place.rate)[0] @ experts.w2[e]
    got, _ = layer.routed(x, weight_Nk, expert_Nk, keys_N=keys_N)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)  # sums in another order


def test_what_a_prediction_head_reads_of_a_document_goes_by_its_first_token() -> None:
    model, bounds = llama4(n_prediction=3, head_dropout=0.4), [0, 5, 16, 20, 32]
    inputs = TransformerInput(tokens(2, 16), cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    hidden, keys_N = model(inputs, return_hidden=True).hidden, keys([4, 9])
    assert hidden is not None and model.prediction is not None
    documents = zip(bounds, bounds[1:], strict=False)
    means = torch.stack([hidden.flatten(0, 1)[first:end].mean(0) for first, end in documents])
    left = dropped(means, keys_N[bounds[:-1]], key_of("pooled", "prediction"), 0.4)
    assert 0.2 < float((left == 0).float().mean()) < 0.6
    torch.testing.assert_close(model.predictions(hidden, inputs, keys_N), model.prediction(left), rtol=1e-5, atol=1e-6)
    torch.manual_seed(0)
    drawn = model.predictions(hidden, inputs)
    assert not torch.equal(drawn, model.predictions(hidden, inputs))
    torch.testing.assert_close(model.eval().predictions(hidden, inputs), model.prediction(means), rtol=1e-5, atol=1e-6)


def test_one_key_sets_three_rates_where_they_are_not_given() -> None:
    sizes = dict(dim=32, n_layers=1, n_heads=2)
    args = ModelArgs(**sizes, dropout=0.1, resid_dropout=0.2)  # type: ignore[call-arg]
    assert (args.attn_dropout, args.resid_dropout, args.embed_dropout) == (0.1, 0.2, 0.1)
    assert (args.ffn_dropout, args.head_dropout) == (0, 0) and args.drops
    written = args.model_dump()
    assert "dropout" not in written and "ffn_dropout" not in written and ModelArgs(**written) == args
    assert not ModelArgs(**sizes, dropout=0).drops  # type: ignore[call-arg]
    for wrong in (1, -0.1, "much", True, None):
        with pytest.raises(ValidationError, match=r"model\.dropout=.*: expected a number from 0 to below 1"):
            ModelArgs(**sizes, dropout=wrong, attn_dropout=0, resid_dropout=0, embed_dropout=0)  # type: ignore[call-arg]


def test_a_run_that_begins_with_a_folder_drops_what_its_config_says(tmp_path: Path) -> None:
    llama4(attn_dropout=0.3, ffn_dropout=0.2).save_pretrained(tmp_path / "model")
    write_text(tmp_path, documents=2)
    raw = tiny_config(tmp_path) | {"model": {"init_from": str(tmp_path / "model")}}
    file = write_config(tmp_path / "run.yaml", raw)
    kept, one, own = (load_config(file, over).model for over in ({}, {"model.dropout": 0.1}, {"model.ffn_dropout": 0}))
    assert (kept.attn_dropout, kept.ffn_dropout, kept.embed_dropout) == (0.3, 0.2, 0)
    assert (one.attn_dropout, one.ffn_dropout, one.embed_dropout) == (0.1, 0.2, 0.1)
    assert own.attn_dropout == 0.3 and own.ffn_dropout == 0
    for wrong in (1, True, "some"):
        with pytest.raises(UserError, match=r"run\.yaml: model\.dropout=.*: expected a number from 0 to below 1"):
            load_config(file, {"model.dropout": wrong})
    with pytest.raises(UserError, match=r"unknown key model\.attn_pdrop; did you mean model\.attn_dropout\?"):
        load_config(file, {"model.attn_pdrop": 0.1})
