"""Compiled blocks give the same answers, and how documents are packed compiles nothing anew.

Most tests compile for the "aot_eager" backend, which makes the same graphs as the default one and runs them uncompiled:
seconds instead of a minute.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from llm.compile import compile_blocks
from llm.datatypes import TransformerInput
from llm.errors import UserError
from llm.generate import generate
from llm.layers.dropout import token_keys
from tests.model.models import MOE, llama4, tokens

# a dense chunked RoPE layer and a global NoPE layer with experts
EVERYTHING = dict(n_layers=2, nope_layer_interval=2, moe=MOE | dict(interleave=2, aux_alpha=0.01, z_alpha=0.001))


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing compiled before, here or by an earlier session: what its cache holds may be of other instructions."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def packed(rows: int, length: int, seed: int) -> TransformerInput:
    """Rows cut into documents at random places."""
    draw = torch.Generator().manual_seed(seed)
    cuts = torch.randperm(rows * length, generator=draw)[: int(torch.randint(1, 6, (), generator=draw))]
    bounds = torch.cat([cuts, torch.arange(0, rows * length + 1, length)]).unique()
    return TransformerInput(tokens(rows, length, seed=seed), cu_seqlens=bounds)


def step(model, inputs: TransformerInput) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    out = model(inputs, labels=inputs.tokens.roll(-1, 1))
    loss = out.loss_sum if out.expert_counts is None else out.loss_sum + out.balance_sum + out.z_sum
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_step(compiled, eager, inputs: TransformerInput) -> None:
    (loss, gradients), (expected, references) = step(compiled, inputs), step(eager, inputs)
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, reference in references.items():
        error = (gradients[name] - reference).norm() / reference.norm().clamp(min=1e-6)
        assert error < 1e-5, name  # float32 sums in another order


def test_a_compiled_layer_takes_the_eager_ones_step():
    """By the default backend, which writes C++: in small."""
    eager, compiled = (llama4(n_layers=1) for _ in range(2))
    compile_blocks(compiled)
    assert compiled.state_dict().keys() == eager.state_dict().keys()
    assert_same_step(compiled, eager, packed(2, 12, 0))
    assert graphs() > 0


@pytest.mark.full
def test_compiled_steps_equal_eager_ones():
    eager, compiled = (llama4(**EVERYTHING) for _ in range(2))
    compile_blocks(compiled)
    for seed in range(2):
        assert_same_step(compiled, eager, packed(3, 24, seed))
    assert graphs() > 0


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_compiled_blocks_can_be_recomputed(mode):
    eager, compiled = (llama4(**EVERYTHING) for _ in range(2))
    compile_blocks(compiled, "aot_eager")
    compiled.activation_checkpointing = mode
    for seed in range(2):
        assert_same_step(compiled, eager, packed(3, 24, seed))
    assert graphs() > 0


@pytest.mark.full
@pytest.mark.parametrize("dropout", [{"lora": {"rank": 2, "dropout": 0.5}}, {"dropout": 0.5, "ffn_dropout": 0.5}])
def test_compiled_layers_drop_what_eager_ones_drop_and_layers_alike_share_graphs(dropout):
    eager, compiled = (llama4(n_layers=3, nope_layer_interval=None, **dropout) for _ in range(2))
    for model in (eager, compiled):
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                torch.nn.init.constant_(parameter, 0.1)
    compile_blocks(compiled, "aot_eager")
    inputs, keys = packed(3, 24, 0), token_keys(0, 1, torch.arange(3), 3 * 24)
    losses = [model(inputs, labels=inputs.tokens, keys_N=keys).loss_sum for model in (eager, compiled)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    assert losses[0].item() != pytest.approx(eager.eval()(inputs, labels=inputs.tokens).loss_sum.item(), rel=1e-4)
    found = graphs()
    compiled(inputs, labels=inputs.tokens, keys_N=token_keys(0, 2, torch.arange(3), 3 * 24))
    one = llama4(n_layers=1, nope_layer_interval=None, **dropout)
    assert graphs() == found, "another step was compiled anew"
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(one, "aot_eager")
    one(inputs, labels=inputs.tokens, keys_N=keys)
    assert graphs() == found, "each layer was compiled for its own site"


@pytest.mark.full
def test_layers_alike_share_graphs_however_many_they_are(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)  # else the rest run uncompiled
    model = llama4(n_layers=10, nope_layer_interval=None)
    compile_blocks(model, "aot_eager")
    found = []
    for units in (model.units[:2], model.units):
        model(packed(3, 24, 0), return_hidden=True, units=units)
        found.append(graphs())
    assert found[0] == found[1] > 0


@pytest.mark.full
def test_twenty_batches_compile_once_for_their_shape_and_once_for_all_others():
    eager, compiled = (llama4(**EVERYTHING) for _ in range(2))
    compile_blocks(compiled, "aot_eager")
    found = []
    for seed in range(20):
        rows, length = (4, 24) if seed < 10 else (2 + seed % 4, 16 + seed)
        inputs = packed(rows, length, seed)
        if seed == 9:
            inputs.cu_seqlens = None  # all rows at the same positions
        assert_same_step(compiled, eager, inputs)
        found.append(graphs())
    assert found[9] == found[0], "a new packing or routing was compiled"
    assert found[19] <= 3 * found[0], "rows and length become dynamic one after the other, at most"
    assert found[19] == found[12], "shapes go on being compiled"


def test_causal_rows_others_and_both_together_share_graphs():
    eager, compiled = llama4(n_layers=2), llama4(n_layers=2)
    compile_blocks(compiled, "aot_eager")
    made = []
    for causal in (True, False, torch.tensor([True, False, False, True])):
        assert_same_step(compiled, eager, replace(packed(4, 16, seed=3), causal=causal))
        made.append(graphs())
    assert made[0] > 0 and len(set(made)) == 1


def with_source(inputs: TransformerInput, seed: int) -> TransformerInput:
    """The same with as many sources, of random lengths, in 30 places of each row; what is left is padding."""
    assert inputs.cu_seqlens is not None
    rows, length = inputs.tokens.shape
    of_row = (inputs.cu_seqlens[:-1] // length).bincount(minlength=rows)
    places, draw = torch.full((rows, 30), -1), torch.Generator().manual_seed(seed)
    bounds = [0]
    for row, count in enumerate(of_row.tolist()):
        ends = (torch.randperm(28, generator=draw)[:count] + 1).sort().values.tolist()
        for first, end in zip([0, *ends], ends, strict=False):
            places[row, first:end] = torch.arange(end - first)
        bounds += [row * 30 + end for end in ends] + [(row + 1) * 30]
    source = TransformerInput(tokens(rows, 30, seed=seed + 50), places, torch.tensor(bounds))
    return replace(inputs, source=source)


@pytest.mark.full
def test_both_sides_of_an_encoder_decoder_compile_once_however_pairs_are_packed():
    eager, compiled = (llama4(**EVERYTHING | dict(encoder_layers=2)) for _ in range(2))
    compile_blocks(compiled, "aot_eager")
    found = []
    for seed in range(4):
        assert_same_step(compiled, eager, with_source(packed(3, 24, seed), seed))
        found.append(graphs())
    assert found[0] > 0 and len(set(found)) == 1


def test_without_gradients_nothing_is_compiled():
    eager, compiled = (llama4(**EVERYTHING) for _ in range(2))
    compile_blocks(compiled, "aot_eager")
    prompts = [[1, 2, 3], [4], list(range(20))]
    assert generate(compiled, prompts, max_new_tokens=6) == generate(eager, prompts, max_new_tokens=6)
    with torch.no_grad():
        assert torch.equal(compiled(tokens(3, 9)).logits, eager(tokens(3, 9)).logits)
    assert graphs() == 0


def test_a_missing_compiler_is_said_before_any_work(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(UserError, match="train.compile=true needs a compiler, but no-such-compiler is not installed"):
        compile_blocks(llama4())
