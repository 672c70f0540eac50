"""What the golden files hold, and that a comparison with them fails where it should, in words that say where."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llm import LLM
from llm.args import ModelArgs
from llm.tokenizer import load_tokenizer
from llm.train.config import validate
from tests.golden.cases import CONFIGS, FOLDER, LAYOUTS, SHORT, Case, every_case, refusal, run_config
from tests.golden.trace import (
    BF16,
    CLOSE,
    FP32,
    KEYS,
    Golden,
    Trace,
    agree,
    differences,
    digest_of,
    file_of,
    load,
    text_of,
    tolerance,
)

STEPS = 12
MARGIN = 1e-5
"""Of a choice, relative to the logits; other sums move them by 1e-7, and twelve steps of training by 1e-6."""
OF_THE_LAYOUT = ("expert_rank_load",)
ELSEWHERE: dict[str, Any] = {"processor": "another"}


def compared(
    golden: Golden, case: Case, trace: Trace, machine: dict[str, Any] | None = None, text: str | None = None
) -> list[str]:
    text = golden.text_digest if text is None else text
    return list(differences(golden, case, trace, golden.machine if machine is None else machine, text))


def changed(trace: Trace, step: int, **values: Any) -> Trace:
    """The trace with other values in a step, counted from 1."""
    steps = [{**row, **values} if row["step"] == step else row for row in trace.steps]
    return dataclasses.replace(trace, steps=steps)


def times(trace: Trace, step: int, key: str, factor: float) -> Trace:
    return changed(trace, step, **{key: trace.steps[step - 1][key] * factor})


def test_every_config_has_every_layout_but_experts_where_it_has_none() -> None:
    refused = {Case(config, "expert2") for config in ("dense", "gemma", "neox")}
    assert set(every_case()) == {Case(config, layout) for config in CONFIGS for layout in LAYOUTS} - refused
    assert all("the model has none" in str(refusal(case)) for case in refused)
    assert {case.config for case in SHORT} == set(CONFIGS) and len(SHORT) == len(CONFIGS)
    assert {case.layout for case in SHORT} == set(LAYOUTS)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_file_holds_twelve_steps_of_every_layout(config: str) -> None:
    golden = load(config)
    assert golden.layouts.keys() == {case.layout for case in every_case() if case.config == config}
    for trace in golden.layouts.values():
        assert [row["step"] for row in trace.steps] == list(range(1, STEPS + 1))
        assert all(row[key] > 0 for row in trace.steps for key in (*CLOSE, "lr"))
        assert "valid_loss" in trace.steps[-1] and len({row["loss"] for row in trace.steps}) == STEPS
    assert text_of(golden) == file_of(config).read_text()


@pytest.mark.parametrize("config", CONFIGS)
def test_the_recorded_layouts_agree_with_one_process(config: str) -> None:
    """So that no file makes a wrong layout golden; in bf16 as far as another machine would have to."""
    golden = load(config)
    for name, trace in golden.layouts.items():
        assert trace.parameters == golden.layouts["one"].parameters
        for right, row in zip(golden.layouts["one"].steps, trace.steps, strict=True):
            for key in KEYS:
                allowed = tolerance(key, right["step"], golden.precision, other=True)
                if allowed is not None and key not in OF_THE_LAYOUT:
                    assert agree(right.get(key), row.get(key), allowed), (name, row["step"], key)


@pytest.mark.parametrize("config", CONFIGS)
def test_no_recorded_choice_is_near_a_tie(config: str) -> None:
    golden = load(config)
    if golden.precision == "fp32":
        assert golden.greedy is not None and golden.greedy["margin"] > 10 * MARGIN
        assert golden.router_margin is None or golden.router_margin > MARGIN
        assert any(len(set(ids)) > 1 for ids in golden.greedy["ids"]), "one token for ever would show little"
    routed = [row["routing_checksum"] for row in golden.layouts["one"].steps]
    assert routed == [None] * STEPS or len(set(routed)) == STEPS


@pytest.mark.parametrize("config", CONFIGS)
def test_initial_weights_are_the_recorded_ones_on_every_machine(config: str) -> None:
    run = validate(run_config(Case(config, "one"), Path("text")), config)
    size = load_tokenizer(run.tokenizer).vocab_size
    args = ModelArgs.model_validate({**run.model.model_dump(exclude={"init_from"}), "vocab_size": size})
    model = LLM(args, seed=run.train.seed)
    if run.train.precision == "bf16":
        model = model.bfloat16()
    assert digest_of(model.named_parameters()) == load(config).initial_weights


def test_a_changed_number_is_named_by_config_layout_step_and_key() -> None:
    golden = load("dense")
    trace, case = golden.layouts["tensor2"], Case("dense", "tensor2")
    assert compared(golden, case, trace) == []
    (line,) = compared(golden, case, times(trace, 3, "grad_norm", 1 + 1e-15))
    assert line.startswith(f"dense on tensor2, step 3, grad_norm: {trace.steps[2]['grad_norm']} recorded, ")
    assert "must have the same bits on the machine of the file" in line
    (line,) = compared(golden, case, times(trace, 12, "valid_loss", 1 + 1e-4), ELSEWHERE)
    assert line.startswith("dense on tensor2, step 12, valid_loss: ")
    assert "allowed 1e-05 (relative 1.0e-04) on another machine (" in line and "processor" in line
    (line,) = compared(golden, case, changed(trace, 5, loss=None), ELSEWHERE)
    assert "step 5, loss: " in line and "None found" in line


@pytest.mark.parametrize("key", [*CLOSE, "moe_balance_loss", "moe_z_loss", "valid_loss"])
def test_float32_may_differ_by_1e_5_on_another_machine_and_not_at_all_on_its_own(key: str) -> None:
    golden, case = load("llama4"), Case("llama4", "expert2")
    trace = golden.layouts["expert2"]
    near, far = times(trace, 12, key, 1 + FP32 / 2), times(trace, 12, key, 1 + FP32 * 2)
    assert compared(golden, case, near, ELSEWHERE) == []
    assert len(compared(golden, case, far, ELSEWHERE)) == len(compared(golden, case, near)) == 1


@pytest.mark.parametrize("key", ["routing_checksum", "tokens", "targets", "batch_size"])
def test_whole_numbers_are_equal_on_every_machine(key: str) -> None:
    golden, case = load("llama4"), Case("llama4", "one")
    other = changed(golden.layouts["one"], 7, **{key: golden.layouts["one"].steps[6][key] + 1})
    for machine in (golden.machine, ELSEWHERE):
        (line,) = compared(golden, case, other, machine)
        assert line.startswith(f"llama4 on one, step 7, {key}: ")


def test_bf16_elsewhere_is_held_to_two_steps_and_to_its_plan() -> None:
    golden, case = load("muon"), Case("muon", "tensor2")
    trace = golden.layouts["tensor2"]
    for step in (1, 2):
        for key in CLOSE:
            assert compared(golden, case, times(trace, step, key, 1 + BF16 / 2), ELSEWHERE) == []
            assert len(compared(golden, case, times(trace, step, key, 1 + BF16 * 2), ELSEWHERE)) == 1
    later = times(trace, 3, "loss", 1.5)
    assert compared(golden, case, later, ELSEWHERE) == [] and len(compared(golden, case, later)) == 1
    assert len(compared(golden, case, times(trace, 9, "lr", 1.5), ELSEWHERE)) == 1
    assert len(compared(golden, case, changed(trace, 4, routing_checksum=0))) == 1


def test_other_weights_parameters_text_steps_or_config_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    golden, case = load("neox"), Case("neox", "zero3")
    trace = golden.layouts["zero3"]
    assert compared(golden, case, dataclasses.replace(trace, weights="")) == [
        "neox on zero3: other weights after the last step"
    ]
    assert compared(golden, case, dataclasses.replace(trace, weights=""), ELSEWHERE) == []
    (line,) = compared(golden, case, dataclasses.replace(trace, parameters=""), ELSEWHERE)
    assert line == "neox on zero3: the checkpoint has other names or shapes of parameters"
    (line,) = compared(golden, case, dataclasses.replace(trace, steps=trace.steps[:-1]), ELSEWHERE)
    assert line == "neox on zero3: 12 steps recorded, 11 found"
    assert compared(golden, case, trace, text="") == ["neox: the text is not the one that was recorded"]
    monkeypatch.setattr("tests.golden.trace.config_of", lambda name: {})
    assert compared(golden, case, trace) == ["neox: the config's file is not the one that was recorded"]


def test_other_initial_weights_or_greedy_tokens_fail() -> None:
    golden, case = load("tied"), Case("tied", "one")
    assert golden.greedy is not None
    said = {"initial_weights": golden.initial_weights, "greedy": golden.greedy}

    def found(said: dict[str, Any]) -> list[str]:
        trace = golden.layouts["one"]
        return list(differences(golden, case, trace, ELSEWHERE, golden.text_digest, said))

    assert found(said) == []
    assert found({**said, "initial_weights": ""}) == ["tied on one: other initial weights"]
    (line,) = found({**said, "greedy": {**golden.greedy, "ids": [[1], [2]]}})
    assert line.startswith("tied on one: greedy continuations [[1], [2]] found, ")


def test_a_missing_file_or_layout_fails_rather_than_skips(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="dense.json: no golden traces of dense; `python tests/golden/record.py`"):
        load("dense", tmp_path)
    shutil.copy(file_of("dense"), tmp_path)
    kept = json.loads(file_of("dense", tmp_path).read_text())
    del kept["layouts"]["tensor2"]
    file_of("dense", tmp_path).write_text(json.dumps(kept))
    golden = load("dense", tmp_path)
    assert compared(golden, Case("dense", "tensor2"), load("dense").layouts["tensor2"]) == [
        "dense on tensor2: not recorded"
    ]


def test_every_file_of_the_folder_is_of_a_config() -> None:
    others = {"json": {"tiles"}, "yaml": set()}  # digests of pictures, which tests/vision compares
    for kind in others:
        assert {path.stem for path in FOLDER.glob(f"*.{kind}")} - others[kind] == set(CONFIGS)
