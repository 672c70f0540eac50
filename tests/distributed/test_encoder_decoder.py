"""Encoder-decoders give the answer of one process on every layout, and send the bytes that are predicted.

The model has experts on both sides and drops at every place; rows are two documents of both sides with padding of the
source, or one. No choice of a router is so close that rounding could turn it, so the checksums must agree.
"""

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import TINY_MODEL
from tests.distributed.test_layouts import MARGIN
from tests.distributed.test_traffic import BERT, DUALPIPEV, EVERYWHERE, INT8, LORA, case, check_all, fetching
from tests.distributed.test_zero import check, train
from tests.machine import needs

pytestmark = pytest.mark.distributed

Case = dict[str, Any]
FEW, STEPS = 4, 12
DROPPED = {"dropout": 0.1, "ffn_dropout": 0.1}
OF_BOTH = {"init_std": 0.1, "vocab_size": 67, "n_layers": 2, "encoder_layers": 2, **DROPPED}
FULL_EXPERTS = {**TINY_MODEL["moe"], "capacity": 11, "overflow": True}
MODELS: dict[str, Case] = {
    "experts": {"model": OF_BOTH, "first": 200},
    "tied": {"model": {**OF_BOTH, "encoder_layers": 4}, "tied": True, "first": 500},
    "single": {"model": OF_BOTH, "packed": False, "first": 100},
    "learned": {"model": {**OF_BOTH, **BERT, "attn_dropout": 0.1}, "first": 100},
    "frozen encoder": {"model": OF_BOTH, "freeze": ["encoder.*"], "first": 600},
    "frozen decoder": {"model": OF_BOTH, "freeze": ["layers.*", "norm.*"], "first": 200},
    "adapted": {"model": {**OF_BOTH, "lora": {"rank": 3, "dropout": 0.1}}, "first": 700},
    "int8": {"model": {**OF_BOTH, "lora": {"rank": 3, "base": "int8"}}, "first": 500},
    "muon": {"model": OF_BOTH, "optimizer": "muon", "first": 600},
    "capacity": {"model": {**OF_BOTH, "moe": FULL_EXPERTS}, "first": 400},
    "small weights": {"model": {**OF_BOTH, "init_std": 0.02}},
}
"""`first` is the first batch of data in whose steps no choice comes near a tie."""
ON_TWO_RANKS: list[Case] = [
    {"accumulation": 2},
    {"tensor": 2},
    {"stage": 3, "of": "tied", "recompute": "full"},
    {"pipeline": 2, "of": "tied", "accumulation": 4},
    {"pipeline": 2, "of": "single", "accumulation": 2},
]
CUTS: list[Case] = [
    {"stage": 2, "accumulation": 2},
    {"stage": 3},
    {"tensor": 2, "accumulation": 2},
    {"tensor": 2, "sequence_parallel": False},
    {"expert": 2},
    {"pipeline": 2, "accumulation": 2},
    {"pipeline": 2, "pipeline_schedule": "dualpipev", "accumulation": 4},
]
MORE_ON_TWO_RANKS: dict[str, list[Case]] = {
    of: [
        {**cut, "of": of, "recompute": ("none", "selective", "full")[(i + j) % 3]}
        for j, cut in enumerate(CUTS)
        if (of, "expert" in cut) != ("int8", True) and (of != "muon" or "pipeline_schedule" not in cut)
    ]
    for i, of in enumerate(MODELS)
    if of != "small weights"
}
"""Every model on every cut, with one of the ways of recomputation each."""
MORE_ON_TWO_RANKS["compiled"] = [{**cut, "compile": True} for cut in ({}, {"tensor": 2}, {"pipeline": 2})]
MORE_ON_TWO_RANKS["bf16"] = [
    {**cut, "precision": "bf16", "of": "small weights"} for cut in ({}, {"stage": 3}, {"tensor": 2})
]
ON_FOUR_RANKS: list[Case] = [
    {"pipeline": 4, "of": "tied", "accumulation": 4},
    {"pipeline": 2, "tensor": 2, "accumulation": 2, "of": "single"},
    {"pipeline": 2, "tensor": 2, "pipeline_schedule": "dualpipev", "accumulation": 4, "of": "capacity"},
    {"pipeline": 2, "expert": 2, "accumulation": 2},
    {"tensor": 2, "stage": 3, "recompute": "full", "of": "learned"},
    {"tensor": 2, "expert": 2, "of": "capacity"},
    {"tensor": 4, "of": "adapted"},
]


def prepared(given: Case, steps: int) -> Case:
    """The case as the job reads it."""
    own = {key: value for key, value in given.items() if key != "of"}
    return {**MODELS[given.get("of", "experts")], "steps": steps, **own}


def compare(folder: Path, cases: list[Case], ranks: int, steps: int, subtests: pytest.Subtests) -> None:
    """The cases with what one process makes of their models."""
    names = sorted({given.get("of", "experts") for given in cases})
    expected = dict(zip(names, train(folder, [prepared({"of": of}, steps) for of in names], 1), strict=True))
    for of, found in expected.items():
        if of != "small weights":
            assert min(row["margin"] for row in found) > MARGIN, of
        assert len({row["checksum"] for row in found}) == steps, "routing must change for its checksum to show it"
    for given, found in zip(cases, train(folder, [prepared(given, steps) for given in cases], ranks), strict=True):
        with subtests.test(**given):
            needs(given.get("precision", "fp32"))
            check(given, found, expected[given.get("of", "experts")])


def test_one_layout_of_each_kind_equals_one_process(tmp_path: Path, subtests: pytest.Subtests) -> None:
    compare(tmp_path, ON_TWO_RANKS, 2, FEW, subtests)


@pytest.mark.full
@pytest.mark.parametrize("of", MORE_ON_TWO_RANKS)
def test_every_layout_of_two_ranks_equals_one_process(tmp_path: Path, of: str, subtests: pytest.Subtests) -> None:
    compare(tmp_path, MORE_ON_TWO_RANKS[of], 2, STEPS, subtests)


@pytest.mark.full
def test_layouts_of_four_ranks_equal_one_process(tmp_path: Path, subtests: pytest.Subtests) -> None:
    compare(tmp_path, ON_FOUR_RANKS, 4, STEPS, subtests)


def sent(along: str, model: Case | None = None, **sections: Any) -> Case:
    """A case of test_traffic.py: more layers in the encoder than in the decoder, and a source shorter than the target.
    """
    return case(along, model={"encoder_layers": 3, "n_layers": 2, **(model or {})}, **sections)


TIED, NORMED = {"tie_embeddings": True}, {"qk_norm": "full"}
LEARNED = {**BERT, "causal": True}
ENCODER, DECODER, BELOW = ("encoder.*",), ("layers.*", "norm.*"), ("encoder.*", "tok_embeddings.*")
SENT_BY_TWO = [
    sent("tensor", tensor=2, micro=4, model=NORMED),
    sent("data", zero_stage=3, deepspeed=fetching(50, 900, 800)),
    sent("data expert", expert=2, recompute="full"),
    sent("pipeline", pipeline=2, model=TIED),
]
MORE_SENT_BY_TWO = [
    sent("data"),
    *(
        sent("tensor", tensor=2, micro=4, model=NORMED, sequence_parallel=cut, recompute=again)
        for cut, again in product((True, False), ("none", "full", "selective"))
    ),
    *(
        sent("tensor", tensor=2, micro=4, model=NORMED, sequence_parallel=cut, freeze=freeze)
        for cut, freeze in product((True, False), (ENCODER, DECODER, BELOW))
    ),
    sent("tensor", tensor=2, micro=4, **LORA),
    sent("data expert", expert=2),
    sent("data expert", expert=2, recompute="full", model={"moe": {**FULL_EXPERTS, "capacity": 2}}),  # all are full
    *(
        sent("data", zero_stage=3, model=model, recompute=again, deepspeed=fetching(*options))
        for options in ((50, 900, 800), (0, 0, 0), (500, 3000, 2000), (100, 0, 1500))
        for again, model in product(("none", "full"), ({}, TIED, {"qk_norm": "head"}, LEARNED))
    ),
    *(
        sent("data", zero_stage=3, freeze=freeze, deepspeed=fetching(*options))
        for freeze, options in product((ENCODER, DECODER, BELOW), ((50, 900, 800), (0, 0, 0)))
    ),
    sent("data", zero_stage=3, deepspeed=fetching(50, 900, 800), **EVERYWHERE),
    sent("data", zero_stage=1, **INT8),
    sent("data", zero_stage=1, precision="bf16", optim={"name": "muon", "ema_decay": 0.9}),
    *(sent("pipeline", pipeline=2, model=TIED, freeze=freeze) for freeze in (ENCODER, DECODER, BELOW)),
    sent("pipeline", pipeline=2, **LORA),
    sent("pipeline", **{**DUALPIPEV, "model": TIED}),
]
SENT_BY_FOUR = [
    sent("pipeline replica tensor", pipeline=2, tensor=2, recompute="full"),
    sent("data expert pipeline world", pipeline=2, expert=2),
    sent("data expert tensor world", tensor=2, expert=2, precision="bf16"),
    sent("data tensor world", tensor=2, zero_stage=3, deepspeed=fetching(50, 900, 800)),
    sent("pipeline", pipeline=4, micro=1, model=TIED),
]


def test_bytes_and_memory_are_as_predicted(tmp_path: Path, subtests: pytest.Subtests) -> None:
    check_all(tmp_path, SENT_BY_TWO, 2, subtests)


@pytest.mark.full
@pytest.mark.parametrize(("ranks", "cases"), [(2, MORE_SENT_BY_TWO), (4, SENT_BY_FOUR)], ids=["two", "four"])
def test_bytes_and_memory_of_every_kind_are_as_predicted(
    tmp_path: Path, ranks: int, cases: list[Case], subtests: pytest.Subtests
) -> None:
    check_all(tmp_path, cases, ranks, subtests)
