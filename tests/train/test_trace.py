"""The trace: the same numbers however a batch is cut, nothing counted twice, nothing changed by looking."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm.args import ModelArgs
from llm.model import LLM
from llm.parallel.launch.world import World
from llm.train.trace import PROBES, Recorder, Trace, fixed_weights, merge
from tests.distributed.harness import TINY_MODEL

ARGS = ModelArgs.model_validate({**TINY_MODEL, "vocab_size": 64})
ALONE = World(0, 1, 0, torch.device("cpu"))
ROWS, LENGTH = 4, 24
Records = dict[tuple[str, str], dict[str, Any]]


def batch() -> Tensor:
    return torch.randint(0, ARGS.vocab_size, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def run_step(model: LLM, cut: Sequence[int], gradient_scale: float = 1.0) -> None:
    """One forward and backward over the batch, cut into micro-batches of the given numbers of rows."""
    for rows in batch().split(list(cut)):
        out = model(rows[:, :-1], labels=rows[:, 1:])
        assert out.loss_sum is not None and out.balance_sum is not None and out.z_sum is not None
        ((out.loss_sum + out.balance_sum + out.z_sum) * (gradient_scale / batch().numel())).backward()


def recorded(model: LLM, cut: Sequence[int] = (ROWS,), gradient_scale: float = 1.0) -> Records:
    recorder = Recorder(model, gradient_scale)
    with recorder.listening():
        run_step(model, cut, gradient_scale)
    return {(record["name"], record["tensor"]): record for record in merge([recorder.sums()])}


def assert_close(a: Records, b: Records, rtol: float) -> None:
    assert list(a) == list(b)
    for key, x in a.items():
        y = b[key]
        assert x["count"] == y["count"], key
        assert x["linear"] == pytest.approx(y["linear"], rel=0, abs=rtol * max(x["scale"], y["scale"])), key
        assert x["norm"] == y["norm"] or x["norm"] == pytest.approx(y["norm"], rel=rtol), key


# float32 products over other numbers of rows differ by about 1e-7 of their size, and gradients of queries and keys,
# the rest of what cancels, by a few times more; a tensor counted twice or scaled wrongly is off by 0.3 and more
@pytest.mark.parametrize(("cut", "gradient_scale"), [((1, 1, 1, 1), 1.0), ((2, 2), 2.0), ((3, 1), 1024.0)])
def test_the_numbers_do_not_depend_on_how_the_batch_is_cut(cut: Sequence[int], gradient_scale: float) -> None:
    whole = recorded(LLM(ARGS))
    assert_close(recorded(LLM(ARGS), cut, gradient_scale), whole, rtol=1e-5)


def test_two_ranks_add_up_to_the_whole() -> None:
    whole = recorded(LLM(ARGS))
    ranks = []
    for rows in batch().split(ROWS // 2):
        recorder = Recorder(model := LLM(ARGS), gradient_scale=2.0)  # the mean over two ranks follows
        with recorder.listening():
            out = model(rows[:, :-1], labels=rows[:, 1:])
            ((out.loss_sum + out.balance_sum + out.z_sum) * (2.0 / batch().numel())).backward()
        ranks.append(recorder.sums())
    assert_close({(r["name"], r["tensor"]): r for r in merge(ranks)}, whole, rtol=1e-5)


def test_every_parameter_and_the_parts_of_a_layer_are_there_in_the_order_of_computation() -> None:
    records = recorded(model := LLM(ARGS))
    names = [name for name, _ in model.named_parameters()]
    assert {name for name, tensor in records if tensor == "weight"} == set(names)
    assert {name for name, tensor in records if tensor == "gradient"} == set(names)
    expected = [("tok_embeddings.weight", "weight"), ("tok_embeddings", "output")]
    layer = "layers.1."
    for part in ("attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo"):
        expected += [(f"{layer}{part}.weight", "weight"), (layer + part, "output")]
    expected += [(layer + "attention", "output"), (layer + "ffn_norm.weight", "weight"), (layer + "ffn_norm", "output")]
    expected += [(layer + "feed_forward.router", "output"), (layer + "feed_forward.experts.w1", "weight")]
    expected += [(layer + "feed_forward", "output"), (layer + "feed_forward", "expert_counts"), ("layers.1", "output")]
    expected += [("norm", "output"), ("output.weight", "weight"), ("model", "loss_sum")]
    expected += [("output.weight", "gradient"), ("norm.weight", "gradient"), ("layers.1.ffn_norm.weight", "gradient")]
    expected += [("layers.1.attention.wq.weight", "gradient"), ("tok_embeddings.weight", "gradient")]
    assert [key for key in records if key in expected] == expected


def test_linear_is_the_inner_product_of_the_whole_gradient() -> None:
    model = LLM(ARGS)
    records = recorded(model, (1, 3))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        for probe in range(PROBES):
            direction = torch.ones((), dtype=torch.float64)
            for axis, length in enumerate(parameter.shape):
                direction = direction[..., None] * fixed_weights(f"{name}:{axis}", length)[:, probe]
            expected = float((parameter.grad.double() * direction).sum())
            record = records[name, "gradient"]
            # two float32 gradients are added here, and their inner products there
            assert record["linear"][probe] == pytest.approx(expected, rel=0, abs=1e-6 * record["scale"]), name


def test_a_permutation_or_a_sign_shows_where_the_norm_is_blind() -> None:
    sound = recorded(LLM(ARGS))["layers.1.attention.wq", "output"]
    for spoil in (lambda y: y.roll(1, -1), lambda y: torch.cat([-y[..., :1], y[..., 1:]], -1)):
        model = LLM(ARGS)
        model.get_submodule("layers.1.attention.wq").register_forward_hook(lambda _, args, y, spoil=spoil: spoil(y))
        record = recorded(model)["layers.1.attention.wq", "output"]
        assert record["norm"] == pytest.approx(sound["norm"], rel=1e-12)
        differences = [abs(x - y) for x, y in zip(record["linear"], sound["linear"], strict=True)]
        assert max(differences) > 1e-3 * sound["scale"]


def test_weights_are_never_near_zero_and_products_with_integers_are_exact() -> None:
    weights = fixed_weights("a", 5000)
    assert float(weights.abs().min()) >= 0.5 and float(weights.abs().max()) <= 1.5
    assert torch.equal(weights * 2**20, (weights * 2**20).round())
    assert len(weights.unique()) > 0.98 * weights.numel()
    assert not torch.equal(weights, fixed_weights("b", 5000))


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_a_forward_repeated_by_the_backward_is_not_counted_again(mode: Any) -> None:
    plain, model = recorded(LLM(ARGS), (2, 2)), LLM(ARGS)
    model.activation_checkpointing = mode
    again = recorded(model, (2, 2))
    forward = [key for key in plain if key[1] != "gradient"]
    assert [key for key in again if key[1] != "gradient"] == forward
    assert all(again[key] == record for key, record in plain.items()), "the same operations, so the same bits"


def test_a_compiled_block_shows_its_output_and_weights() -> None:
    plain, model = recorded(LLM(ARGS)), LLM(ARGS)
    block = model.layers[1]
    called = []

    def compiled(*args: Any) -> Any:  # stands for what torch.compile would put there
        called.append(1)
        return block(*args)

    model.compiled["layers.1"] = compiled
    records = recorded(model)
    assert called == [1] and model.compiled["layers.1"] is compiled
    inside = {key for key in plain if key[0].startswith("layers.1.") and key[1] not in ("weight", "gradient")}
    assert set(plain) - set(records) == inside
    assert all(records[key] == plain[key] for key in records)


def hooks(model: LLM) -> int:
    modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return modules + sum(len(p._backward_hooks or ()) for p in model.parameters())


def test_only_the_named_steps_have_hooks_and_rows_and_an_error_leaves_no_hook(tmp_path: Path) -> None:
    model = LLM(ARGS)
    trace = Trace(model, ALONE, tmp_path / "trace.jsonl", (2, 3), first_step=1)
    for step in range(1, 5):
        with trace.step(step, 1.0):
            assert (hooks(model) > 0) == (step in (2, 3))
            run_step(model, (ROWS,))
        assert hooks(model) == 0
    with pytest.raises(RuntimeError, match="in the step"), trace.step(3, 1.0):
        raise RuntimeError("in the step")
    assert hooks(model) == 0
    rows = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert {row["step"] for row in rows} == {2, 3}


def test_looking_changes_no_gradient() -> None:
    seen, unseen = LLM(ARGS), LLM(ARGS)
    recorded(seen, (2, 2))
    run_step(unseen, (2, 2))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(seen.parameters(), unseen.parameters(), strict=True))


def test_steps_that_are_repeated_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    model = LLM(ARGS)

    def steps_in_file() -> list[int]:
        return list(dict.fromkeys(json.loads(line)["step"] for line in path.read_text().splitlines()))

    def go(trace: Trace, *steps: int) -> None:
        for step in steps:
            with trace.step(step, 1.0):
                run_step(model, (ROWS,))

    trace = Trace(model, ALONE, path, (1, 9), first_step=1)
    go(trace, 1, 2, 3, 4)
    go(trace, 3)  # taken back inside a run
    assert steps_in_file() == [1, 2, 3]
    with open(path, "a") as file:
        file.write('{"step": 4, "na')  # torn by a kill
    Trace(model, ALONE, path, None, first_step=3)  # resumed, and no longer traced
    assert steps_in_file() == [1, 2]
    n_rows = len(path.read_text().splitlines())
    go(Trace(model, ALONE, path, (1, 9), first_step=3), 3)
    assert steps_in_file() == [1, 2, 3] and len(path.read_text().splitlines()) == n_rows // 2 * 3
