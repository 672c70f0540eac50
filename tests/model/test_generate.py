"""Generation: rows stand alone, stop alone, and sampling follows its distribution."""

import numpy as np
import pytest
import torch

from llm.generate import generate, sample, stream
from llm.generation.sampling import NonFiniteLogits, Sampling, penalised
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
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(temperature=float("inf")), "temperature=inf"),
        (dict(top_p=float("nan"), temperature=1.0), "top_p=nan"),
        (dict(top_p=1.5, temperature=1.0), "top_p=1.5"),
        (dict(repetition_penalty=0.0), "repetition_penalty=0.0"),
        (dict(repetition_penalty=float("nan")), "repetition_penalty=nan"),
        (dict(seed=-1), "seed=-1"),
        (dict(seed=2**63), "seed=9223372036854775808"),
    ],
)
def test_impossible_settings_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        generate(llama4(), **(dict(prompts=[[1]], max_new_tokens=1) | changes))


class Scripted:
    """A decoder whose logits are given, step by step."""

    def __init__(self, *steps):
        self.steps, self.made, self.rows = [torch.tensor(step) for step in steps], 0, None

    def logits(self, tokens, positions, images=None):
        self.rows = list(range(len(tokens))) if self.rows is None else self.rows
        self.made += 1
        return self.steps[self.made - 1][self.rows]

    def keep(self, rows):
        self.rows = [self.rows[i] for i in rows]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_not_finite_are_refused_by_row_and_step(bad, temperature):
    good = [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    # row 1 ends at once, so that what is row 1 of the decoder afterwards is row 2 of the prompts
    decoder = Scripted(good, [[0.0, 1.0], [0.0, 0.0], [bad, 1.0]])
    made = stream(decoder, [[1], [1], [1]], Sampling(temperature), max_new_tokens=[3, 1, 3])
    tokens_made = [next(made) for _ in range(3)]
    assert [row for row, _ in tokens_made] == [0, 1, 2]
    with pytest.raises(NonFiniteLogits, match="prompt row 2, new token 2: 1 of 2 logits") as raised:
        next(made)
    assert isinstance(raised.value, FloatingPointError)


def test_a_token_comes_before_the_next_forward():
    decoder = Scripted(*[[[0.0, 1.0]]] * 3)
    for n, _ in enumerate(stream(decoder, [[1]], Sampling(), max_new_tokens=3), 1):
        assert decoder.made == n


def test_each_row_ends_at_its_own_limit():
    decoder = Scripted(*[[[0.0, 1.0]] * 3] * 4)
    rows = [row for row, _ in stream(decoder, [[1], [1], [1]], Sampling(), max_new_tokens=[2, 4, 1])]
    assert [rows.count(row) for row in range(3)] == [2, 4, 1]


@pytest.mark.parametrize("temperature", [1e-320, 1e-300, 1e-9])
def test_the_smallest_temperatures_are_greedy(temperature):
    model = llama4()
    greedy = generate(model, PROMPTS, max_new_tokens=8)
    assert generate(model, PROMPTS, max_new_tokens=8, temperature=temperature) == greedy


@pytest.mark.parametrize(
    "settings", [{}, dict(temperature=5.0), dict(temperature=2.0, repetition_penalty=1.3)], ids=str
)
def test_ids_that_the_tokenizer_does_not_know_are_never_chosen(settings):
    model = llama4(tie_embeddings=False)
    with torch.no_grad():
        model.output.weight[90:] *= 20  # without the limit they would be chosen nearly always
    free, cut = (generate(model, [p for p in PROMPTS], max_new_tokens=20, n_ids=n, **settings) for n in (None, 90))
    assert any(token >= 90 for row in free for token in row)
    assert all(token < 90 for row in cut for token in row)


def test_the_repetition_penalty_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    draw = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(3, 20, generator=draw), torch.randint(0, 20, (3, 7), generator=draw)
    seen = torch.zeros(3, 20, dtype=torch.bool).scatter_(1, ids, True)
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone())
    assert torch.equal(penalised(logits, seen, 1.7), expected)


def test_the_repetition_penalty_counts_prompt_and_continuation_of_each_row():
    model = llama4()
    together = generate(model, PROMPTS, max_new_tokens=12, repetition_penalty=1.4, stop_ids={3, 7, 50})
    for prompt, new in zip(PROMPTS, together, strict=True):
        for i, token in enumerate(new):
            text = prompt + new[:i]
            seen = torch.zeros(1, 97, dtype=torch.bool)
            seen[0, text] = True
            logits = model(torch.tensor([text])).logits[:, -1]
            assert penalised(logits, seen, 1.4).argmax() == token
    assert together != generate(model, PROMPTS, max_new_tokens=12, stop_ids={3, 7, 50})


def test_a_rows_draws_depend_on_its_key_alone():
    model = llama4()
    settings = Sampling(temperature=1.0, seed=3)
    found = {}
    for prompts, keys in (([PROMPTS[0]], ["7"]), (PROMPTS[::-1], ["0", "1", "2", "7"])):
        made = list(stream(model, prompts, settings, max_new_tokens=10, keys=keys))
        found[len(prompts)] = [token for row, token in made if row == len(prompts) - 1]
    assert found[1] == found[4]
