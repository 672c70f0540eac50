"""Bytes of activations, predicted from the numbers of a run, are those that a forward keeps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from llm import LLM
from llm.plan import activations
from llm.plan.workload import Workload
from llm.train.config import check_layout, validate
from llm.train.dry_run import report, workload
from tests.distributed.harness import tiny_config

TOKENS, LAYERS = 512, 2
MODEL: dict[str, Any] = dict(dim=128, n_heads=4, n_kv_heads=2, ffn_hidden=448, vocab_size=64, max_seq_len=TOKENS)


def ssm(*pattern: str, **changes: Any) -> dict[str, Any]:
    return dict(layer_pattern=list(pattern), ssm=dict(d_state=32, head_width=16, chunk=64) | changes, route={})


def plan(model: dict[str, Any], recompute: str, precision: str = "bf16", **parallel: Any) -> Workload:
    train = dict(
        seq_len=TOKENS, micro_batch_size=1, global_batch_size=8, precision=precision, activation_checkpointing=recompute
    )
    raw = tiny_config(Path("unused"), train=train, parallel=parallel)
    raw["model"] = MODEL | dict(n_layers=LAYERS) | model
    config = validate(raw, "config")
    ranks = parallel.get("tensor", 1) * parallel.get("pipeline", 1)
    return workload(config, check_layout(config, ranks))


def kept(work: Workload, n_layers: int) -> int:
    """Bytes that a forward of so many layers leaves, beside its weights."""
    args = work.args.model_copy(update={"n_layers": n_layers})
    model = LLM(args).to(torch.float32 if work.precision == "fp32" else torch.bfloat16).train()
    model.activation_checkpointing = work.recompute
    ids = torch.randint(0, args.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        out = model(ids, labels=ids)
        found = sum(kind["Total"] for kind in tracker.get_tracker_snapshot("current").values())
    assert out.loss_sum is not None
    return int(found) - sum(parameter.nbytes for parameter in model.parameters())


def of_layers(work: Workload) -> int:
    """What the layers leave: what twice as many leave more."""
    return kept(work, 2 * LAYERS) - kept(work, LAYERS)


KINDS: dict[str, dict[str, Any]] = {
    "attention": {},
    "normed heads, both sides, a gate": dict(qk_norm="head", norm_place="sandwich", attn_gate=True),
    "all heads as one, norms after": dict(qk_norm="full", norm_place="post", layer_pattern=["attn+none"]),
    "no gate in the feed-forward": dict(gated=False, act="gelu"),
    "states": ssm("ssm+none"),
    "wide states, long chunks, groups": ssm("ssm+dense", d_state=64, chunk=128, groups=2, head_width=32),
    "states of chunks": ssm("ssm@4+dense"),
    "states and attention": ssm("ssm+none", "attn+dense"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_keeps_what_is_predicted(kind: str) -> None:
    """Within 1%: rows of offsets and constants of a layer do not grow with the tokens, and are not counted."""
    work = plan(KINDS[kind], "none")
    predicted = activations.predict(work)
    assert predicted is not None and predicted.one == 0
    assert predicted.layers == pytest.approx(of_layers(work), rel=0.01)


def test_in_float32_what_the_recurrence_keeps_is_no_larger() -> None:
    narrow, wide = (plan(ssm("ssm+none"), "none", precision) for precision in ("bf16", "fp32"))
    of_narrow, of_wide = activations.predict(narrow), activations.predict(wide)
    assert of_narrow is not None and of_wide is not None
    assert of_wide.layers == pytest.approx(of_layers(wide), rel=0.01)
    assert of_wide.layers < 1.2 * of_narrow.layers


MIXED = ssm("ssm+none", "attn@4+dense", "routed+none", "ssm@2+dense")
EXPERTS: dict[str, Any] = dict(moe=dict(n_experts=4, top_k=2, hidden=64))


@pytest.mark.parametrize("model", [{}, ssm("ssm+none"), MIXED, EXPERTS], ids=["attention", "ssm", "mixed", "moe"])
def test_what_is_computed_again_leaves_its_input_whatever_it_is(model: dict[str, Any]) -> None:
    work = plan(model | dict(n_layers=4), "full")
    predicted = activations.predict(work)
    assert predicted is not None and predicted.layers == 4 * TOKENS * 128 * 2
    counted = kept(work, 8) - kept(work, 4)
    reported = 131_096 * sum("routed" in spec.mixer.name for spec in work.args.layer_specs())  # bins of its scores
    if model is EXPERTS:  # which also leave what routers said of each token, a few numbers an expert
        assert 0 <= counted - predicted.layers <= 4 * TOKENS * 4 * 12
    else:
        assert counted - reported == pytest.approx(predicted.layers, rel=0.02)
    assert (predicted.one is None) == (model in (MIXED, EXPERTS))


def test_layers_that_are_not_predicted_are_not_guessed() -> None:
    for model in (MIXED, EXPERTS, dict(qkv_bias=True), dict(dropout=0.1), dict(norm="layer")):
        assert activations.predict(plan(model | dict(n_layers=4), "none")) is None
    assert activations.predict(plan({}, "selective")) is None


def test_tensor_ranks_share_it_and_a_pipeline_has_as_many_micro_batches_as_ranks() -> None:
    layouts = {}, dict(tensor=2), dict(pipeline=2)
    one, cut, staged = (activations.predict(plan(dict(n_layers=4), "full", **layout)) for layout in layouts)
    assert one is not None and cut is not None and staged is not None
    assert 2 * cut.layers == one.layers == staged.layers  # half the layers of two micro-batches


def test_a_dry_run_says_it() -> None:
    raw = tiny_config(Path("unused"), train=dict(activation_checkpointing="full"))
    raw["model"] |= dict(vocab_size=64)
    config = validate(raw, "config")
    assert "of activations, the inputs of its layers" in report(config, check_layout(config, 1))
