"""A model is a list of units: runs of them, built and called apart, are the whole one."""

import pytest
import torch
from torch import Tensor

from llm.args import ModelArgs
from llm.cache import Cache
from llm.datatypes import TransformerInput
from llm.model import LLM, unit_names
from tests.model.models import LLAMA4, MOE, tokens

CUTS = (1, 3, -2)  # after the token table, after two layers, before the norm


def args_of(**changes: object) -> ModelArgs:
    return ModelArgs.model_validate(LLAMA4 | changes)


def halves(args: ModelArgs, cut: int) -> tuple[LLM, LLM]:
    names = unit_names(args)
    return LLM(args, seed=3, units=names[:cut]), LLM(args, seed=3, units=names[cut:])


def through(first: LLM, second: LLM, inputs: TransformerInput, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, the sum of the routers' balance losses, and the logits of two halves."""
    one = first(inputs, return_hidden=True)
    two = second(inputs, x=one.hidden, labels=labels)
    balance = sum(part.balance_sum for part in (one, two) if part.balance_sum is not None)
    return two.loss_sum, torch.as_tensor(balance), second(inputs, x=one.hidden).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cut", CUTS)
def test_two_runs_of_units_are_the_model_bit_for_bit(cut: int, tied: bool) -> None:
    args = args_of(moe=MOE, tie_embeddings=tied)
    whole, inputs = LLM(args, seed=3), TransformerInput(tokens(2, 24))
    labels = tokens(2, 24, seed=9)
    expected = whole(inputs, labels=labels)
    loss, balance, logits = through(*halves(args, cut), inputs, labels)
    assert torch.equal(loss, expected.loss_sum) and torch.equal(logits, whole(inputs).logits)
    torch.testing.assert_close(balance, expected.balance_sum)  # summed in another order


@pytest.mark.parametrize("tied", [False, True])
def test_names_and_initial_values_stay_those_of_the_whole(tied: bool) -> None:
    args = args_of(moe=MOE, tie_embeddings=tied)
    whole = dict(LLM(args, seed=3).named_parameters())
    first, second = (dict(half.named_parameters()) for half in halves(args, 3))
    assert first.keys() | second.keys() == whole.keys()
    assert first.keys() & second.keys() == ({"tok_embeddings.weight"} if tied else set())
    assert all(torch.equal(value, whole[name]) for part in (first, second) for name, value in part.items())


def test_each_run_of_units_has_a_cache_of_its_own() -> None:
    args = args_of(moe=MOE)
    ids, whole = tokens(2, 24), Cache(args)
    model, (first, second) = LLM(args, seed=3), halves(args, 3)
    caches = Cache(args), Cache(args)
    for part in ids.split((16, 1, 7), dim=1):
        inputs = TransformerInput(part)
        x = first(inputs, cache=caches[0], return_hidden=True).hidden
        found = second(inputs, cache=caches[1], x=x).logits
        assert torch.equal(found, model(inputs, cache=whole).logits)
