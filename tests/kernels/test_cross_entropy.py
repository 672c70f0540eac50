"""The chunked loss equals F.cross_entropy, in chunks and in tiles, and never holds a long batch's logits."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llm.kernels import cross_entropy
from llm.kernels.cross_entropy import lm_loss_sum, token_hits, token_nll
from tests.model.models import VOCAB, llama4, tokens


@pytest.fixture(autouse=True, params=["tiles", "chunks"])
def small_chunks(request, monkeypatch):
    """Chunks of 7 tokens of the 40, tiles of 5 rows of the 31 of the vocabulary; chunks are what a GPU takes."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", {"cpu": 7 * 31})
    monkeypatch.setattr(cross_entropy, "MIN_CHUNK_TOKENS", 1)
    monkeypatch.setattr(cross_entropy, "BLOCK_ELEMENTS", 2 * 31)
    monkeypatch.setattr(cross_entropy, "TILED_TOKENS", (1, 7))
    monkeypatch.setattr(cross_entropy, "TILE_ELEMENTS", 7 * 5)
    if request.param == "chunks":
        monkeypatch.setattr(cross_entropy, "_tiles_suit", lambda hidden: False)


def problem(dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(2, 20, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(31, 16, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 31, (2, 20))
    labels[0, 3], labels[0, 4], labels[1, 5:13] = -100, -1, -100
    return hidden, weight, labels


def reference(hidden, weight, labels, reduction="sum"):
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten().clamp(min=-1), ignore_index=-1, reduction=reduction)


def test_loss_and_gradients_equal_cross_entropy():
    hidden, weight, labels = problem()
    ours, theirs = lm_loss_sum(hidden, weight, labels), reference(hidden, weight, labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for mine, reference_gradient in zip(
        *(torch.autograd.grad(loss / 30, (hidden, weight)) for loss in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(mine, reference_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_backward_is_the_derivative(softcap):
    hidden, weight, labels = problem(torch.float64)

    def loss(h, w):
        return lm_loss_sum(h[:, :5, :4], w[:, :4], labels[:, :5], softcap=softcap)

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_capped_logits_are_those_of_the_formula():
    hidden, weight, labels = problem()
    logits = 3.0 * torch.tanh(F.linear(hidden, weight) / 3.0)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten().clamp(min=-1), ignore_index=-1, reduction="none")
    torch.testing.assert_close(token_nll(hidden, weight, labels, softcap=3.0).flatten(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lm_loss_sum(hidden, weight, labels, softcap=3.0), expected.sum(), rtol=1e-6, atol=0)


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, labels = problem()
    lm_loss_sum(hidden, weight.detach(), labels).backward()
    assert hidden.grad is not None
    lm_loss_sum(hidden.detach(), weight, labels).backward()
    assert weight.grad is not None


def test_bf16_gradients_are_accumulated_in_float32():
    hidden, weight, labels = (x.detach() for x in problem(torch.bfloat16))
    hidden, labels = hidden.repeat(64, 1, 1), labels.repeat(64, 1)  # hundreds of chunks: bf16 sums would stall
    weight.requires_grad_()
    lm_loss_sum(hidden, weight, labels).backward()
    wide = weight.detach().float().requires_grad_()
    reference(hidden.float(), wide, labels).backward()
    error = (weight.grad.float() - wide.grad).norm() / wide.grad.norm()
    assert error < 2**-7  # one rounding to bf16 of the sum, and one of each chunk's


def test_without_targets_the_loss_is_zero_and_tied_to_the_graph():
    hidden, weight, labels = problem()
    loss = lm_loss_sum(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()


def test_no_gradient_is_computed_under_no_grad(monkeypatch):
    hidden, weight, labels = problem()
    monkeypatch.setattr(cross_entropy, "_accumulate", lambda *_, **__: pytest.fail("gradients under no_grad"))
    with torch.no_grad():
        torch.testing.assert_close(lm_loss_sum(hidden, weight, labels), reference(hidden, weight, labels).detach())


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.numel())
        return made


def test_only_a_chunk_of_logits_exists_at_a_time():
    hidden, weight, labels = (x.detach() for x in problem())
    hidden.requires_grad_()
    with Largest() as largest:
        lm_loss_sum(hidden[..., :1], weight[:, :1].contiguous(), labels).backward()
    assert largest.elements == max(7 * 31, hidden.numel())  # no two chunks' logits, and 40 * 31 of all


def test_token_nll_is_each_targets_loss():
    hidden, weight, labels = problem()
    nll = token_nll(hidden, weight, labels)
    expected = reference(hidden, weight, labels, reduction="none").view(2, 20)
    torch.testing.assert_close(nll, expected.detach(), rtol=1e-6, atol=1e-6)
    assert not nll.requires_grad and nll.dtype == torch.float32


@pytest.mark.parametrize("tied", [False, True])
def test_the_models_loss_equals_cross_entropy_of_its_logits(tied):
    model, ids = llama4(tie_embeddings=tied), tokens(2, 12)
    labels = tokens(2, 12, seed=2)
    labels[:, -1] = -100
    out = model(ids, labels=labels)
    out.loss_sum.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss = F.cross_entropy(model(ids).logits.view(-1, VOCAB), labels.view(-1), reduction="sum")
    loss.backward()
    assert out.n_targets == 22 and out.logits is None
    torch.testing.assert_close(out.loss_sum, loss, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(ours[name], parameter.grad, rtol=0, atol=1e-5 * scale, msg=name)


class OnlyRank:
    """A vocabulary cut over one rank."""

    first, largest, total = 0, 31, 31

    def gather(self, x):
        return x.unsqueeze(0)

    def join(self, logits):
        return logits


def test_a_label_that_no_share_of_the_vocabulary_has_is_refused():
    hidden, weight, labels = problem()
    torch.testing.assert_close(
        lm_loss_sum(hidden, weight, labels, OnlyRank()), lm_loss_sum(hidden, weight, labels), rtol=1e-6, atol=0
    )
    labels[1, 2] = 31
    for loss in (lm_loss_sum, token_nll):
        with pytest.raises(RuntimeError, match="a label is not below 31"):
            loss(hidden, weight, labels, OnlyRank())


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_extreme_logits_of_a_tile_neither_overflow_nor_vanish(softcap):
    """A row's highest logits differ by 1,000 between tiles, so that all of some tiles is 0 in float32."""
    hidden, weight, labels = problem()
    with torch.no_grad():
        weight[3::5] *= 300
        labels[0, 5] = (hidden[0, 5] @ weight.T).argmin()
    expected = capped_reference(hidden, weight, labels, softcap)
    ours = lm_loss_sum(hidden, weight, labels, softcap=softcap)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, expected)]
    for mine, reference_gradient in zip(*gradients, strict=True):
        # logits of 1,000s are rounded by 1e-4, and the products' order of sums decides how
        torch.testing.assert_close(mine, reference_gradient, rtol=1e-3, atol=1e-3)


def capped_reference(hidden, weight, labels, softcap):
    logits = cross_entropy.capped(F.linear(hidden, weight), softcap)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten().clamp(min=-1), ignore_index=-1, reduction="sum")


def test_a_label_beyond_the_vocabulary_is_refused():
    hidden, weight, labels = problem()
    labels[0, 0] = 31
    for loss in (lm_loss_sum, token_nll):
        with pytest.raises((RuntimeError, IndexError), match="31"):
            loss(hidden, weight, labels)


class Share:
    """One of two ranks' rows of the vocabulary; ranks are threads that meet in `gather`."""

    def __init__(self, rank, sizes, meeting, table):
        self.first, self.largest, self.total = sum(sizes[:rank]), max(sizes), sum(sizes)
        self.rank, self.meeting, self.table = rank, meeting, table

    def gather(self, x):
        self.table[self.rank] = x
        self.meeting.wait(10)
        found = torch.stack([self.table[rank] for rank in range(2)])
        self.meeting.wait(10)
        return found


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_two_shares_of_the_vocabulary_give_the_loss_of_the_whole(softcap):
    """Each share has several tiles, the last one narrower, and labels lie in all of them."""
    hidden, weight, labels = problem()
    expected = capped_reference(hidden, weight, labels, softcap)
    grad_hidden, grad_weight = torch.autograd.grad(expected, (hidden, weight))
    sizes, meeting, table = (17, 14), threading.Barrier(2), {}

    def rank(number, rows):
        x, w = hidden.detach().requires_grad_(), rows.detach().requires_grad_()
        loss = lm_loss_sum(x, w, labels, Share(number, sizes, meeting, table), softcap)
        return loss.detach(), *torch.autograd.grad(loss, (x, w))

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(rank, range(2), weight.split(sizes)))
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)  # sums of 40 tokens in another order
    for loss, _, _ in found:
        close(loss, expected.detach())
    close(found[0][1] + found[1][1], grad_hidden)
    close(torch.cat([found[0][2], found[1][2]]), grad_weight)


def test_a_hit_is_a_label_of_the_largest_logit_whether_the_vocabulary_is_whole_or_in_two_shares():
    hidden, weight, labels = problem()
    likeliest = F.linear(hidden, weight).argmax(-1)
    labels[:, ::3] = likeliest[:, ::3]
    labels[1, 5:13] = -100
    expected = likeliest == labels
    assert torch.equal(token_hits(hidden, weight, labels), expected) and 10 <= int(expected.sum()) < 30
    sizes, meeting, table = (17, 14), threading.Barrier(2), {}

    def rank(number, rows):
        return token_hits(hidden, rows, labels, Share(number, sizes, meeting, table))

    with ThreadPoolExecutor(2) as threads:
        assert all(torch.equal(found, expected) for found in threads.map(rank, range(2), weight.split(sizes)))
