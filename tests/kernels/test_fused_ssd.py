"""What is asked of mamba_ssm, and what is refused. Its place is taken by a function of the same signature that computes
token by token, as its kernels run on GPUs alone (tests/gpu/test_fused_ssd.py).
"""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from llm import LLM, ModelArgs
from llm.args.ssm import SSMArgs
from llm.cache import Cache
from llm.datatypes import TransformerInput
from llm.errors import UserError
from llm.foreign.export import meaning
from llm.kernels import fused_ssd as module
from llm.kernels.fused_ssd import check_device, find_kernel, fused_ssd
from llm.kernels.ssd import ssd
from llm.plan.activations import _ssm_bytes
from tests.kernels.test_ssd import documents, inputs, worst

PLACE = "mamba_ssm.ops.triton.ssd_combined"
CLOSE = 1e-5
"""Of float32: a few hundred roundings of 6e-8."""


class Contiguous(torch.autograd.Function):
    """As the kernels count places of the gradient, too."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        assert grad.is_contiguous()
        return grad


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
):  # fmt: skip
    """The signature of version 2.3.2; a state begins in document 0, as in its kernels."""
    assert D is z is dt_bias is cu_seqlens is None and not dt_softplus and not return_varlen_states
    assert dt_limit == (0.0, float("inf")) and chunk_size >= 16 and return_final_states
    for given in (x, dt, A, B, C, initial_states):
        assert given is None or (given.dtype == torch.float32 and given.is_contiguous())
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.is_contiguous())
    n_rows, length, heads, width = x.shape
    of_head = torch.arange(heads) // (heads // B.shape[2])
    state = x.new_zeros(n_rows, heads, width, B.shape[3]) if initial_states is None else initial_states
    number, said = torch.zeros(n_rows, dtype=torch.int32), []
    for t in range(length):
        if seq_idx is not None:
            state = state * (seq_idx[:, t] == number)[:, None, None, None]
            number = seq_idx[:, t]
        written = torch.einsum("bhp,bhn->bhpn", x[:, t] * dt[:, t, :, None], B[:, t, of_head])
        state = state * torch.exp(dt[:, t] * A)[..., None, None] + written
        said.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t, of_head]))
    return Contiguous.apply(torch.stack(said, 1)), state


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is there, and every device is one that it runs on."""
    parts = PLACE.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(parts[i - 1]))
    monkeypatch.setattr(sys.modules[PLACE], "mamba_chunk_scan_combined", mamba_chunk_scan_combined, raising=False)
    monkeypatch.setattr(module, "DEVICE", "cpu")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("begun", [False, True], ids=["from nothing", "from a state"])
@pytest.mark.parametrize("packed", [False, True], ids=["a document a row", "packed"])
@pytest.mark.parametrize("groups", [1, 2])
def test_it_says_what_ours_says_and_so_do_gradients(groups, packed, begun):
    *given, state = inputs(groups, torch.float32)
    with torch.no_grad():
        given[1][:, -7:] = 0  # padding
    leaves = [*given, state] if begun else given
    numbers = documents() + torch.tensor([[0], [9]]) if packed else None
    made = [scan(*given, numbers, state if begun else None, 16) for scan in (fused_ssd, ssd)]
    weights = [torch.randn_like(y.transpose(1, 2)).transpose(1, 2) for y in made[0]]  # gradients of other strides
    found, expected = (
        torch.autograd.grad(sum((y * w).sum() for y, w in zip(z, weights, strict=True)), leaves) for z in made
    )
    assert worst(tuple(made[0]), tuple(made[1])) < CLOSE
    assert worst(found, expected) < CLOSE


@pytest.mark.usefixtures("installed")
def test_inputs_may_lie_as_they_like():
    given = [y.detach() for y in inputs(2, torch.float32)]
    apart = [torch.stack([y, y], -1)[..., 0] for y in given]
    assert not apart[0].is_contiguous()
    numbers = torch.stack([documents()] * 2, -1)[..., 0]
    found = fused_ssd(*apart[:5], numbers, apart[5], 16)
    assert worst(tuple(found), tuple(ssd(*given[:5], numbers, given[5], 16))) < CLOSE


def hybrid(kernel: str) -> LLM:
    ssm = {"d_state": 8, "head_width": 8, "groups": 2, "chunk": 16, "kernel": kernel}
    pattern = "ssm,ssm@3,sum,attn"
    args = ModelArgs(dim=32, n_layers=4, n_heads=4, vocab_size=50, layer_pattern=pattern, ffn_hidden=48, ssm=ssm)
    return LLM(args, seed=3)


@pytest.mark.usefixtures("installed")
def test_a_model_trains_and_goes_on_by_either_kernel_alike(monkeypatch):
    calls = []
    monkeypatch.setattr(
        sys.modules[PLACE],
        "mamba_chunk_scan_combined",
        lambda *args, **named: calls.append(named) or mamba_chunk_scan_combined(*args, **named),
    )
    tokens = torch.randint(0, 50, (3, 40), generator=torch.Generator().manual_seed(1))
    bounds, found = torch.tensor([0, 5, 6, 40, 75, 80, 120]), []
    for kernel in ("mamba_ssm", "torch"):
        model = hybrid(kernel)
        out = model(TransformerInput(tokens, cu_seqlens=bounds), labels=tokens.roll(-1, 1))
        out.loss_sum.backward()
        cache = Cache(model.args)
        with torch.no_grad():  # a prompt, its rest, and a token, which is ours
            parts = [model(part, cache=cache, return_hidden=True).hidden for part in tokens.split([20, 19, 1], 1)]
        found.append((out.loss_sum.detach(), torch.cat(parts, 1), *(p.grad for p in model.parameters())))
        assert len(calls) == 9  # three layers: once trained, twice prompted; the strided one completes no last chunk
    assert worst(*found) < 1e-4  # float32 through four layers


@pytest.mark.parametrize("kernel", ["torch", "mamba_ssm"])
def test_a_single_token_needs_no_package(kernel):
    model = hybrid(kernel)
    assert model(torch.tensor([[1]]), cache=Cache(model.args)).logits.shape == (1, 1, 50)


def test_another_device_is_refused():
    with pytest.raises(UserError, match=r"model\.ssm\.kernel=mamba_ssm needs a CUDA device, and this one is cpu; use"):
        hybrid("mamba_ssm")(torch.tensor([[1, 2]]))
    check_device("cuda")


def test_a_missing_package_is_refused(monkeypatch):
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    *given, _ = inputs(1, torch.float32)
    for ask in (find_kernel, lambda: fused_ssd(*given)):
        with pytest.raises(UserError, match=r"kernel=mamba_ssm: .* cannot be imported .*docs/layouts\.md"):
            ask()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(UserError, match=rf"kernel=mamba_ssm takes float32, and .* in {dtype}"):
        fused_ssd(*inputs(1, dtype)[:5])


@pytest.mark.parametrize("chunk", [1, 8, 48, 100])
def test_chunks_that_the_kernels_do_not_take_are_refused(chunk):
    with pytest.raises(ValueError, match=rf"model\.ssm\.chunk={chunk}: model\.ssm\.kernel=mamba_ssm takes powers of 2"):
        SSMArgs(kernel="mamba_ssm", chunk=chunk)
    assert SSMArgs(chunk=chunk).kernel == "torch"


TOO_LONG = {
    # rows, tokens, heads, head's width, groups, state's width, chunk
    "channels": (1, 1 << 20, 32, 64, 1, 16, 256),
    "states between chunks": (2, 1 << 16, 128, 64, 1, 128, 64),
    "scores within chunks": (1, 1 << 20, 8, 16, 8, 16, 256),
    "gradients of what is written to the state": (1, 1 << 20, 1, 16, 1, 2048, 1024),
    "sums of decays": (1, 1 << 20, 64, 16, 1, 16, 1024),
}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("what", TOO_LONG)
def test_what_indices_do_not_reach_is_refused_with_its_size(monkeypatch, what):
    monkeypatch.setattr(module, "DEVICE", "meta")
    rows, length, heads, width, groups, state, chunk = TOO_LONG[what]
    shapes = (rows, length, heads, width), (rows, length, heads), (heads,)
    x, dt, a = (torch.empty(shape, device="meta") for shape in shapes)
    b = torch.empty(rows, length, groups, state, device="meta")
    expected = rf"{rows} x {length:,} tokens make [\d,]+ numbers of {what}, .* 2,147,483,647;"
    with pytest.raises(UserError, match=expected):
        fused_ssd(x, dt, a, b, b, None, None, chunk)


@pytest.mark.usefixtures("installed")
def test_the_last_tensor_that_indices_reach_is_computed(monkeypatch):
    monkeypatch.setattr(module, "DEVICE", "meta")
    seen = []
    monkeypatch.setattr(
        sys.modules[PLACE],
        "mamba_chunk_scan_combined",
        lambda *args, **named: seen.append(args[0].shape) or (args[0], None),
    )
    x = torch.empty(1, (1 << 17) - 128, 128, 64, device="meta")  # states: 2^31 less those of two chunks
    b = torch.empty(1, (1 << 17) - 128, 1, 128, device="meta")
    fused_ssd(x, x[..., 0], torch.empty(128, device="meta"), b, b)
    assert seen == [x.shape]
    x, b = (torch.empty(1, 1 << 17, *z.shape[2:], device="meta") for z in (x, b))
    with pytest.raises(UserError, match="2,147,483,648 numbers of states between chunks"):
        fused_ssd(x, x[..., 0], torch.empty(128, device="meta"), b, b)


def test_what_computes_is_not_what_a_model_is():
    ours, theirs = (hybrid(kernel).args for kernel in ("torch", "mamba_ssm"))
    assert meaning(ours) == meaning(theirs)
    assert "kernel" not in ours.model_dump()["ssm"] and theirs.model_dump()["ssm"]["kernel"] == "mamba_ssm"
    assert _ssm_bytes(ours, 1, 4) is not None and _ssm_bytes(theirs, 1, 4) is None


def test_a_saved_model_is_read_without_it(tmp_path):
    model = hybrid("mamba_ssm")
    model.save_pretrained(tmp_path / "saved")
    read = LLM.from_pretrained(tmp_path / "saved")
    assert read.args.ssm is not None and read.args.ssm.kernel == "torch"
    assert read.args.ssm.model_copy(update={"kernel": "mamba_ssm"}) == model.args.ssm
