"""What only a GPU runs: its attention kernel, its grouped products, and whole runs in each precision. Held against the
definition in float64 and against the same run on the CPU of the same machine.
"""

import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llm import LLM, ModelArgs
from llm.args.layers import attention_specs
from llm.compile import compile_blocks
from llm.datatypes import TransformerInput
from llm.kernels.attention import has_varlen_kernel
from llm.kernels.grouped import grouped_matmul
from llm.layers.masks import AttentionMasks
from tests.distributed.harness import (
    ROOT,
    TINY_MODEL,
    command,
    environment,
    metrics,
    tiny_config,
    without_timing,
    write_config,
    write_text,
)
from tests.layers.oracle import dense_attention
from tests.layers.test_masks import BATCHES, LAYERS, LENGTH, OTHERS, ROWS, SIZES, resolved

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FP32 = 1e-5  # design: equal in float32
BF16 = 2e-2
"""Relative error of a result in the 2-norm: inputs are rounded to 8 bits, as are weights before the last product."""
SPECS = {
    **dict(zip(("full", "chunk", "nope"), LAYERS, strict=True)),
    **{
        name: attention_specs(ModelArgs(n_layers=1, **SIZES, **knobs).layer_specs())[0]
        for name, knobs in OTHERS.items()
    },
}


def distance(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference over the norm of theirs, in float64 on the CPU."""
    mine, theirs = mine.detach().double().cpu(), theirs.detach().double().cpu()
    return float((mine - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("batch", ["one document a row", "packed", "left padding"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
def test_attention_equals_the_dense_mask(name: str, batch: str, dtype: torch.dtype, causal: bool) -> None:
    assert batch in BATCHES
    spec, (positions, starts) = SPECS[name], resolved(batch)
    torch.manual_seed(0)
    wide = [torch.randn(ROWS, LENGTH, heads, 8).to(dtype).float().requires_grad_() for heads in (4, 2, 2)]
    ours = [x.detach().cuda().to(dtype).requires_grad_() for x in wide]
    assert has_varlen_kernel(ours[0]) == (dtype != torch.float32)
    attend = AttentionMasks([spec], positions, starts, torch.device("cuda"), causal)
    out = attend(0, spec, *ours)
    oracle = dense_attention(*wide, positions, starts, spec, causal).transpose(0, 1).view(wide[0].shape).float()
    upstream = torch.randn(out.shape).to(dtype)
    grads = torch.autograd.grad(out, ours, upstream.cuda())
    expected = torch.autograd.grad(oracle, wide, upstream.float())
    bound = FP32 if dtype == torch.float32 else BF16
    assert distance(out, oracle) < bound
    for mine, theirs in zip(grads, expected, strict=True):
        if spec.mask == "window" and spec.span == 1 and not theirs.any():
            assert mine.abs().max() < 1e-2  # a window of one: scores have no gradient
        else:
            assert distance(mine, theirs) < bound


@pytest.mark.parametrize("sizes", [[5, 0, 16, 3], [0, 0, 0, 24], [0, 0, 0, 0]], ids=str)
def test_grouped_products_equal_a_loop(sizes: list[int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(sum(sizes), 32).bfloat16().cuda().requires_grad_()
    w = torch.randn(4, 32, 48).bfloat16().cuda().requires_grad_()
    out = grouped_matmul(x, w, torch.tensor(sizes, device="cuda"))
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    loop = torch.cat([a @ b for a, b in zip(wide[0].split(sizes), wide[1], strict=True)])
    upstream = torch.randn(out.shape).bfloat16().cuda()
    grads = torch.autograd.grad(out, (x, w), upstream)
    expected = torch.autograd.grad(loop, wide, upstream.double())
    for mine, theirs in zip((out, *grads), (loop, *expected), strict=True):
        assert mine.shape == theirs.shape
        assert not theirs.norm() or distance(mine, theirs) < 1e-2  # one rounding of a sum to 8 bits
        assert theirs.norm() or not mine.any()


def losses_and_gradients(device: str, dtype: torch.dtype, compiled: bool = False) -> tuple[float, torch.Tensor]:
    model = LLM(ModelArgs.model_validate({**TINY_MODEL, "vocab_size": 64}), seed=1).to(device, dtype)
    if compiled:
        compile_blocks(model)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 64, (4, 48), generator=draw).to(device)
    documents = torch.tensor([0, 17, 48, 96, 130, 144, 192], dtype=torch.int32)
    out = model(TransformerInput(tokens, cu_seqlens=documents), labels=tokens.roll(-1, 1))
    assert out.balance_sum is not None and out.z_sum is not None
    (out.loss_sum + out.balance_sum + out.z_sum).backward()
    grads = [p.grad.detach().float().cpu().flatten() for p in model.parameters()]
    return float(out.loss_sum), torch.cat(grads)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_computes_on_a_gpu_what_it_computes_on_a_cpu(dtype: torch.dtype, compiled: bool) -> None:
    loss, grads = losses_and_gradients("cuda", dtype, compiled)
    expected_loss, expected_grads = losses_and_gradients("cpu", torch.float32)
    assert loss == pytest.approx(expected_loss, rel=FP32 if dtype == torch.float32 else 1e-2)
    # in bf16 a token whose router logits nearly tie may choose another expert, whose gradient then differs wholly
    assert distance(grads, expected_grads) < (FP32 if dtype == torch.float32 else 0.15)


RUNS: dict[str, dict[str, dict[str, object]]] = {
    "fp32": {"train": {"precision": "fp32"}},
    "fp32 ZeRO-2": {"train": {"precision": "fp32"}, "parallel": {"zero_stage": 2}},
    "fp32 ZeRO-3": {"train": {"precision": "fp32"}, "parallel": {"zero_stage": 3}},
    "fp32 checkpointing": {"train": {"precision": "fp32", "activation_checkpointing": "full"}},
    "bf16": {"train": {"precision": "auto"}},
    "bf16 selective": {"train": {"precision": "bf16", "activation_checkpointing": "selective"}},
    "bf16 compiled": {"train": {"precision": "bf16", "compile": True}},
    "bf16 ZeRO-3": {"train": {"precision": "bf16"}, "parallel": {"zero_stage": 3}},
    "bf16 offload": {"train": {"precision": "bf16"}, "parallel": {"offload_optimizer": True}},
    "bf16 muon": {"train": {"precision": "bf16"}, "optim": {"name": "muon"}},
    "fp16": {"train": {"precision": "fp16"}},
}


def train(folder: Path, name: str, *flags: str, gpu: bool = True, **sections: dict[str, object]) -> Path:
    sections["train"] = {"steps": 12, **sections.get("train", {})}
    config = write_config(folder / f"{name}.yaml", tiny_config(folder, **sections))
    hidden = {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command("launch/pretrain.py", "--config", str(config), "--run_dir", str(folder / name), *flags),
        env={**environment(), **hidden},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    write_text(folder)
    return folder


@pytest.fixture(scope="module")
def on_cpu(folder: Path) -> dict[str, Path]:
    return {
        optimizer: train(folder, f"cpu-{optimizer}", gpu=False, optim={"name": optimizer}, train={"precision": "fp32"})
        for optimizer in ("adamw", "muon")
    }


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_a_gpu_equals_the_one_on_a_cpu(folder: Path, on_cpu: dict[str, Path], name: str) -> None:
    optimizer = str(RUNS[name].get("optim", {}).get("name", "adamw"))
    rows = metrics(train(folder, name.replace(" ", "-"), **RUNS[name]))
    reference = metrics(on_cpu[optimizer])
    # Muon's iteration runs in bf16 on a GPU, and amplifies its rounding
    bound = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}[name.split()[0]] * (5 if optimizer == "muon" else 1)
    taken = [row for row in rows if row.get("skipped") is None]
    assert len(rows) == len(reference) and (len(taken) == len(rows) or name == "fp16")
    for row, expected in zip(rows, reference, strict=True):
        if len(taken) == len(rows):
            assert row["loss"] == pytest.approx(expected["loss"], rel=bound), row["step"]
            assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=10 * bound), row["step"]
    assert rows[-1]["memory_gb"] > 0
    assert taken[-1]["loss"] < taken[0]["loss"]


def test_a_run_on_a_gpu_resumes_where_it_stopped(folder: Path) -> None:
    bf16 = {"precision": "bf16", "steps": 12}
    train(folder, "halves", "--train.steps=6", train=bf16, checkpoint={"interval": 6}, optim={"schedule": "constant"})
    halves = metrics(train(folder, "halves", train=bf16, checkpoint={"interval": 6}, optim={"schedule": "constant"}))
    assert [row["step"] for row in halves] == list(range(1, 13))
    straight = metrics(train(folder, "straight", train=bf16, optim={"schedule": "constant"}))
    for row, expected in zip(without_timing(halves), without_timing(straight), strict=True):
        # attention's backward adds up by atomic operations, in any order
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-3)


def test_a_checkpoint_of_a_gpu_generates(folder: Path) -> None:
    run_dir = train(folder, "generates", train={"precision": "bf16"})
    done = subprocess.run(
        command("launch/generate.py", "--model", str(run_dir), "--prompt", "abc", "--max_new_tokens", "8"),
        env={**environment()},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("abc")


def test_the_loss_is_that_of_whole_logits() -> None:
    from llm.kernels.cross_entropy import lm_loss_sum

    torch.manual_seed(0)
    hidden = torch.randn(2, 700, 32, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(70000, 32, device="cuda").bfloat16().requires_grad_()  # three chunks
    labels = torch.randint(-1, 70000, (2, 700), device="cuda")
    loss = lm_loss_sum(hidden, weight, labels)
    wide = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    logits = (wide[0] @ wide[1].t()).bfloat16().float()
    plain = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1, reduction="sum")
    assert float(loss) == pytest.approx(float(plain), rel=1e-4)
    for mine, theirs in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(plain, wide), strict=True
    ):
        assert distance(mine, theirs) < BF16


