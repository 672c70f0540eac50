"""Surgery of encoder-decoders: what keeps the function of a decoder keeps that of both sides."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm import LLM
from llm.args import ModelArgs, MoEArgs
from llm.datatypes import TransformerInput
from llm.surgery import deepen, enlarge_vocabulary, upcycle
from tools.inspection import model_line

ARGS = ModelArgs(dim=16, n_layers=2, encoder_layers=3, n_heads=2, vocab_size=23, ffn_hidden=24, init_std=0.3)
MOE = MoEArgs(n_experts=4, top_k=2, score="softmax", apply="output", renorm=True, shared=False)
INPUTS = TransformerInput(torch.arange(7)[None], source=TransformerInput(torch.arange(22, 12, -1)[None]))


def logits(model: LLM) -> torch.Tensor:
    found = model(INPUTS, inference=True).logits
    assert found is not None
    return found


def upcycled(before: LLM) -> tuple[ModelArgs, dict[str, torch.Tensor]]:
    return upcycle(before.args, before.state_dict(), MOE)


def deepened(before: LLM) -> tuple[ModelArgs, dict[str, torch.Tensor]]:
    return deepen(before.args, before.state_dict(), 4)


def enlarged(before: LLM) -> tuple[ModelArgs, dict[str, torch.Tensor]]:
    return enlarge_vocabulary(before.args, before.state_dict(), 31)


@pytest.mark.parametrize("operate", [upcycled, deepened, enlarged], ids=lambda operate: operate.__name__)
def test_the_function_of_both_sides_stays(operate: Callable[[LLM], tuple[ModelArgs, dict[str, Any]]]) -> None:
    before = LLM(ARGS, seed=1)
    args, state = operate(before)
    after = LLM(args)
    after.load_state_dict(state)
    torch.testing.assert_close(logits(after)[..., :23], logits(before), rtol=1e-5, atol=1e-5)  # sums in another order


def test_all_layers_of_both_sides_become_mixtures() -> None:
    args, state = upcycled(LLM(ARGS, seed=1))
    routers = {name for name in state if name.endswith("router.weight")}
    assert routers == {f"{spec.unit}.feed_forward.router.weight" for spec in args.all_specs()}


def test_the_line_of_a_model_has_its_encoder() -> None:
    assert (model_line(ARGS.model_dump(mode="json")) or "").startswith("an encoder of 3 layers, 2 layers, dim 16")
