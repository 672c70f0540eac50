"""The rotation of heads: its derivative, distances, and the two layouts."""

import pytest
import torch
from torch.autograd import gradcheck

from llm.kernels.rotate import rotate
from llm.layers.rope import inverse_frequencies, rotation


@pytest.mark.parametrize("interleaved", [True, False])
def test_the_rotations_own_backward_is_its_derivative(interleaved):
    turn = rotation(torch.tensor([[0, 3, 9]]), inverse_frequencies(8, 100.0, None)).to(torch.complex128)
    x = torch.randn(2, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: rotate(x, turn, interleaved), (x,))


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_scores_depend_on_the_distance_only(interleaved):
    frequency = inverse_frequencies(16, 10000.0, None)
    q, k = torch.randn(2, 1, 1, 1, 16)

    def score(i, j):
        return (
            rotate(q, rotation(torch.tensor([[i]]), frequency), interleaved)
            * rotate(k, rotation(torch.tensor([[j]]), frequency), interleaved)
        ).sum()

    torch.testing.assert_close(score(9, 2), score(109, 102), rtol=1e-4, atol=1e-4)  # float32 angles of about 100


def test_the_two_layouts_are_one_rotation_of_permuted_heads():
    turn = rotation(torch.arange(7)[None], inverse_frequencies(8, 100.0, None))
    x = torch.randn(2, 7, 3, 8)
    half_of_pairs = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    assert torch.equal(rotate(x, turn, True)[..., half_of_pairs], rotate(x[..., half_of_pairs], turn, False))
