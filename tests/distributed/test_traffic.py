"""Bytes sent and memory kept, predicted from the numbers of a run, are those counted in the run: exactly, as both are
sums of sizes of tensors.
"""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pool import run_job
from tests.distributed.vision_job import VISION
from tests.machine import has

pytestmark = pytest.mark.distributed

Case = dict[str, Any]
OTHER = ("model", "optim", "deepspeed", "lora", "task")
"""Keys of a case that are no part of `parallel`."""


def case(
    along: str,
    *,
    micro: int = 2,
    precision: str = "fp32",
    recompute: str = "none",
    freeze: tuple[str, ...] = (),
    **sections: Any,
) -> Case:
    """`along`: the dimensions that must send something. Keys of `parallel` stand for themselves."""
    train = {"micro_batch_size": micro, "precision": precision, "activation_checkpointing": recompute, "freeze": freeze}
    other = {name: sections.pop(name) for name in OTHER if name in sections}
    return {"along": along.split(), "train": train, "parallel": sections, **other}


def fetching(small: int, reuse: int, ahead: int, **more: int) -> dict[str, Any]:
    """DeepSpeed's options of ZeRO-3 brought down to the size of the model here, where its own would gather all at once.
    """
    names = ("stage3_param_persistence_threshold", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size")
    return {"zero_optimization": dict(zip(names, (small, reuse, ahead), strict=True)) | more}


DUALPIPEV: Case = {"pipeline": 2, "pipeline_schedule": "dualpipev", "micro": 1, "model": {"n_layers": 4}}
"""Four stages and micro-batches."""
LOWER = ("tok_embeddings.*", "layers.0.*", "layers.1.attention.w[qo].*", "layers.1.*.experts.*")
"""Frozen: no gradient reaches the first layer."""
SCATTERED = ("*_norm.*", "*.wk.*", "*.router.*", "*.experts.*", "norm.*")
"""Frozen: gradients pass through."""
LORA: dict[str, Any] = {"lora": {"rank": 3}}
EVERYWHERE: dict[str, Any] = {
    "lora": {"rank": 3, "targets": ["wk", "wo", "w2", "experts", "tok_embeddings"], "token_rows": [20, 40]}
}
INT8: dict[str, Any] = {"lora": {"rank": 3, "base": "int8"}}
DROPPED: dict[str, Any] = {"lora": {"rank": 3, "dropout": 0.5}}
ALL_DROPPED: dict[str, Any] = {"model": {"dropout": 0.5, "ffn_dropout": 0.5}}
PAIRS: dict[str, Any] = {"task": "dpo"}
TASKS: dict[str, Any] = {"task": [{"task": "lm", "source": "plain"}, {"task": "mlm", "source": "hidden"}]}
OF_VALUES: dict[str, dict[str, Any]] = {
    "regression": {"input_dim": 3, "output_dim": 2, "causal": False},
    "autoregressive": {"input_dim": 3, "output_dim": 3},
}
"""Models of values, by task."""
LABELS: dict[str, Any] = {"task": "prediction", "model": {"n_prediction": 5}}
SEEING: dict[str, Any] = {"model": {"vision": VISION}}
TOWER, TEXT = ("vision_embeddings.*",), ("tok_embeddings.*", "layers.*", "norm.*", "output.*")
ON_TOWER: dict[str, Any] = {
    **SEEING, "lora": {"rank": 3, "targets": ["wk", "vision.wq", "vision.w2", "vision.fc1", "vision_projection"]}
}  # fmt: skip
UPPER = ("layers.[12].*", "norm.*", "output.*")


def mixers(*pattern: str, groups: int = 1, **more: Any) -> dict[str, Any]:
    """A model whose layers have other mixers, too; the channels of a group of state-space heads lie on all ranks."""
    ssm = {"d_state": 8, "head_width": 6, "chunk": 8, "groups": groups}
    return {"model": {"layer_pattern": list(pattern), "ssm": ssm, "route": {}, **more}}


HYBRID = mixers("ssm@2+dense", "routed+none", "attn@3+dense")
ON_TWO_RANKS = [
    case("tensor", tensor=2, micro=4, freeze=LOWER),
    case("data", zero_stage=3, freeze=LOWER, deepspeed=fetching(50, 900, 800)),
    case("data", zero_stage=3, deepspeed=fetching(50, 900, 800), **EVERYWHERE),
    case("tensor", tensor=2, micro=4, **LORA),
    case("data", zero_stage=1),
    case("data", zero_stage=2, precision="bf16"),
    case("data", zero_stage=3, deepspeed=fetching(500, 3000, 2000)),
    case("tensor", tensor=2, micro=4),
    case("tensor", tensor=2, micro=4, sequence_parallel=False, recompute="full"),
    case("data expert", expert=2, precision="bf16", recompute="full"),
    case("pipeline", pipeline=2),
    case("pipeline", pipeline=2, precision="bf16", model={"tie_embeddings": True}, optim={"ema_decay": 0.9}),
    case("tensor", tensor=2, micro=4, **SEEING),
    case("data", zero_stage=3, deepspeed=fetching(100, 900, 800), **SEEING),
    case("tensor", tensor=2, micro=4, freeze=("layers.0.*", "tok_embeddings.*"), **HYBRID),
]
ON_FOUR_RANKS = [
    case("data expert tensor world", tensor=2, expert=2),
    case("data expert tensor world", tensor=2, expert=2, zero_stage=2, precision="bf16", recompute="selective"),
    case("data tensor world", tensor=2, zero_stage=3, recompute="full", deepspeed=fetching(50, 900, 800)),
    case("data expert expert_data", expert=2, micro=1, precision="bf16"),
    case("data pipeline world", tensor=1, pipeline=2, model={"tie_embeddings": True}),
    case("pipeline replica tensor", tensor=2, pipeline=2, recompute="full", optim={"lr_factors": {"embedding": 0.5}}),
]

BIASED = {"norm": "layer", "ffn_bias": True, "qkv_bias": True, "o_bias": True}
BERT = {
    **BIASED, "norm_place": "post_add", "gated": False, "act": "gelu", "pos": "learned", "qk_norm": None,
    "nope_layer_interval": None,
}  # fmt: skip
POSITIONS_FROZEN = ("pos_embeddings.*", "layers.0.*")
ONE_MOE_KIND = {"n_experts": 4, "hidden": 24, "interleave": 1}
FULL_EXPERTS: dict[str, Any] = {
    "gated": False, "act": "gelu", "ffn_bias": True,
    "moe": {**ONE_MOE_KIND, "top_k": 2, "interleave": 2, "swiglu": False, "capacity": 9, "overflow": True},
}  # fmt: skip


def full_experts(**moe: Any) -> dict[str, Any]:
    """Without a shared expert, and so with the overflow expert as the last module."""
    return {**FULL_EXPERTS, "moe": {**FULL_EXPERTS["moe"], "shared": False, **moe}}


MORE_ON_TWO_RANKS = [
    *(
        case(along, task=task, model=model, recompute=again, **parallel)
        for task, model in OF_VALUES.items()
        for again in ("none", "full")
        for along, parallel in (
            ("data", dict(zero_stage=2)), ("data", dict(zero_stage=3)), ("pipeline", dict(pipeline=2)),
            ("tensor", dict(tensor=2)), ("tensor", dict(tensor=2, sequence_parallel=False)),
        )
    ),
    *(
        case("data", zero_stage=stage, precision=bits, freeze=freeze)
        for stage, bits in ((0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (2, "fp32"))
        for freeze in (LOWER, SCATTERED)
    ),
    *(
        case("data", zero_stage=3, freeze=freeze, deepspeed=fetching(*options))
        for freeze in (LOWER, SCATTERED, UPPER)
        for options in ((0, 0, 0), (500, 3000, 2000), (100, 0, 1500))
    ),
    *(
        case("tensor", tensor=2, micro=4, sequence_parallel=cut, freeze=freeze, model={"qk_norm": norm})
        for cut in (True, False)
        for freeze in (LOWER, SCATTERED, UPPER)
        for norm in ("l2", "full")
    ),
    *(
        case("tensor", tensor=2, micro=4, sequence_parallel=cut, freeze=freeze, recompute=recompute)
        for cut in (True, False)
        for freeze in (LOWER, SCATTERED, UPPER)
        for recompute in ("selective", "full")
    ),
    *(
        case("data expert", expert=2, precision="bf16", freeze=freeze, recompute=recompute)
        for freeze in (LOWER, SCATTERED, UPPER)
        for recompute in ("none", "full")
    ),
    *(case("pipeline", pipeline=2, freeze=freeze) for freeze in (LOWER, SCATTERED, UPPER)),
    case("pipeline", pipeline=2, freeze=LOWER, model={"tie_embeddings": True}),
    case("data", zero_stage=1, offload_optimizer=True, precision="bf16", freeze=LOWER),
    case("data", zero_stage=3, precision="bf16", freeze=SCATTERED, optim={"name": "muon", "ema_decay": 0.9}),
    *(
        case("data", zero_stage=stage, precision=bits, **lora)
        for stage, bits in ((0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (2, "fp32"))
        for lora in (LORA, EVERYWHERE)
    ),
    *(
        case("data", zero_stage=3, deepspeed=fetching(*options), **lora)
        for lora in (LORA, EVERYWHERE)
        for options in ((0, 0, 0), (500, 3000, 2000), (100, 0, 1500))
    ),
    *(case("tensor", tensor=2, micro=4, sequence_parallel=cut, **EVERYWHERE) for cut in (True, False)),
    *(case("data expert", expert=2, precision="bf16", recompute=again, **LORA) for again in ("none", "full")),
    *(case("data", zero_stage=stage, precision="bf16", **INT8) for stage in (1, 2, 3)),
    case("data", zero_stage=3, deepspeed=fetching(100, 0, 1500), **INT8),
    case("tensor", tensor=2, micro=4, **INT8),
    case("data expert", expert=2, recompute="full", **INT8),
    case("pipeline", pipeline=2, **INT8),
    *(case("data expert", expert=2, recompute=again, **DROPPED) for again in ("none", "full")),
    *(
        case(along, recompute=again, **layout, **ALL_DROPPED)
        for again in ("none", "selective", "full")
        for along, layout in (
            ("data expert", {"expert": 2}),
            ("tensor", {"tensor": 2, "micro": 4}),
            ("tensor", {"tensor": 2, "micro": 4, "sequence_parallel": False}),
            ("data", {"zero_stage": 3, "deepspeed": fetching(50, 900, 800)}),
        )
    ),
    *(case("pipeline", pipeline=2, model={"tie_embeddings": tied}, **EVERYWHERE) for tied in (True, False)),
    case("data", zero_stage=1, precision="bf16", optim={"name": "muon", "ema_decay": 0.9}, **EVERYWHERE),
    case("tensor", tensor=2, micro=4, **PAIRS),
    *(
        case("tensor", tensor=2, micro=4, sequence_parallel=cut, freeze=freeze, recompute=again, **SEEING)
        for cut in (True, False)
        for freeze in ((), TOWER, TEXT, TEXT + TOWER, (*TOWER, "vision_projection.*"))
        for again in ("none", "full")
    ),
    case("tensor", tensor=2, micro=4, **ON_TOWER),
    *(
        case("data", zero_stage=3, freeze=freeze, deepspeed=fetching(*options), **SEEING)
        for freeze in ((), TOWER, TEXT, TEXT + TOWER, ("vision_embeddings.layers.0.*", "vision_embeddings.[cp]*"))
        for options in ((0, 0, 0), (500, 3000, 2000), (100, 0, 1500))
    ),
    case("data", zero_stage=3, recompute="full", deepspeed=fetching(50, 900, 800), **SEEING),
    case("data", zero_stage=3, deepspeed=fetching(50, 900, 800), **ON_TOWER),
    *(case("data", zero_stage=stage, precision=bits, **SEEING) for stage, bits in ((1, "bf16"), (2, "fp32"))),
    *(case("pipeline", pipeline=2, model={"tie_embeddings": tied, "vision": VISION}) for tied in (True, False)),
    case("data expert", expert=2, freeze=TOWER, **SEEING),
    *(
        case("data", zero_stage=3, deepspeed=fetching(*options), **PAIRS)
        for options in ((0, 0, 0), (500, 3000, 2000), (100, 0, 1500))
    ),
    *(case("pipeline", pipeline=2, model={"tie_embeddings": tied}, **PAIRS) for tied in (True, False)),
    case("data", zero_stage=3, deepspeed=fetching(0, 0, 0), model=BERT),
    case("data", zero_stage=3, recompute="full", deepspeed=fetching(500, 3000, 2000), model=BERT),
    case("data", zero_stage=3, freeze=LOWER, deepspeed=fetching(100, 0, 1500), model=BERT),
    case("data", zero_stage=3, freeze=POSITIONS_FROZEN, recompute="full", deepspeed=fetching(0, 0, 0), model=BERT),
    case("tensor", tensor=2, micro=4, model=BERT),
    *(case("pipeline", pipeline=2, model={**BERT, "tie_embeddings": tied}) for tied in (True, False)),
    *(case("tensor", tensor=2, micro=4, sequence_parallel=cut, **TASKS) for cut in (True, False)),
    *(
        case("data", zero_stage=3, model={"tie_embeddings": tied}, deepspeed=fetching(*options), **TASKS)
        # a tied table of which nothing is kept is predicted to be gathered once more than it is
        for options, tied in product(((0, 0, 0), (500, 3000, 2000), (100, 0, 1500)), (True, False))
        if options[1:] != (0, 0) or not tied
    ),
    *(case("pipeline", pipeline=2, model={"tie_embeddings": tied}, **TASKS) for tied in (True, False)),
    case("data expert", expert=2, precision="bf16", recompute="full", **TASKS),
    *(
        case("data", zero_stage=3, freeze=freeze, deepspeed=fetching(*options), **LABELS)
        for freeze in ((), LOWER, ("prediction.*",))
        for options in ((0, 0, 0), (500, 3000, 2000), (100, 0, 1500))
    ),
    *(case("data", zero_stage=stage, precision=bits, **LABELS) for stage, bits in ((0, "fp32"), (1, "bf16"))),
    *(case("data", zero_stage=2, freeze=freeze, **LABELS) for freeze in ((), LOWER, SCATTERED)),
    case("data", zero_stage=2, precision="bf16", **LABELS),
    *(case("tensor", tensor=2, micro=4, sequence_parallel=cut, **LABELS) for cut in (True, False)),
    *(
        case("pipeline", pipeline=2, **LABELS | {"model": {"n_prediction": 5, "tie_embeddings": tied}})
        for tied in (True, False)
    ),
    case("data", zero_stage=3, deepspeed=fetching(100, 0, 1500), model=FULL_EXPERTS),
    case("data", zero_stage=3, recompute="full", deepspeed=fetching(50, 900, 800), model=FULL_EXPERTS),
    case("tensor", tensor=2, micro=4, recompute="selective", model=FULL_EXPERTS),
    *(
        case("data", zero_stage=3, recompute="full", deepspeed=fetching(0, 0, 0), model=full_experts(apply=apply))
        for apply in ("input", "output")
    ),
    case("data", zero_stage=0),
    case("data", zero_stage=2),
    case("data", zero_stage=1, precision="bf16", optim={"ema_decay": 0.9}),
    case("data", zero_stage=1, precision="fp16"),
    case("data", zero_stage=2, precision="fp16", optim={"name": "sgd"}),
    case("data", zero_stage=3, precision="fp16"),
    case("data", zero_stage=1, offload_optimizer=True),
    case("data", zero_stage=1, offload_optimizer=True, precision="bf16"),
    case("data", zero_stage=2, offload_optimizer=True, precision="bf16"),
    case("data", zero_stage=3, offload_optimizer=True, precision="bf16"),
    case("data", zero_stage=1, optim={"name": "muon"}),
    case("data", zero_stage=3, optim={"name": "muon"}),
    case("tensor", tensor=2, zero_stage=3, optim={"name": "muon"}),
    case("data expert", expert=2, zero_stage=2, precision="bf16", optim={"name": "muon"}),
    *(
        case("data", zero_stage=3, micro=micro, recompute=recompute, deepspeed=fetching(*options))
        for micro in (1, 2, 4)
        for recompute in ("none", "full", "selective")
        for options in ((0, 0, 0), (0, 10**9, 5 * 10**7), (500, 3000, 2000), (100, 0, 1500))
    ),
    case("data", zero_stage=3, deepspeed=fetching(10, 10000, 3000, stage3_max_live_parameters=9000)),
    case("data", zero_stage=3, model={"tie_embeddings": True}, deepspeed=fetching(100, 5000, 0, sub_group_size=1000)),
    *(
        case(along, recompute=recompute, model=model, **layout)
        for along, layout in (
            ("tensor", {"tensor": 2}),
            ("data", {"zero_stage": 3, "deepspeed": fetching(20, 0, 0)}),
            ("data expert", {"expert": 2}),
        )
        for recompute in ("none", "full", "selective")
        for model in (
            {"moe": {**ONE_MOE_KIND, "top_k": 1, "shared": False}},
            {"moe": {**ONE_MOE_KIND, "top_k": 2, "shared": False, "apply": "output"}},
            {"moe": {**ONE_MOE_KIND, "top_k": 2, "z_alpha": 0.001}},
            {"qk_norm": "full"},
            {"qk_norm": "head"},
            {"norm_place": "post", "qk_norm": "full"},
            {"norm_place": "sandwich", "norm_offset": True, "moe": {**ONE_MOE_KIND, "top_k": 1, "z_alpha": 0.001}},
            {**BIASED, "parallel_residual": True, "gated": False},
        )
    ),
    case("tensor", tensor=2, recompute="full", model={"layer_pattern": ["attn+none", "attn+dense"]}),
    *(
        case("tensor", tensor=2, micro=4, recompute=again, sequence_parallel=cut, **mixers("ssm+dense", "ssm+none"))
        for again in ("none", "full")
        for cut in (True, False)
    ),
    case("tensor", tensor=2, micro=4, **mixers("ssm+dense", groups=2)),
    case("tensor", tensor=2, micro=4, recompute="full", **mixers(
        "ssm@2+moe", "attn@3+dense", "routed+dense", qk_norm="head"
    )),
    *(
        case(along, recompute=again, **parallel, **mixers("sum+none", "none+dense", "sum+dense", qk_norm="full"))
        for again in ("none", "full")
        for along, parallel in (("tensor", dict(tensor=2, micro=4)), ("data", dict(zero_stage=3)))
    ),
    *(
        case("tensor", tensor=2, micro=4, freeze=("*.wx.*",), model=HYBRID["model"] | {
            "ssm": HYBRID["model"]["ssm"] | {"norm": place}
        })
        for place in ("before_gate", "none")
    ),
    case("tensor", tensor=2, micro=4, recompute="selective", **mixers(
        "ssm@2+dense", "attn@3+dense", "routed+none", route={"combine": "select"}, norm_place="sandwich"
    )),
    case("tensor", tensor=2, micro=4, sequence_parallel=False, **HYBRID),
    case("data", zero_stage=1, **HYBRID),
    case("data", zero_stage=3, recompute="full", **mixers("ssm+none")),
    case("pipeline", pipeline=2, **HYBRID),
    *(
        case(along, freeze=freeze, **parallel, **HYBRID)
        for freeze in (
            ("*.wx.*", "*.conv_*"), ("*.A_log", "*.D", "*.dt_bias", "tok_embeddings.*"), ("*.attention.*",),
            ("layers.0.*", "tok_embeddings.*", "layers.1.attention.attn.*"),
        )
        for along, parallel in (("tensor", dict(tensor=2, micro=4)), ("data", dict(zero_stage=3)))
    ),
]
MORE_ON_FOUR_RANKS = [
    case("data expert tensor world", tensor=2, expert=2, freeze=LOWER),
    case("pipeline replica tensor", tensor=2, pipeline=2, freeze=LOWER),
    case("data expert tensor world", tensor=2, expert=2, **EVERYWHERE),
    case("data pipeline world", pipeline=2, model={"tie_embeddings": True}, precision="bf16", **EVERYWHERE),
    case("pipeline replica tensor", tensor=2, freeze=LOWER, **DUALPIPEV),
    case("data tensor world", tensor=2, zero_stage=3, freeze=SCATTERED, deepspeed=fetching(50, 900, 800)),
    *(
        case("pipeline replica tensor", tensor=2, pipeline=2, precision=bits, sequence_parallel=cut, recompute=again)
        for bits, cut, again in (("bf16", True, "selective"), ("fp32", False, "full"), ("bf16", False, "none"))
    ),
    case("pipeline replica tensor", tensor=2, pipeline=2, model={"tie_embeddings": True}, optim={"name": "muon"}),
    case("data pipeline world", pipeline=2, precision="bf16", optim={"lr_factors": {"head": 0.5}}),
    *(
        case("pipeline replica tensor", tensor=2, precision=bits, sequence_parallel=cut, recompute=again, **DUALPIPEV)
        for bits, cut, again in (("fp32", True, "none"), ("bf16", True, "selective"), ("fp16", False, "full"))
    ),
    case("data pipeline world", **(DUALPIPEV | {"model": {"n_layers": 5, "tie_embeddings": True}})),
    *(case("data expert pipeline world", expert=2, precision=bits, **DUALPIPEV) for bits in ("fp32", "bf16")),
    case("pipeline", pipeline=4, micro=1, model={"n_layers": 5, "tie_embeddings": True}),
    *(case("data expert pipeline world", pipeline=2, expert=2, precision=bits) for bits in ("fp32", "bf16")),
    case("data expert tensor world", tensor=2, expert=2, sequence_parallel=False, precision="bf16", recompute="full"),
    case("data expert tensor world", tensor=2, expert=2, zero_stage=2, offload_optimizer=True, precision="bf16"),
    case("data expert", expert=4, micro=1, zero_stage=2, precision="fp16"),
    case("tensor", tensor=4, micro=4, model={"qk_norm": "full"}),
    case("data expert tensor world", tensor=2, expert=2, zero_stage=2, optim={"name": "muon"}),
    case("data tensor world", tensor=2, zero_stage=3, optim={"name": "muon"}),
    case("data", micro=1, zero_stage=0),
    case("data", micro=1, zero_stage=2),
    case("data", micro=1, zero_stage=3, precision="bf16"),
]


def compare(folder: Path, cases: list[Case], nproc: int) -> list[dict[str, Any] | None]:
    """What each case found; None where this device lacks its precision."""
    file, out = folder / "cases.json", folder / "out.json"
    here = [has(case["train"]["precision"]) for case in cases]
    file.write_text(json.dumps([case for case, possible in zip(cases, here, strict=True) if possible]))
    done = run_job("tests/distributed/traffic_job.py", str(file), str(out), nproc=nproc, timeout=1500)
    assert done.returncode == 0, done.stderr
    found = iter(json.loads(out.read_text()))
    return [next(found) if possible else None for possible in here]


def check(case: Case, found: dict[str, Any]) -> None:
    assert sorted(found["sent"]) == case["along"], case
    for along, (predicted, counted) in found["sent"].items():
        assert predicted == counted, (case, along)
    for part in ("parameters", "int8", "masters", "optimizer", "ema"):
        for predicted, measured in found["memory"]:
            assert predicted[part] == measured[part], (case, part)
    gradients = [(predicted["gradients"], measured["gradients"]) for predicted, measured in found["memory"]]
    if gradients[0][1] is not None:  # where ranks keep unequal parts, the most is predicted
        assert max(predicted for predicted, _ in gradients) == max(measured for _, measured in gradients), case


def check_all(folder: Path, cases: list[Case], nproc: int, subtests: pytest.Subtests) -> None:
    for case_, found in zip(cases, compare(folder, cases, nproc), strict=True):
        with subtests.test(**case_):
            if found is None:
                pytest.skip(f"this device has no {case_['train']['precision']} arithmetic")
            check(case_, found)


@pytest.mark.parametrize(("nproc", "cases"), [(2, ON_TWO_RANKS), (4, ON_FOUR_RANKS)], ids=["two ranks", "four ranks"])
def test_bytes_and_memory_are_as_predicted(
    tmp_path: Path, nproc: int, cases: list[Case], subtests: pytest.Subtests
) -> None:
    check_all(tmp_path, cases, nproc, subtests)


def test_gradients_of_whole_parameters_cost_one_collective_a_step(
    tmp_path: Path, subtests: pytest.Subtests
) -> None:
    """Two tensor-parallel ranks and eight micro-batches, each with the edges of its regions, the embedding's, the
    head's, and one exchange of the loss; then come the step's sums, these gradients, and the norm."""
    settings = [("bf16", True), ("fp32", False)]
    cases = [case("tensor", tensor=2, micro=1, precision=bits, sequence_parallel=cut) for bits, cut in settings]
    for (precision, cut), found in zip(settings, compare(tmp_path, cases, 2), strict=True):
        with subtests.test(precision=precision, sequence_parallel=cut):
            if found is None:
                pytest.skip(f"this device has no {precision} arithmetic")
            edges = 4 if cut else 2  # an all-reduce is two edges
            per_micro_batch = 2 * 3 * edges + edges + 1  # two regions in each of three layers
            norms = 1 if precision == "bf16" else 2  # in float32 DeepSpeed takes that of each optimizer group by itself
            assert found["calls"] == {"tensor": 8 * per_micro_batch + 2 + norms}


@pytest.mark.full
@pytest.mark.parametrize(("nproc", "cases"), [(2, MORE_ON_TWO_RANKS), (4, MORE_ON_FOUR_RANKS)], ids=["two", "four"])
def test_bytes_and_memory_are_as_predicted_with_every_setting(
    tmp_path: Path, nproc: int, cases: list[Case], subtests: pytest.Subtests
) -> None:
    check_all(tmp_path, cases, nproc, subtests)
