"""Every layout that the validator accepts gives the answer of one process with nothing cut.

The model has everything on: NoPE, chunked and QK-normed layers, top-1 and top-2 routing with both losses, tied and
untied heads, a vocabulary that no number of ranks divides; rows are packed documents with uneven numbers of targets,
and clipping bites. No choice of a router is so close that rounding could turn it, so the checksums must agree.
"""

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from llm.args import ModelArgs
from llm.parallel.layout import Layout
from llm.parallel.validate import LAYOUT_RULES, Choice, Needs, problem
from tests.distributed.engine_job import ROWS, SEQ_LEN
from tests.distributed.harness import TINY_MODEL
from tests.distributed.test_zero import check, train
from tests.machine import needs

pytestmark = pytest.mark.distributed

Case = dict[str, Any]
WIDE = {"init_std": 0.1, "vocab_size": 67}
NEOX = {
    "norm": "layer", "parallel_residual": True, "gated": False, "act": "gelu", "ffn_bias": True, "qkv_bias": True,
    "o_bias": True, "rope_pct": 0.5, "rope_interleaved": False, "qk_norm": None, "n_kv_heads": 4,
}  # fmt: skip
GEMMA2 = {
    "norm_offset": True, "norm_place": "sandwich", "act": "gelu_tanh", "qk_norm": None, "embed_scale": 32**0.5,
    "attn_softcap": 2.0, "logit_softcap": 3.0, "score_scale": 0.3, "sliding_window": 9,
    "layer_pattern": ["attn:window", "attn:full"],
}  # fmt: skip
OLMO2 = {"norm_fp32_weight": True, "norm_place": "post", "qk_norm": "full", "qkv_bias": True, "n_kv_heads": 1}
MUSE = {
    "norm_offset": True, "final_norm_plain": True, "norm_place": "sandwich", "post_norm_eps": 1e-3, "embed_norm": True,
    "qk_norm": "plain", "attn_gate": True, "logit_scale": 0.7, "logit_softcap": 5.0, "score_scale": 0.6,
    "sliding_window": 9, "layer_pattern": ["attn:full:nope", "attn:window"],
}  # fmt: skip
BERT = {
    "norm": "layer", "norm_place": "post_add", "act": "gelu", "gated": False, "ffn_bias": True, "qkv_bias": True,
    "o_bias": True, "pos": "learned", "causal": False, "qk_norm": None, "nope_layer_interval": None,
}  # fmt: skip
FULL_EXPERTS = {
    "gated": False, "act": "gelu", "ffn_bias": True,
    "moe": {**TINY_MODEL["moe"], "swiglu": False, "capacity": 9, "overflow": True, "aux_times_experts": False},
}  # fmt: skip
MODELS: dict[str, Case] = {
    "top2": {"model": WIDE, "first": 300},
    "top1 tied": {"model": {**WIDE, "moe": {**TINY_MODEL["moe"], "top_k": 1}}, "tied": True, "first": 300},
    # the first two of four layers, a stage of their own, have no experts
    "late experts": {"model": {**WIDE, "moe": {**TINY_MODEL["moe"], "interleave": 4}}, "first": 300},
    "deep": {"model": {**WIDE, "n_layers": 8}, "tied": True, "first": 300},  # two stages of each of four ranks
    "one kv head": {"model": {**WIDE, "n_kv_heads": 1}, "first": 200},
    "neox": {"model": {**WIDE, **NEOX}, "first": 600},
    "gemma2": {"model": {**WIDE, **GEMMA2}, "tied": True, "first": 300},
    "olmo2": {"model": {**WIDE, **OLMO2}, "first": 400},
    "muse": {"model": {**WIDE, **MUSE}, "first": 0},
    "bert": {"model": {**WIDE, **BERT}, "first": 400},
    # five of eight assignments find their expert full
    "full experts": {"model": {**WIDE, **FULL_EXPERTS}, "first": 200},
    "small weights": {},  # init_std=0.02, for what rounds too much to compare choices
}
"""`first` is the first batch of data in whose 20 steps no choice comes near a tie."""
OPTIMIZERS = ("adamw", "sgd")
MARGIN = 1e-5
"""Of a choice, relative to the router's logits; rounding moves them by 1e-7, and 20 steps of training by 1e-6."""
CI_STEPS, STEPS = 6, 20

ON_TWO_RANKS: list[Case] = [
    {"tensor": 2, "accumulation": 2},
    {"tensor": 2, "of": "top1 tied", "optimizer": "sgd"},
    {"tensor": 2, "of": "one kv head", "recompute": "full"},
    {"tensor": 2, "sequence_parallel": False, "recompute": "selective"},
    {"expert": 2, "accumulation": 2},
    {"expert": 2, "of": "top1 tied", "optimizer": "sgd", "stage": 2},
    {"tensor": 2, "of": "neox", "recompute": "selective"},
    {"tensor": 2, "of": "muse"},
    {"tensor": 2, "of": "bert"},
    {"tensor": 2, "of": "full experts", "recompute": "full"},
    {"expert": 2, "of": "full experts", "accumulation": 2},
    {"pipeline": 2, "accumulation": 4},
    {"pipeline": 2, "of": "top1 tied", "optimizer": "sgd", "accumulation": 2, "recompute": "full"},
    {"pipeline": 2, "pipeline_schedule": "dualpipev", "of": "top1 tied", "accumulation": 4},
]
ON_FOUR_RANKS: list[Case] = [
    {"tensor": 2, "expert": 2, "accumulation": 2},
    {"tensor": 2, "stage": 3, "of": "top1 tied"},
    {"tensor": 4, "stage": 2, "optimizer": "sgd"},  # two key and value heads
    {"expert": 4, "stage": 2},
    {"tensor": 2, "expert": 2, "precision": "bf16", "of": "small weights"},
    {"pipeline": 2, "expert": 2, "accumulation": 2, "of": "late experts"},
]
ON_EIGHT_RANKS: list[Case] = [
    {"tensor": 2, "expert": 2, "stage": 2},
    {"pipeline": 2, "tensor": 2, "accumulation": 2},
    {"pipeline": 2, "tensor": 2, "accumulation": 4, "of": "top1 tied", "optimizer": "sgd", "recompute": "selective"},
]
BY_RANKS = {2: ON_TWO_RANKS, 4: ON_FOUR_RANKS, 8: ON_EIGHT_RANKS}


def accepted(ranks: int, precision: str = "fp32") -> list[Case]:
    """Tensor, expert and ZeRO stage of every layout of the test model on so many ranks."""
    args = ModelArgs.model_validate({**TINY_MODEL, "vocab_size": 67})
    needs = Needs(args, precision, False, SEQ_LEN, (("rows", ROWS),))
    found = []
    for tensor, expert, stage in product((1, 2, 4), (1, 2, 4), (1, 2, 3)):
        choice = Choice(Layout(ranks, tensor, expert, zero_stage=stage), 1)
        if problem(needs, choice, LAYOUT_RULES) is None and problem(needs, choice) is None:
            found.append({"tensor": tensor, "expert": expert, "stage": stage})
    return found


def matrix(ranks: int) -> list[Case]:
    """The accepted layouts with both optimizers and both models, SGD with two micro-batches where the rows suffice."""
    cases = []
    for layout, optimizer, of in product(accepted(ranks), OPTIMIZERS, ("top2", "top1 tied")):
        data = ranks // layout["tensor"]
        accumulation = 2 if optimizer == "sgd" and ROWS % (2 * data) == 0 else 1
        cases.append({**layout, "optimizer": optimizer, "of": of, "accumulation": accumulation})
    return cases


def pipelines(ranks: int) -> list[Case]:
    """Both schedules with every number of places in the pipeline, tensor- and expert-parallel ranks that fits, with
    the micro-batches that rows allow.
    """
    cases: list[Case] = []
    for schedule, places, tensor, expert in product(("1f1b", "dualpipev"), (2, 3, 4), (1, 2), (1, 2)):
        data, rest = divmod(ranks, places * tensor)
        if rest or data == 0 or data % expert:
            continue
        layout = {"pipeline": places, "pipeline_schedule": schedule, "tensor": tensor, "expert": expert}
        v = schedule == "dualpipev"
        for accumulation, recompute in ((2, "none"), (4, "full"), (8, "selective")):
            if ROWS % (accumulation * data) == 0 and accumulation >= 2 * places * v:
                deep = v and places > 2
                of, names = (("deep",), ("adamw",)) if deep else (("top2", "top1 tied"), OPTIMIZERS)
                both = [{"of": model, "optimizer": name} for model, name in product(of, names)]
                cases += [{**layout, "accumulation": accumulation, "recompute": recompute, **case} for case in both]
    return cases


def more_pipelines() -> dict[int, list[Case]]:
    """Pipelines of both schedules with other models, optimizers and precisions."""
    layouts = {2: [{"pipeline": 2}], 4: [{"pipeline": 2, "tensor": 2}, {"pipeline": 2}, {"pipeline": 4}]}
    others: list[Case] = [
        *({"of": of} for of in ("one kv head", "neox", "gemma2", "olmo2", "muse", "bert", "full experts")),
        {"optimizer": "muon"},
        {"offload": True},
        {"precision": "bf16", "of": "small weights"},
        {"precision": "fp16", "of": "small weights"},
    ]
    v = {"pipeline_schedule": "dualpipev", "accumulation": 4}
    cases: dict[int, list[Case]] = {}
    for ranks, of_ranks in layouts.items():
        cases[ranks] = [{**layout, "accumulation": 1} for layout in of_ranks]
        cases[ranks] += [{**layout, "accumulation": 2, **case} for layout, case in product(of_ranks, others)]
        of_four_stages = [layout for layout in of_ranks if layout["pipeline"] == 2]  # as many as layers
        cases[ranks] += [{**layout, **v, **case} for layout, case in product(of_four_stages, others)]
    cases[2] += [{"pipeline": 2, "accumulation": 2, "compile": True}, {"pipeline": 2, **v, "compile": True}]
    return cases


def extras() -> dict[int, list[Case]]:
    """Precisions and what saves memory or time, on layouts that cut in several ways."""
    both = {"tensor": 2, "expert": 2}
    return {
        2: [
            {"tensor": 2, "compile": True},
            {"expert": 2, "compile": True},
            {"tensor": 2, "precision": "fp16", "of": "small weights"},
        ],
        4: [
            *(
                {**layout, "of": of, "optimizer": optimizer}
                for of, optimizer in product(("neox", "gemma2", "olmo2", "muse", "bert", "full experts"), OPTIMIZERS)
                for layout in (both, {"tensor": 4}, {"tensor": 2, "stage": 3}, {"expert": 4, "stage": 2})
            ),
            {**both, "of": "neox", "recompute": "full", "sequence_parallel": False},
            {"tensor": 2, "stage": 3, "of": "gemma2", "recompute": "full", "accumulation": 2},
            {**both, "recompute": "selective", "sequence_parallel": False},
            {**both, "recompute": "full", "stage": 2},
            {**both, "offload": True, "stage": 2},
            {"tensor": 2, "stage": 3, "offload": True, "recompute": "selective"},
            {"tensor": 4, "of": "one kv head", "sequence_parallel": False},
            {**both, "of": "one kv head", "optimizer": "sgd", "accumulation": 2},
            {**both, "optimizer": "muon", "accumulation": 2},
            {"tensor": 2, "stage": 3, "optimizer": "muon", "of": "top1 tied"},
            {"tensor": 4, "stage": 2, "optimizer": "muon"},
            *({**layout, "precision": "bf16", "of": "small weights"} for layout in accepted(4, "bf16")),
        ],
        8: [{**layout, "precision": "bf16", "of": "small weights"} for layout in accepted(8, "bf16")],
    }


def prepared(case: Case, steps: int) -> Case:
    """The case as the job reads it."""
    own = {key: value for key, value in case.items() if key != "of"}
    return {**MODELS[case.get("of", "top2")], "steps": steps, **own}


def model_and_optimizer(case: Case) -> tuple[str, str]:
    """What of a case matters to one process."""
    return case.get("of", "top2"), case.get("optimizer", "adamw")


def references(folder: Path, cases: list[Case], steps: int) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """One process, for every model and optimizer of the cases."""
    names = sorted(set(map(model_and_optimizer, cases)))
    rows = train(folder, [prepared({"of": of, "optimizer": optimizer}, steps) for of, optimizer in names], 1)
    expected = dict(zip(names, rows, strict=True))
    for (of, optimizer), found in expected.items():
        if of != "small weights":
            assert min(row["margin"] for row in found) > MARGIN, (of, optimizer)
        assert min(row["grad_norm"] for row in found) > 0.5, "clipping at 0.5 must bite"
        assert len({row["checksum"] for row in found}) == steps, "routing must change for its checksum to show it"
    return expected


def check_all(
    subtests: pytest.Subtests,
    cases: list[Case],
    found: list[Any],
    expected: dict[tuple[str, str], list[dict[str, Any]]],
) -> None:
    for case, rows in zip(cases, found, strict=True):
        with subtests.test(**case):
            needs(case.get("precision", "fp32"))
            check(case, rows, expected[model_and_optimizer(case)])


@pytest.fixture(scope="module")
def few_steps(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[dict[str, Any]]]:
    return references(tmp_path_factory.mktemp("one"), ON_TWO_RANKS + ON_FOUR_RANKS + ON_EIGHT_RANKS, CI_STEPS)


@pytest.fixture(scope="module")
def many_steps(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[dict[str, Any]]]:
    cases = [case for ranks in (1, 2, 4, 8) for case in matrix(ranks) + extras().get(ranks, [])]
    cases += [case for ranks in (2, 4) for case in more_pipelines()[ranks]]
    cases += [case for ranks in (2, 3, 4, 6, 8) for case in pipelines(ranks)]
    return references(tmp_path_factory.mktemp("one"), cases, STEPS)


@pytest.mark.parametrize("ranks", [2, 4, pytest.param(8, marks=pytest.mark.full)])
def test_one_layout_of_each_kind_equals_one_process(
    tmp_path: Path, ranks: int, few_steps: Any, subtests: pytest.Subtests
) -> None:
    cases = BY_RANKS[ranks]
    check_all(subtests, cases, train(tmp_path, [prepared(case, CI_STEPS) for case in cases], ranks), few_steps)


def test_the_matrix_has_every_kind_of_layout() -> None:
    def layouts(ranks: int) -> set[tuple[int, ...]]:
        return {tuple(case.values()) for case in accepted(ranks)}

    assert layouts(1) == {(1, 1, 1), (1, 1, 2), (1, 1, 3)}
    assert layouts(2) == {(2, 1, 1), (2, 1, 2), (2, 1, 3), (1, 1, 1), (1, 1, 2), (1, 1, 3), (1, 2, 1), (1, 2, 2)}
    assert [len(accepted(ranks)) for ranks in (3, 4, 5, 6, 7, 8)] == [0, 15, 0, 0, 0, 19]


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_layout_equals_one_process(
    tmp_path: Path, ranks: int, many_steps: Any, subtests: pytest.Subtests
) -> None:
    cases = matrix(ranks)
    check_all(subtests, cases, train(tmp_path, [prepared(case, STEPS) for case in cases], ranks), many_steps)


@pytest.mark.full
@pytest.mark.parametrize("ranks", extras())
def test_precisions_and_what_saves_memory_equal_one_process(
    tmp_path: Path, ranks: int, many_steps: Any, subtests: pytest.Subtests
) -> None:
    cases = extras()[ranks]
    check_all(subtests, cases, train(tmp_path, [prepared(case, STEPS) for case in cases], ranks), many_steps)


@pytest.mark.full
@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8])
def test_every_pipeline_equals_one_process(
    tmp_path: Path, ranks: int, many_steps: Any, subtests: pytest.Subtests
) -> None:
    cases = pipelines(ranks)
    assert cases
    check_all(subtests, cases, train(tmp_path, [prepared(case, STEPS) for case in cases], ranks), many_steps)


@pytest.mark.full
@pytest.mark.parametrize("ranks", more_pipelines())
def test_pipelines_of_other_models_and_precisions_equal_one_process(
    tmp_path: Path, ranks: int, many_steps: Any, subtests: pytest.Subtests
) -> None:
    cases = more_pipelines()[ranks]
    check_all(subtests, cases, train(tmp_path, [prepared(case, STEPS) for case in cases], ranks), many_steps)
