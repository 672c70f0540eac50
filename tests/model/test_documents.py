"""Who may influence whom: the past of the same document, and nobody else, to the last bit."""

import pytest
import torch

from llm.datatypes import TransformerInput
from tests.model.models import MOE, VOCAB, llama4, tokens

FEED_FORWARDS = {
    "dense": None,
    "moe top 1": MOE,
    "moe top 2": MOE | {"top_k": 2, "score": "softmax", "apply": "output", "renorm": True},
    "many experts": MOE | {"n_experts": 16},
}


@pytest.mark.parametrize("moe", FEED_FORWARDS.values(), ids=FEED_FORWARDS)
@pytest.mark.parametrize("boundary", [1, 7, 23])
def test_document_b_is_blind_to_document_a(moe, boundary):
    model = llama4(moe=moe)
    cu_seqlens = torch.tensor([0, boundary, 45, 50])
    for seed in range(4):
        ids = tokens(1, 50)
        before = model(TransformerInput(ids, cu_seqlens=cu_seqlens)).logits
        ids[:, :boundary] = tokens(1, boundary, seed=100 + seed)
        after = model(TransformerInput(ids, cu_seqlens=cu_seqlens)).logits
        assert torch.equal(before[:, boundary:], after[:, boundary:])


@pytest.mark.parametrize("moe", FEED_FORWARDS.values(), ids=FEED_FORWARDS)
def test_the_past_is_blind_to_the_future(moe):
    model, ids = llama4(moe=moe), tokens(2, 30)
    before = model(ids).logits
    for position in (1, 8, 17, 29):
        changed = ids.clone()
        changed[:, position:] = (changed[:, position:] + 1) % VOCAB
        assert torch.equal(before[:, :position], model(changed).logits[:, :position])


def test_a_token_sees_its_own_document():
    model, ids = llama4(), tokens(1, 20)
    changed = ids.clone()
    changed[0, 3] = (changed[0, 3] + 1) % VOCAB
    difference = (model(ids).logits - model(changed).logits).abs().amax(-1)[0]
    assert (difference[3:] > 0).all()  # the NoPE layer is global


def test_a_packed_document_has_the_logits_it_has_alone():
    model, ids = llama4(moe=MOE), tokens(1, 50)
    packed = model(TransformerInput(ids, cu_seqlens=torch.tensor([0, 11, 34, 50]))).logits
    for low, high in ((0, 11), (11, 34), (34, 50)):
        # float32 round-off of products over other row counts; logits are about 3
        torch.testing.assert_close(packed[:, low:high], model(ids[:, low:high]).logits, rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing():
    model, ids = llama4(), tokens(1, 20)
    padded = torch.cat([tokens(1, 6, seed=9), ids], dim=1)
    positions = torch.cat([torch.full((6,), -1), torch.arange(20)])
    logits = model(TransformerInput(padded, tokens_position=positions)).logits
    torch.testing.assert_close(logits[:, 6:], model(ids).logits, rtol=1e-5, atol=1e-5)
    assert logits.isfinite().all()
