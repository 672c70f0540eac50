"""What falls to whom, and what is said of it."""

import pytest

from llm.evaluate.requests import Continue, Score
from llm.evaluate.runner import Runner, dealt
from llm.tokenizer import ByteTokenizer
from tests.evaluate.replicas import pictures_of, replica_of
from tests.generation.models import shared_model


def test_everything_is_dealt_once_and_no_rank_has_much_more_than_another():
    costs = {thing: 1 + thing * 7919 % 101 for thing in range(200)}
    ranks = dealt(costs, 3)
    assert sorted(thing for mine in ranks for thing in mine) == sorted(costs)
    loads = [sum(costs[thing] for thing in mine) for mine in ranks]
    assert max(loads) - min(loads) <= max(costs.values())


def test_both_kinds_are_answered_but_for_what_is_done():
    model, tokenizer = shared_model(), ByteTokenizer()
    requests = [Score((256, 65 + i), (66, 67)) if i % 2 else Continue((256, 65 + i), 3) for i in range(10)]
    done = frozenset({0, 3})
    runner = Runner(replica_of(model), tokenizer, 64, {tokenizer.eos_id}, pictures_of(model))
    found = [index for answers in runner.answers(requests, done) for index, _ in answers]
    assert sorted(found) == sorted(set(range(10)) - done)
    statistics = runner.statistics()
    assert statistics["requests"] == 8 and statistics["imbalance"] == pytest.approx(1)
    assert 0 < statistics["padding"] < 1
