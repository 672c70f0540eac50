"""What the benchmark of hybrids says of memory is what caches hold, and its parts do what they are compared for."""

import pytest
import torch

from llm.datatypes import TransformerInput
from llm.errors import UserError
from llm.layers.routed import Routed
from llm.model import LLM
from tools.benchmarks import routed


@pytest.mark.parametrize("length", [1, 50])
@pytest.mark.parametrize("name", routed.MODELS)
def test_bytes_kept_of_a_text_are_those_of_the_formula(name: str, length: int) -> None:
    decoding, expected = routed.read(name, length)  # which stops where they differ
    assert decoding.cache.nbytes == expected > 0


@pytest.mark.parametrize(("every", "low", "high"), [(False, 0.05, 0.25), (True, 1.0, 1.0)])
def test_as_many_tokens_attend_as_are_said(every: bool, low: float, high: float) -> None:
    torch.manual_seed(0)
    model, length = LLM(routed.args_of("routed+none", 1, every)), 400
    ctx = model.context(TransformerInput(torch.zeros(1, length, dtype=torch.int64)))
    layer = model.layers[0].attention
    assert isinstance(layer, Routed)
    rate = layer._attended(torch.randn(1, length, routed.DIM), ctx)[1].float().mean().item()
    assert low <= rate <= high  # 5 standard deviations of 400 draws are 0.09


def test_flags_that_mean_nothing_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="--contexts=1k"):
        routed.benchmark(contexts="1k")
    with pytest.raises(UserError, match="--only=both"):
        routed.benchmark(only="both")
