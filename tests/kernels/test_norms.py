"""RMS norms against their formulas, values and gradients."""

import pytest
import torch
from torch.autograd import gradcheck

from llm.kernels.norms import rms_normalise, rms_normalise_wide


@pytest.mark.parametrize("weighted", [True, False])
def test_the_norms_own_backward_is_its_derivative(weighted):
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True) if weighted else None
    assert gradcheck(lambda x, w: rms_normalise(x, 1e-3, w), (x, weight))


def test_the_norm_of_all_heads_has_its_derivative():
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, w: rms_normalise_wide(x, 1e-3, w), (x, weight))


class OtherRank:
    """The second of two ranks: what it has of whatever is averaged next."""

    def __init__(self, has: torch.Tensor) -> None:
        self.has = has

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.has) / 2


def test_a_norm_cut_in_two_is_the_norm():
    """Each half makes its part of values and gradients, given the other's mean square and mean gradient."""
    torch.manual_seed(0)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(12, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(5, 12, dtype=torch.float64)
    whole = rms_normalise_wide(x, 1e-3, weight)
    whole.backward(grad)
    unit = (whole / weight).detach()
    for mine, others in ((slice(0, 6), slice(6, 12)), (slice(6, 12), slice(0, 6))):
        part, part_weight = (t.detach()[..., mine].clone().requires_grad_() for t in (x, weight))
        other = OtherRank(x.detach()[:, others].square().mean(-1, keepdim=True))
        y = rms_normalise_wide(part, 1e-3, part_weight, other.mean)
        other.has = (grad * weight.detach() * unit)[:, others].mean(-1, keepdim=True)
        y.backward(grad[:, mine])
        torch.testing.assert_close(y, whole[:, mine])
        torch.testing.assert_close(part.grad, x.grad[:, mine])
        torch.testing.assert_close(part_weight.grad, weight.grad[mine])
