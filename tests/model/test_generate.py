"""Generation: rows stand alone, stop alone, and sampling follows its distribution."""

import numpy as np
import pytest
import torch

from llm.generate import generate, sample
from tests.model.models import MOE, llama4, tokens

PROMPTS = [row[:n].tolist() for row, n in zip(tokens(4, 20), (5, 1, 20, 9), strict=True)]


def test_greedy_takes_the_most_likely_token_of_the_full_forward():
    model, text = llama4(moe=MOE), PROMPTS[0]
    (new,) = generate(model, [text], max_new_tokens=30)
    for i, token in enumerate(new):
        assert model(torch.tensor([text + new[:i]])).logits[0, -1].argmax() == token


@pytest.mark.parametrize("settings", [{}, dict(temperature=0.9, seed=3)], ids=["greedy", "sampled"])
def test_rows_do_not_influence_each_other(settings):
    model = llama4(moe=MOE)
    together = generate(model, PROMPTS, max_new_tokens=20, **settings)
    others = [prompt if i == 1 else prompt[::-1] for i, prompt in enumerate(PROMPTS)]
    assert generate(model, others, max_new_tokens=20, **settings)[1] == together[1]
    assert generate(model, PROMPTS[:1], max_new_tokens=20, **settings)[0] == together[0]


def test_a_row_ends_with_its_stop_token_and_the_others_go_on():
    model = llama4()
    free = generate(model, PROMPTS, max_new_tokens=16)
    stop = free[2][4]
    stopped = generate(model, PROMPTS, max_new_tokens=16, stop_ids={stop})
    for row, cut in zip(free, stopped, strict=True):
        assert cut == (row[: row.index(stop) + 1] if stop in row else row)
    assert len(stopped[2]) <= 5


def test_the_seed_decides():
    model = llama4()
    draws = [generate(model, PROMPTS[:1], max_new_tokens=20, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def frequencies(n=20_000, **settings):
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    chosen = sample(logits.expand(n, 4), (np.arange(n) + 0.5) / n, **({"temperature": 1.0} | settings))
    return np.bincount(chosen, minlength=4) / n


P = torch.tensor([1.0, 3.0, 2.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(top_k=None, top_p=None), P.softmax(0)),
        (dict(temperature=0.5, top_k=None, top_p=None), (2 * P).softmax(0)),
        (dict(top_k=2, top_p=None), torch.tensor([-torch.inf, 3, 2, -torch.inf]).softmax(0)),
        (dict(top_k=None, top_p=0.7), torch.tensor([-torch.inf, 3, 2, -torch.inf]).softmax(0)),
        (dict(top_k=3, top_p=0.3), torch.tensor([0.0, 1, 0, 0])),
    ],
)
def test_sampling_follows_the_cut_distribution(settings, expected):
    # evenly spread draws: off by at most one draw at each border
    np.testing.assert_allclose(frequencies(**settings), expected.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(prompts=[[1], []]), "at least one token"),
        (dict(prompts=[]), "at least one token"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(temperature=-1.0), "temperature=-1.0"),
        (dict(top_k=0, temperature=1.0), "top_k=0"),
        (dict(top_p=0.0, temperature=1.0), "top_p=0.0"),
        (dict(top_k=5), "need a temperature above 0"),
    ],
)
def test_impossible_settings_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        generate(llama4(), **(dict(prompts=[[1]], max_new_tokens=1) | changes))
