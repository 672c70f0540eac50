"""Which token a draw is: by the definition, whichever way is taken to find it."""

import numpy as np
import pytest
import torch

from llm.generation.sampling import sample


def by_definition(
    logits_V: torch.Tensor, uniform: float, temperature: float, top_k: int | None, top_p: float | None
) -> int:
    """Tokens in falling order of their logits, of equal ones the lower id first; the one in whose part of the
    cumulative probability the number falls."""
    order = sorted(range(len(logits_V)), key=lambda token: (-float(logits_V[token]), token))[:top_k]
    p = (logits_V.double()[order] / temperature).softmax(-1)
    if top_p is not None:
        before = p.cumsum(-1) - p
        p = torch.where(before > top_p, 0.0, p)
    return order[int((p.cumsum(-1) <= uniform * p.sum()).sum())]


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (5, None), (5000, None), (None, 0.8), (40, 0.5)])
@pytest.mark.parametrize("logits", ["even", "steep", "tied", "equal"])
def test_a_draw_is_the_token_that_the_definition_says(logits, top_k, top_p):
    draw, n = np.random.default_rng(0), 300
    values_BV = torch.from_numpy(draw.normal(size=(64, n))).float()
    values_BV = {"even": values_BV, "steep": values_BV * 40, "tied": (2 * values_BV).round(), "equal": values_BV * 0}[
        logits
    ]
    uniform_B = draw.random(64)
    for temperature in (0.3, 1.0, 2.5):
        found = sample(values_BV, uniform_B, temperature, top_k, top_p)
        expected = [
            by_definition(row, number, temperature, top_k, top_p)
            for row, number in zip(values_BV, uniform_B, strict=True)
        ]
        assert found.tolist() == expected


def test_the_largest_and_the_smallest_number_are_tokens():
    logits_BV = torch.tensor([[0.0, -1.0, -80.0]]).repeat(2, 1)
    numbers = np.array([0.0, np.nextafter(1.0, 0.0)])
    assert sample(logits_BV, numbers, 1.0, None, None).tolist() == [0, 1]


def test_no_draw_depends_on_other_rows():
    draw = np.random.default_rng(1)
    logits_BV, numbers = torch.from_numpy(draw.normal(size=(33, 4099))).float(), draw.random(33)
    together = sample(logits_BV, numbers, 1.0, None, None)
    assert [int(sample(logits_BV[i : i + 1], numbers[i : i + 1], 1.0, None, None)[0]) for i in range(33)] == list(
        together
    )
