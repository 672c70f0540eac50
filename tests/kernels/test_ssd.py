"""The recurrence in chunks against itself, one token after the other, in float64."""

import pytest
import torch
from torch import Tensor

from llm.kernels.short_conv import short_conv
from llm.kernels.ssd import ssd, ssd_step

ROWS, LENGTH, HEADS, WIDTH, STATE = 2, 50, 4, 3, 5


def inputs(groups: int, dtype: torch.dtype = torch.float64, length: int = LENGTH) -> list[Tensor]:
    """x, dt, a, B, C and a state before the first token."""
    torch.manual_seed(groups)
    x = torch.randn(ROWS, length, HEADS, WIDTH)
    dt, a = torch.rand(ROWS, length, HEADS), -4 * torch.rand(HEADS)
    b, c = torch.randn(2, ROWS, length, groups, STATE)
    state = torch.randn(ROWS, HEADS, WIDTH, STATE)
    return [y.to(dtype).requires_grad_() for y in (x, dt, a, b, c, state)]


def documents(length: int = LENGTH) -> Tensor:
    """Rows whose documents begin within chunks, at their borders, and one token after another."""
    found = torch.zeros(ROWS, length, dtype=torch.int64)
    for row, first in ((0, 13), (0, 14), (0, 32), (1, 16), (1, 48)):
        found[row, first:] += 1
    return found


def token_by_token(given: list[Tensor], documents_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x, dt, a, b, c, state = given
    said = []
    for t in range(x.shape[1]):
        if documents_BT is not None and t:
            state = state * (documents_BT[:, t] == documents_BT[:, t - 1])[:, None, None, None]
        y, state = ssd_step(x[:, t], dt[:, t], a, b[:, t], c[:, t], state)
        said.append(y)
    return torch.stack(said, 1), state


def worst(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("chunk", [1, 7, 16, 64, LENGTH])
def test_chunks_of_any_length_say_what_the_recurrence_says_and_so_do_their_gradients(chunk, groups, packed):
    given, documents_BT = inputs(groups), documents() if packed else None
    *firsts, state = given
    expected, found = token_by_token(given, documents_BT), ssd(*firsts, documents_BT, state, chunk)
    weights = [torch.randn_like(y) for y in expected]
    gradients = [
        torch.autograd.grad(sum((y * w).sum() for y, w in zip(made, weights, strict=True)), given)
        for made in (found, expected)
    ]
    # float64; sums of up to 64 terms in another order
    assert worst(tuple(found), expected) < 1e-12
    assert worst(*gradients) < 1e-12


def test_float32_loses_little_even_where_decays_are_small_and_chunks_long():
    exact = inputs(1, length=300)
    with torch.no_grad():
        exact[1].mul_(0.01)
    rounded = [y.detach().float() for y in exact]
    expected = token_by_token(exact)
    for chunk in (16, 64, 256):
        # 1e-5 of the largest value: a few hundred roundings of 6e-8
        assert worst(tuple(ssd(*rounded[:5], None, rounded[5], chunk)), expected) < 1e-5


def test_gradients_are_those_of_differences():
    given = [y[:, :5] if y.dim() > 2 and y.shape[1] == LENGTH else y for y in inputs(2)]
    leaves = [y.detach().clone().requires_grad_() for y in given]
    torch.autograd.gradcheck(lambda *z: ssd(*z[:5], documents()[:, 12:17], z[5], chunk=3), leaves)
    x, weight, bias = leaves[0].flatten(2), torch.randn(12, 4), torch.randn(12)
    conv = [y.detach().double().requires_grad_() for y in (x, weight, bias)]
    torch.autograd.gradcheck(lambda *z: short_conv(*z, documents()[:, 12:17]), conv)


def test_without_a_time_step_a_token_changes_nothing():
    given = inputs(1)
    with torch.no_grad():
        given[1][:, 20:30] = 0
    x, dt, a, b, c, state = given
    without = [torch.cat([y[:, :20], y[:, 30:]], 1) for y in (x, dt, b, c)]
    said, after = ssd(x, dt, a, b, c, None, state, 16)
    expected, expected_after = ssd(without[0], without[1], a, without[2], without[3], None, state, 16)
    assert worst((torch.cat([said[:, :20], said[:, 30:]], 1), after), (expected, expected_after)) < 1e-12


def test_the_short_convolution_is_a_library_s_on_each_document_by_itself():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 50, 6).double(), torch.randn(6, 4).double(), torch.randn(6).double()
    found = short_conv(x, weight, bias, documents())
    for row in range(2):
        for number in documents()[row].unique():
            own = documents()[row] == number
            padded = torch.nn.functional.pad(x[row, own].T[None], (3, 0))
            expected = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=6)[0].T
            torch.testing.assert_close(found[row, own], torch.nn.functional.silu(expected))
    parts = short_conv(x[:, :9], weight, bias), short_conv(x[:, 9:], weight, bias, None, x[:, 6:9])
    torch.testing.assert_close(torch.cat(parts, 1), short_conv(x, weight, bias))


@pytest.mark.full
def test_pieces_of_a_view_of_more_than_2_to_the_31_elements_say_what_a_constant_input_leads_to():
    """The view repeats one token, so it takes no memory; a state that goes on from piece to piece has a closed form."""
    heads, width, state, piece = 2, 512, 4, 1 << 15
    length = (1 << 31) // (heads * width) + piece + 5
    torch.manual_seed(0)
    x_1HP, bc = torch.randn(1, 1, heads, width), torch.randn(2, 1, 1, 1, state)
    x_BTHP, (b_BTGN, c_BTGN) = x_1HP.expand(1, length, -1, -1), bc.expand(-1, -1, length, -1, -1)
    assert x_BTHP.numel() > 1 << 31 and x_BTHP.stride(1) == 0
    dt_BTH, a_H = torch.tensor([0.5, 0.01]).expand(1, length, -1), torch.tensor([-1.0, -0.5])
    decay_H = (dt_BTH[0, 0] * a_H).double().exp()
    went_on = None
    for first in range(0, length, piece):
        y, went_on = ssd(*(z[:, first : first + piece] for z in (x_BTHP, dt_BTH)), a_H,
                         *(z[:, first : first + piece] for z in (b_BTGN, c_BTGN)), None, went_on)  # fmt: skip
        n = torch.arange(first, first + y.shape[1]).double()[:, None] + 1
        sums_TH = dt_BTH[0, 0] * (1 - decay_H**n) / (1 - decay_H)  # of what was written, as the state keeps it
        said_TH = sums_TH * (bc[0] * bc[1]).sum().double()
        expected = said_TH[..., None] * x_1HP[0].double()
        assert ((y[0] - expected).abs().max() / expected.abs().max()).item() < 1e-5
