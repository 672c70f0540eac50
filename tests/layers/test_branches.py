"""Documents that go on from others: what they are after them, computed once."""

from itertools import accumulate

import pytest
import torch

from llm.datatypes import TransformerInput
from tests.model.models import llama4, tokens

LENGTHS = (20, 7, 5, 12, 30, 1, 9)
PARENTS = (-1, -1, 0, 0, 3, 3, -1)
KINDS = {
    "chunk": dict(),
    "window": dict(sliding_window=6, layer_pattern=["attn:window", "attn:full"], attention_chunk_size=None),
    "softcap": dict(attn_softcap=0.5),
}


def branched(lengths: tuple[int, ...] = LENGTHS, parents: tuple[int, ...] = PARENTS) -> TransformerInput:
    bounds = torch.tensor([0, *accumulate(lengths)])
    return TransformerInput(tokens(1, sum(lengths)), cu_seqlens=bounds, parents=torch.tensor(parents))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_document_goes_on_from_its_parent_as_if_it_were_one(kind):
    model, inputs = llama4(**KINDS[kind]), branched()
    documents = inputs.tokens[0].split(LENGTHS)
    for number, logits in enumerate(model(inputs).logits[0].split(LENGTHS)):
        whole, parent = documents[number], PARENTS[number]
        while parent >= 0:
            whole, parent = torch.cat([documents[parent], whole]), PARENTS[parent]
        # float32 sums in another order
        torch.testing.assert_close(logits, model(whole[None]).logits[0, -len(logits) :], rtol=1e-4, atol=2e-5)


def test_parents_that_mean_nothing_are_refused():
    model = llama4()
    for inputs, reason in (
        (branched(parents=(-1, -1, 2, 0, 3, 3, -1)), "one that comes before it"),
        (branched(parents=(-1,)), "one that comes before it"),
        (TransformerInput(tokens(1, 4), parents=torch.tensor([-1])), "that cu_seqlens bounds"),
    ):
        with pytest.raises(ValueError, match=reason):
            model(inputs)
    dynamic = llama4(rope_scaling=dict(kind="dynamic", factor=2.0, original_max_position=16))
    with pytest.raises(ValueError, match="not for dynamic RoPE"):
        dynamic(branched())
