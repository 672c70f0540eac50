"""Rows that run through a model together: the logits of each are those that it has alone, to the bit."""

import random

import numpy as np
import pytest
import torch

from llm import LLM
from llm.evaluate.running import ApartRows, Beginning
from tests.evaluate.replicas import replica_of
from tests.generation.models import with_tokenizer
from tests.model.models import MOE

KINDS = {
    "chunks and NoPE": dict(),
    "moe": dict(moe=MOE | {"top_k": 2}),
    "window": dict(sliding_window=6, layer_pattern=["attn:window", "attn:full"], attention_chunk_size=None),
    "softcap": dict(attn_softcap=0.5, tie_embeddings=True),
    "one kv head": dict(n_kv_heads=1, tie_embeddings=True),
}


def rows_of(n: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    lengths = sorted((draw.randrange(1, 45) for _ in range(n)), reverse=True)
    return [[draw.randrange(256) for _ in range(length)] for length in lengths]


def logits_of(model: LLM, prompts: list[list[int]], steps: int, leave: dict[int, int]) -> list[list[torch.Tensor]]:
    """Of each prompt, after it and after each of so many tokens. leave: after which step each row leaves; another like
    it then joins."""
    rows = ApartRows(replica_of(model))
    found = [list(part[None]) for part in rows.join([Beginning(prompt) for prompt in prompts], 64)]
    there = list(range(len(prompts)))
    for step in range(steps):
        newest = np.array([(7 * step + len(prompts[row])) % 256 for row in there])
        positions = np.array([len(prompts[row]) + step for row in there])
        for row, logits in zip(there, rows.step(newest, positions), strict=True):
            found[row].append(logits)
        going = [place for place, row in enumerate(there) if leave.get(row) != step]
        if len(going) < len(there):
            rows.keep(going)
            there = [there[place] for place in going]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_of_a_row_are_the_same_bits_whatever_runs_beside_it(kind, dtype):
    model = with_tokenizer(**KINDS[kind]).to(dtype)
    prompts = rows_of(41, 0)
    together = logits_of(model, prompts, 9, {3: 2, 4: 2, 20: 5, 0: 7})
    for row in (1, 4, 20, 39):
        (alone,) = logits_of(model, [prompts[row]], 9, {})
        for step, logits in enumerate(together[row]):
            assert torch.equal(logits, alone[step]), (row, step)


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_of_a_forward_of_the_whole_text(kind):
    model = with_tokenizer(**KINDS[kind])
    prompts = rows_of(5, 1)
    found = logits_of(model, prompts, 8, {})
    for prompt, logits in zip(prompts, found, strict=True):
        new = [(7 * step + len(prompt)) % 256 for step in range(8)]
        with torch.no_grad():
            whole = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 :]
        # float32 sums in another order; logits are about 3
        torch.testing.assert_close(torch.stack(logits), whole, rtol=1e-5, atol=1e-5)


def test_rows_that_join_later_are_as_those_that_began():
    model = with_tokenizer()
    first, later = rows_of(9, 2), rows_of(6, 3)
    expected = logits_of(model, later, 3, {})
    rows = ApartRows(replica_of(model))
    rows.join([Beginning(prompt) for prompt in first], 64)
    positions = np.array([len(prompt) for prompt in first])
    for step in range(4):
        rows.step(np.full(9 - step, 5), positions[: 9 - step] + step)
        rows.keep(range(8 - step))
    joined = rows.join([Beginning(prompt) for prompt in later], 64)
    assert all(torch.equal(logits, row[0]) for logits, row in zip(joined, expected, strict=True))
    for step in range(3):
        newest = [(7 * step + len(prompt)) % 256 for prompt in later]
        lengths = [len(prompt) + step for prompt in later]
        logits_BV = rows.step(np.array([5] * 5 + newest), np.array([*(positions[:5] + 4 + step), *lengths]))
        assert all(torch.equal(logits, row[step + 1]) for logits, row in zip(logits_BV[5:], expected, strict=True))


def test_rows_at_one_position_are_as_a_row_alone():
    model = with_tokenizer(attn_temperature_tuning=False)
    prompts = [[row, 3, 5] for row in range(32)]
    together, (alone,) = logits_of(model, prompts, 5, {}), logits_of(model, prompts[9:10], 5, {})
    assert all(torch.equal(*pair) for pair in zip(together[9], alone, strict=True))


def test_rows_of_one_prompt_that_is_computed_once_are_as_rows_of_their_own():
    model = with_tokenizer()
    prompts = rows_of(4, 6)
    expected = logits_of(model, prompts, 6, {})
    rows = ApartRows(replica_of(model))
    counts = [1, 3, 1, 2]
    of_row = np.repeat(np.arange(4), counts)
    joined = rows.join([Beginning(prompt, rows=n) for prompt, n in zip(prompts, counts, strict=True)], 64)
    assert all(torch.equal(logits, expected[of][0]) for logits, of in zip(joined, of_row, strict=True))
    there = list(range(7))
    for step in range(6):
        lengths = np.array([len(prompts[of_row[row]]) for row in there])
        for row, logits in zip(there, rows.step((7 * step + lengths) % 256, lengths + step), strict=True):
            assert torch.equal(logits, expected[of_row[row]][step + 1])
        if step == 2:
            rows.keep([0, 2, 3, 5, 6])
            there = [0, 2, 3, 5, 6]


@pytest.mark.parametrize("leaving", [range(1, 20, 2), range(3, 30), [5]], ids=["every second", "many", "one"])
def test_rows_go_on_as_they_are_alone_where_others_between_them_have_left(leaving):
    model = with_tokenizer()
    prompts = [[row % 256, 3, 5, 7] for row in range(32)]
    together = logits_of(model, prompts, 5, dict.fromkeys(leaving, 1))
    for row in (0, 2, 30, 31):
        (alone,) = logits_of(model, [prompts[row]], 5, {})
        assert all(torch.equal(*pair) for pair in zip(together[row], alone, strict=True))
