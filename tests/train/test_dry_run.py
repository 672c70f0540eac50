"""`--dry_run` prints the resolved config and, as YAML comments, what the run will ask of its ranks.

Numbers here are worked out by hand or from first principles; that they are those of real jobs is held by
tests/distributed/test_traffic.py.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch.testing._internal.distributed.fake_pg import FakeStore

from launch import pretrain
from llm.parallel.launch.world import World
from llm.parallel.layout import Layout
from llm.parallel.traffic_counter import TrafficCounter, dimension_names
from llm.plan import memory, traffic
from llm.plan.workload import Workload
from llm.plan.zero3_gathers import events, gathers
from llm.tokenizer import load_tokenizer
from llm.train.config import check_layout, validate
from llm.train.dry_run import report, workload
from tests.distributed.harness import tiny_config, write_config

SCOUT = {
    "dim": 5120, "n_layers": 48, "n_heads": 40, "n_kv_heads": 8, "head_dim": 128, "vocab_size": 202048,
    "max_seq_len": 8192, "ffn_hidden": 16384, "qk_norm": "l2", "nope_layer_interval": 4, "attention_chunk_size": 8192,
    "moe": {"n_experts": 16, "top_k": 1, "hidden": 8192, "interleave": 1, "aux_alpha": 0.001},
}  # fmt: skip


def plan(world: int, model: dict[str, Any] | None = None, **sections: Any) -> Workload:
    raw = tiny_config(Path("unused"), **sections)
    raw["model"] = {**raw["model"], "vocab_size": 64, **(model or {})}
    config = validate(raw, "config")
    return workload(config, check_layout(config, world))


def total(work: Workload) -> dict[str, int]:
    return {along: sum(purposes.values()) for along, purposes in traffic.predict(work).items()}


def test_one_process_sends_nothing_and_keeps_weights_gradients_and_two_moments() -> None:
    work = plan(1)
    (kept, ranks), n = memory.predict(work)[0], work.n_parameters
    assert traffic.predict(work) == {} and ranks == 1
    assert (kept.parameters, kept.masters, kept.gradients) == (4 * n, 0, 4 * n)
    assert kept.optimizer == 8 * n + 4 * len(work.table)  # a step count beside each parameter's moments


def test_a_steps_sums_are_those_of_objectives_several_sources_and_experts() -> None:
    """Of the tiny model three objectives, and two MoE layers of four experts; float64, around the ring of two twice."""
    sources = [{"path": "a", "name": "a"}, {"path": "b", "name": "b"}]
    loss = {n: traffic.predict(plan(2, data={"train": sources[:n]})) for n in (1, 2)}
    assert [loss[n]["data"]["loss"] for n in (1, 2)] == [2 * 8 * (3 + 2 * 4), 2 * 8 * (3 + 2 + 2 * 4)]


def test_plain_data_parallel_sends_each_gradient_around_the_ring_twice() -> None:
    work = plan(4, parallel={"zero_stage": 0})
    sent = traffic.predict(work)
    assert sent["data"]["gradients"] == 2 * 3 * 4 * work.n_parameters
    losses = 3 + 2 * 4  # three sums, and counts of two layers with four experts, in float64
    assert sent["data"]["loss"] == 2 * 3 * 8 * losses


def test_zero_cuts_what_a_rank_keeps_by_the_number_of_ranks() -> None:
    plans = (plan(world, parallel={"zero_stage": 3}, train={"precision": "bf16"}) for world in (1, 4))
    one, four = (memory.predict(work)[0][0] for work in plans)
    assert four.masters == pytest.approx(one.masters / 4, rel=0.01)  # shares are padded
    assert four.optimizer == pytest.approx(one.optimizer / 4, rel=0.01)


def test_sequence_parallelism_sends_as_many_bytes_of_activations() -> None:
    sent = {}
    for sequence_parallel in (True, False):
        work = plan(2, parallel={"tensor": 2, "sequence_parallel": sequence_parallel})
        sent[sequence_parallel] = traffic.predict(work)["tensor"]
    assert sent[True]["activations"] == sent[False]["activations"]
    assert sent[True]["gradients"] > sent[False]["gradients"]  # of the norms, which see only a part of the tokens


def test_accumulation_repeats_what_is_per_micro_batch_and_nothing_else() -> None:
    layout = {"tensor": 2, "expert": 2}
    one = traffic.predict(plan(4, parallel=layout, train={"micro_batch_size": 8}))
    two = traffic.predict(plan(4, parallel=layout, train={"micro_batch_size": 4}))
    sizes_first = 2 * 2 * 4 * 8  # groups x layers x experts x bytes: who sends how much is sent once a micro-batch
    assert two["expert"]["tokens"] == one["expert"]["tokens"] + sizes_first
    assert two["tensor"]["activations"] == one["tensor"]["activations"]
    assert two["tensor"]["gradients"] == one["tensor"]["gradients"]
    assert two["data"] == one["data"] and two["world"] == one["world"]


def test_an_uneven_vocabulary_makes_two_kinds_of_ranks() -> None:
    work = plan(2, {"vocab_size": 65}, parallel={"tensor": 2})
    larger, smaller = work.kinds
    assert larger.sizes["output.weight"] - smaller.sizes["output.weight"] == 32  # one row
    assert [ranks for _, ranks in memory.predict(work)] == [1, 1]
    whole = Counter({name: 0 for name in work.table})
    for kind in work.kinds:
        whole.update(kind.sizes)
    assert whole["output.weight"] == 65 * 32


def test_dimensions_with_the_same_ranks_have_one_name() -> None:
    assert dimension_names(Layout(4, tensor=4))["world"] == "tensor"
    assert dimension_names(Layout(4))["world"] == dimension_names(Layout(4))["expert_data"] == "data"
    names = dimension_names(Layout(8, tensor=2, expert=2))
    assert all(names[along] == along for along in ("tensor", "data", "expert", "expert_data", "world"))


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_zero3_gathers_once_where_all_fits_and_at_each_use_where_nothing_does(recompute: str) -> None:
    work = plan(2, parallel={"zero_stage": 3}, train={"activation_checkpointing": recompute})
    sizes = work.kinds[0].sizes
    assert not gathers(work, sizes)  # small weights stay gathered
    eager = replace(work, zero={"stage3_param_persistence_threshold": 0})
    assert set(gathers(eager, sizes).values()) == {1} and gathers(eager, sizes).keys() == sizes.keys()
    options = ("stage3_param_persistence_threshold", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size")
    frugal = replace(work, zero=dict.fromkeys(options, 0))
    uses = 3 if recompute == "full" else 2
    assert gathers(frugal, sizes)["layers.0.attention.wq.weight"] == uses
    assert gathers(frugal, sizes)["output.weight"] == 2  # never recomputed


def test_a_replay_names_every_module_with_weights() -> None:
    work = plan(2, parallel={"zero_stage": 3})
    modules = {event.module for event in events(work)}
    for name in work.table:
        assert name.removesuffix(".weight") in modules or name.rpartition(".")[0] in modules


def test_a_model_of_100_billion_parameters_is_planned_for_512_ranks() -> None:
    work = plan(
        512, SCOUT, parallel={"tensor": 8, "expert": 16},
        train={"global_batch_size": 512, "micro_batch_size": 1, "seq_len": 8192, "precision": "bf16"},
    )  # fmt: skip
    assert work.n_parameters == 107_769_861_120  # Meta's Llama 4 Scout, without vision
    kept = memory.predict(work)[0][0]
    # experts are cut over 8 x 16 ranks, the rest over 8
    experts = 48 * 16 * 3 * 5120 * 8192
    norms_and_routers = 97 * 5120 + 48 * 16 * 5120
    held = experts // 128 + (work.n_parameters - experts - norms_and_routers) // 8 + norms_and_routers
    assert kept.parameters == pytest.approx(2 * held, rel=1e-6)  # padding
    assert total(work)["data"] > 0


@pytest.fixture
def four_silent_ranks() -> Iterator[None]:
    """A process group of four ranks in one process, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


def test_each_collective_counts_as_its_ring(four_silent_ranks: None) -> None:
    part, whole = torch.ones(6), torch.ones(24)  # 24 and 96 bytes
    one = World(0, 1, 0, torch.device("cpu"))  # so that the total is this rank's quarter of its group's
    for call, sent in (
        (lambda: dist.all_reduce(whole), 2 * 3 * 96),
        (lambda: dist.all_gather_into_tensor(whole, part), 3 * 96),
        (lambda: dist.all_gather(list(whole.split(6)), part), 3 * 96),
        (lambda: dist.reduce_scatter_tensor(part, whole), 3 * 96),
        (lambda: dist.broadcast(whole, 0), 3 * 96),
        (lambda: dist.reduce(whole, 0), 3 * 96),
    ):
        with TrafficCounter(Layout(4)) as counter:
            call()
        assert counter.total(one) == {"data": sent // 4} and counter.calls == {"data": 1}
    with TrafficCounter(Layout(4, expert=4)) as counter:
        dist.all_to_all_single(torch.empty(24), whole)
    assert counter.total(one) == {"expert": 3 * 96 // 4}


def test_what_has_no_rule_is_refused(four_silent_ranks: None) -> None:
    with TrafficCounter(Layout(4)), pytest.raises(NotImplementedError, match="no rule for the bytes of c10d::scatter_"):
        dist.scatter(torch.ones(3), [torch.ones(3)] * 4)
    with TrafficCounter(Layout(4, tensor=2)), pytest.raises(ValueError, match="no group of the layout"):
        dist.all_reduce(torch.ones(3), group=dist.new_group([0, 3]))


def test_the_whole_output_is_yaml_and_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_config(tmp_path, parallel={"tensor": 2}))
    monkeypatch.setattr("sys.argv", ["p", "--config", str(config), "--dry_run=config", "--nproc=4"])
    pretrain.main()
    out = capsys.readouterr().out
    resolved = validate(yaml.safe_load(out), "printed")
    assert resolved.parallel.tensor == 2 and resolved.model.vocab_size == -1
    comments = [line for line in out.splitlines() if line.startswith("#")]
    assert "# grid of 4 ranks: tensor 2 x data 2" in comments
    assert any(line.split()[1:3] == ["tensor", "0"] for line in comments if "|" in line)
    model = {**resolved.model.model_dump(mode="json"), "vocab_size": load_tokenizer(resolved.tokenizer).vocab_size}
    known = validate({**resolved.model_dump(mode="json"), "model": model}, "printed")
    for along, bytes_ in total(workload(known, Layout(4, tensor=2))).items():
        assert any(line.split()[1:3] == [along, f"{bytes_:,}"] for line in comments), along


def test_without_its_tokenizer_a_run_of_unknown_vocabulary_says_so() -> None:
    raw = tiny_config(Path("unused"), tokenizer={"kind": "sentencepiece", "path": "nowhere.model"})
    text = report(validate(raw, "config"), Layout(2))
    assert "sizes are not known: model.vocab_size=-1 takes the tokenizer's, and tokenizer.path=nowhere.model" in text
    assert all(line.startswith("#") for line in text.splitlines())


def test_what_attention_dropout_costs_is_said_where_it_is_on() -> None:
    raw = tiny_config(Path("unused"), train={"micro_batch_size": 8, "seq_len": 1024, "global_batch_size": 16})
    raw["model"] |= {"vocab_size": 259, "n_heads": 8, "max_seq_len": 1024, "attn_dropout": 0.1}
    # 2^22 weights at a time are those of 128 queries of each of 8 rows and 4 heads on 1024 keys: 29 bytes each
    text = report(validate(raw, "config"), Layout(2, tensor=2))
    assert "# model.attn_dropout=0.1 takes another path than fused attention: two to four times the time" in text
    assert ", and 116.00 MiB for a while, for the weights of 128 tokens of each row at a time\n" in text
    raw["model"]["attn_dropout"] = 0.0
    assert "attn_dropout" not in report(validate(raw, "config"), Layout(2, tensor=2))
