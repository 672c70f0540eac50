"""Answers to Score requests: those of the plain model, whatever is computed beside them."""

import random

import pytest
import torch

from llm import LLM
from llm.evaluate.requests import NonFinite, Score, Scored
from llm.evaluate.scoring import Scorer, score
from tests.evaluate.replicas import pictures_of, replica_of
from tests.model.models import MOE, VOCAB, llama4

KINDS = {
    "chunk": dict(),
    "dense": dict(attention_chunk_size=None),
    "moe": dict(moe=MOE | {"top_k": 2}),
    "window": dict(sliding_window=6, layer_pattern=["attn:window", "attn:full"], attention_chunk_size=None),
    "softcap": dict(attn_softcap=0.5, logit_softcap=3.0, tie_embeddings=True),
}
LENGTHS = (1, 2, 3, 5, 8, 9, 16, 21, 33, 64)


def requests_of(n: int, seed: int = 0) -> list[Score]:
    """Lone ones, and choices that follow one context; the second half of all after the same examples."""
    draw = random.Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(VOCAB) for _ in range(length))

    found: list[Score] = []
    examples = ids(50)
    while len(found) < n:
        context = (examples if 2 * len(found) > n else ()) + ids(draw.choice(LENGTHS))
        found += [Score(context, ids(draw.choice(LENGTHS[:6]))) for _ in range(draw.choice((1, 4)))]
    return found[:n]


def answers(model: LLM, requests: list[Score], batch_tokens: int = 500) -> list[Scored]:
    found = dict(score(replica_of(model), requests, batch_tokens, pictures_of(model)))
    return [found[index] for index in range(len(requests))]


@torch.no_grad()
def plain(model: LLM, request: Score) -> Scored:
    """By the logits of the request alone, summed in float64."""
    ids = torch.tensor([[*request.context, *request.target]])
    n = len(request.target)
    logits = model(ids[:, :-1]).logits[0, -n:].double()
    target = ids[0, -n:]
    logprob = logits.log_softmax(-1).gather(-1, target[:, None]).sum()
    return Scored(float(logprob), bool((logits.argmax(-1) == target).all()))


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_that_of_the_plain_model(kind):
    model, requests = llama4(**KINDS[kind]), requests_of(30)
    greedy = [Score(r.context, (int(model(torch.tensor([r.context])).logits[0, -1].argmax()),)) for r in requests[:5]]
    for request, found in zip([*requests, *greedy], answers(model, [*requests, *greedy]), strict=True):
        expected = plain(model, request)
        # float32 logits of two orders of the same sums
        assert found.logprob == pytest.approx(expected.logprob, rel=5e-6)
        assert found.greedy == expected.greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_answer_depends_on_the_size_of_a_batch(kind, dtype):
    model, requests = llama4(**KINDS[kind]).to(dtype), requests_of(40)
    expected = answers(model, requests)
    for batch_tokens in (1, 100, 10**6):
        assert answers(model, requests, batch_tokens) == expected


def test_what_requests_have_in_common_is_computed_once():
    draw = random.Random(0)
    contexts = [tuple(draw.randrange(VOCAB) for _ in range(30)) for _ in range(10)]
    requests = [Score(context, (draw.randrange(VOCAB), 1, choice)) for context in contexts for choice in range(4)]
    model = llama4()
    scorer = Scorer(replica_of(model), dict(enumerate(requests)), pictures_of(model))
    for limit in (1, 10**6):
        batches = scorer.batches(scorer.families(range(40), limit), limit)
        assert sorted(index for batch in batches for index in batch.indices) == list(range(40))
    assert sum(batch.tokens for batch in batches) == 10 * (30 + 4 * 2)


def test_answers_that_are_there_already_change_no_other():
    model, requests = llama4(), requests_of(40)
    expected = answers(model, requests)
    scorer = Scorer(replica_of(model), dict(enumerate(requests)), pictures_of(model))
    left = list(range(1, 40, 3))
    found = dict(pair for some in scorer.answers(scorer.batches(scorer.families(left, 200), 200)) for pair in some)
    assert found == {index: expected[index] for index in left}


def test_logits_that_are_not_finite_are_refused():
    model, requests = llama4(tie_embeddings=False), [Score((1, 2), (3,)), Score((4,), (5, 6, 7))]
    with torch.no_grad():
        model.tok_embeddings.weight[6] = torch.nan
    with pytest.raises(NonFinite, match="of 3 that are scored") as caught:
        answers(model, requests, batch_tokens=1)
    assert caught.value.index == 1


def test_a_request_without_an_answer_is_refused():
    model = llama4(max_seq_len=8)
    for request, reason in (
        (Score((), (1,)), "at least one token"),
        (Score((1,), ()), "at least one token"),
        (Score((1,) * 8, (1, 2)), "more than the context of 8"),
        (Score((1,), (VOCAB,)), "must lie between 0 and"),
    ):
        with pytest.raises(ValueError, match=reason):
            answers(model, [request])
    answers(model, [Score((1,) * 8, (1,))])
