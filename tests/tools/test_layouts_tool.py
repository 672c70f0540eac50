"""tools/layouts.py: which layouts it tries, what it calls equal, that making a model small changes neither, and that it
finds a planted fault."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from llm.args.layers import attention_specs
from llm.errors import UserError
from llm.train.config import RunConfig, check_layout, load_config, validate
from tests.distributed.harness import ROOT, TINY_MODEL, environment, tiny_config, write_config, write_text
from tools.layouts import BOUND, compare, described, grown, layouts, line, main, trained
from tools.layouts_plan import INSTEAD, Settings, alone, changed, fitting, parse, prepared
from tools.shrink import alike, layers_of_every_kind, shrunk

CONFIGS = [p for p in sorted((ROOT / "configs/pretrain").glob("*.yaml")) if "of 8 GPUs" not in p.read_text()]
"""But for those of released models, with thousands of layouts each: tests/docs/test_models.py has them."""
STAGES = (1, 2, 3)


DENSE = {"dim": 256, "n_layers": 6, "n_heads": 8, "n_kv_heads": 2, "max_seq_len": 1024}
WITHOUT_EXPERTS: dict[str, dict[str, Any]] = {
    "dense": DENSE,
    "tied": {**DENSE, "tie_embeddings": True, "qkv_bias": True},
    "gpt_neox": {
        **DENSE, "n_kv_heads": 8, "norm": "layer", "act": "gelu", "gated": False, "ffn_bias": True, "qkv_bias": True,
        "o_bias": True, "parallel_residual": True, "rope_pct": 0.25, "ffn_hidden": 1024,
    },
    "gemma": {
        **DENSE, "head_dim": 64, "norm_place": "sandwich", "norm_offset": True, "attn_softcap": 50.0,
        "logit_softcap": 30.0, "embed_scale": 16.0, "score_scale": 0.0625, "tie_embeddings": True,
        "sliding_window": 512, "layer_pattern": ["attn:window", "attn:full"], "act": "gelu_tanh",
    },
    "yarn": {**DENSE, "qk_norm": "head", "rope_scaling": {"kind": "yarn", "original_max_position": 512}},
}  # fmt: skip


def tiny(**sections: dict[str, Any]) -> RunConfig:
    return prepared(validate(tiny_config(Path("text"), **sections), "test"), "fp32", None)


def numbers(config: RunConfig, ranks: int) -> set[tuple[int, int, int, int]]:
    found = (candidate.layout for candidate in fitting(config, ranks, STAGES))
    return {(layout.tensor, layout.pipeline, layout.expert, layout.zero_stage) for layout in found}


@pytest.mark.parametrize("ranks", [1, 2, 6])
def test_it_tries_every_layout_that_fits_with_some_micro_batch(ranks: int) -> None:
    config = tiny(train={"global_batch_size": 12, "micro_batch_size": 4, "seq_len": 45})  # odd: not every cut
    fits = set()
    cuts = range(1, 7)
    for tensor, pipeline, expert, stage, micro in product(cuts, cuts, cuts, STAGES, range(1, 5)):
        if ranks % (tensor * pipeline * expert):
            continue
        parallel = {"tensor": tensor, "pipeline": pipeline, "expert": expert, "zero_stage": stage}
        try:
            check_layout(changed(config, parallel, {"micro_batch_size": micro}), ranks)
            fits.add((tensor, pipeline, expert, stage))
        except UserError:
            continue
    assert numbers(config, ranks) == fits
    for candidate in fitting(config, ranks, STAGES):
        assert check_layout(candidate.config, ranks) == candidate.layout
        assert candidate.config.train.micro_batch_size <= 4


@pytest.mark.parametrize("number", [1, 7, 8, 12, 704, 2048, 5120])
@pytest.mark.parametrize("ranks", [1, 4, 8])
def test_a_smaller_number_keeps_its_divisors(number: int, ranks: int) -> None:
    small = alike(number, 16, ranks)
    assert all((small % n == 0) == (number % n == 0) for n in range(1, ranks + 1))
    assert min(number, 16) <= small <= min(number, 16 * ranks * ranks)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_small_model_has_every_kind_of_layer_and_the_same_layouts(path: Path) -> None:
    config = load_config(path)
    small = shrunk(config, 8)
    kinds = [
        {(replace(s.attention, span=None), s.ffn) for s in c.model.layer_specs()} for c in (config, small)
    ]
    assert kinds[0] == kinds[1]
    for ranks in (6, 8):
        assert numbers(small, ranks) == numbers(config, ranks)
    size = small.model
    assert (size.dim, size.head_width, small.train.seq_len) <= (64, 16, 128)
    chunk = size.attention_chunk_size
    assert chunk is None or chunk <= small.train.seq_len // 4, "a row must hold several chunks"
    assert shrunk(small, 8) == small


@pytest.mark.parametrize("kind", WITHOUT_EXPERTS)
def test_a_model_without_experts_is_made_small_and_keeps_its_layouts(kind: str) -> None:
    train = {"seq_len": 1024, "global_batch_size": 16, "micro_batch_size": 4}
    raw = tiny_config(Path("text"), train=train)
    config = prepared(validate({**raw, "model": WITHOUT_EXPERTS[kind]}, "test"), "fp32", None)
    small = shrunk(config, 4)
    assert numbers(small, 4) == numbers(config, 4) and numbers(small, 4)
    masks = [{spec.mask for spec in attention_specs(c.model.layer_specs())} for c in (small, config)]
    assert masks[0] == masks[1]
    assert max(small.model.dim, small.model.ffn_width(), small.train.seq_len) <= 128


def test_one_process_is_described_with_and_without_routers() -> None:
    rows = [{"loss": 5.0, "grad_norm": 1.5, "margin": margin} for margin in (None, 0.25, 0.125)]
    assert described(rows[:1]) == "one process: loss 5.0000 to 5.0000, gradient norm 1.5 to 1.5"
    assert described(rows).endswith("; nearest choice of a router: 1.2e-01 of its logits, step 3")


def test_a_small_config_keeps_the_pipelines_of_two_stages_a_rank() -> None:
    parallel = {"pipeline": 4, "pipeline_schedule": "dualpipev"}
    train = {"global_batch_size": 64, "micro_batch_size": 2}
    config = tiny(model={**TINY_MODEL, "n_layers": 16}, parallel=parallel, train=train)
    found = numbers(shrunk(config, 8), 8)
    assert found == numbers(config, 8)
    assert {(1, 8, 1, 1), (2, 4, 1, 1)} <= found


def test_a_small_encoder_decoder_keeps_a_row_for_both_sides() -> None:
    rows = [{"path": "x.jsonl", "kind": "pair"}]
    model = {"encoder_layers": 12, "n_layers": 8, "max_seq_len": 2048}
    raw = tiny_config(Path("t"), model=model, data={"train": rows, "valid": rows, "source_len": 2048})
    config = validate({**raw, "task": "seq2seq", "train": {**raw["train"], "seq_len": 1024}}, "test")
    small = shrunk(config, 4)
    assert numbers(small, 4) == numbers(config, 4)
    assert (small.model.encoder_layers, small.data.source_len, small.train.seq_len) == (4, 128, 128)


def test_layers_stop_where_the_last_kind_has_come() -> None:
    model = {"n_layers": 48, "nope_layer_interval": 4, "moe": {"n_experts": 4, "interleave": 2}}
    assert layers_of_every_kind(tiny(model={**tiny().model.model_dump(), **model}).model) == 4
    model = {"n_layers": 48, "nope_layer_interval": 4, "moe": {"n_experts": 4, "dense_layers": [0]}}
    assert layers_of_every_kind(tiny(model={**tiny().model.model_dump(), **model}).model) == 4
    assert layers_of_every_kind(tiny(model={**tiny().model.model_dump(), "n_layers": 3, "moe": None}).model) == 1


def row(**fields: Any) -> dict[str, Any]:
    return {"loss": 2.0, "grad_norm": 3.0, "routing_checksum": 7, "margin": 1e-3, "skipped": None, **fields}


SAME = [row(), row(), row()]


@pytest.mark.parametrize(
    ("changes", "precision", "margin", "equal", "routing"),
    [
        ({}, "fp32", 1e-3, True, "equal"),
        ({"loss": 2 * (1 + 9e-6)}, "fp32", 1e-3, True, "equal"),
        ({"loss": 2 * (1 + 2e-5)}, "fp32", 1e-3, False, "equal"),
        ({"grad_norm": 3 * (1 - 2e-5)}, "fp32", 1e-3, False, "equal"),
        ({"grad_norm": float("inf"), "skipped": "gradient"}, "fp32", 1e-3, False, "equal"),
        ({"loss": float("nan")}, "fp32", 1e-3, False, "equal"),
        ({"routing_checksum": 8}, "fp32", 1e-3, False, "differs at step 3"),
        ({"routing_checksum": 8}, "fp32", 1e-7, True, "tie at step 3"),
        ({"routing_checksum": 8, "loss": 2.1}, "fp32", 1e-7, True, "tie at step 3"),  # the steps before agree
        ({"routing_checksum": 8}, "bf16", 1e-3, True, "differs at step 3"),
        ({"loss": 2 * (1 + 5e-3)}, "bf16", 1e-3, True, "equal"),
        ({"loss": 2 * (1 + 9e-3)}, "bf16", 1e-3, False, "equal"),  # 3e-3 in the mean
        ({"grad_norm": 3 * (1 + 9e-3)}, "bf16", 1e-3, True, "equal"),
        ({"grad_norm": 3 * (1 + 2e-2)}, "bf16", 1e-3, False, "equal"),
    ],
)
def test_what_is_equal(changes: dict[str, Any], precision: Any, margin: float, equal: bool, routing: str) -> None:
    verdict = compare([row(), row(), row(**changes)], [row(), row(), row(margin=margin)], precision)
    assert (verdict.equal, verdict.routing) == (equal, routing)


def test_a_tie_at_the_first_step_shows_nothing_and_is_not_equal() -> None:
    verdict = compare([row(routing_checksum=8), row()], [row(margin=1e-8), row()], "fp32")
    assert (verdict.equal, verdict.routing, verdict.loss) == (False, "tie at step 1", None)


def grows(*losses: float) -> str | None:
    """The line about growth where losses are off by these shares; the first step's gradient norm is off by 3e-7."""
    rows = [row(loss=2 * (1 + off), grad_norm=3 * (1 + 3e-7 * (step == 0))) for step, off in enumerate(losses)]
    return grown(compare(rows, [row()] * len(rows), "fp32"), "fp32")


def test_a_difference_that_grows_says_how_rounding_is_told_from_a_defect() -> None:
    line = grows(1e-7, 1e-6, 4e-6, 2e-5, 5e-3, 1e-6)
    assert line is not None and "off by 3.0e-07 at step 1, 1.0e-06 at step 6, most at step 5 with" in line
    assert "with 5.0e-03, beyond 1e-05 first at step 4" in line
    assert "rounding grows with the steps" in line and "--steps 3 distinguishes it from a defect" in line
    line = grows(1e-7, 1e-4, 1e-3)
    assert line is not None and "beyond 1e-05 first at step 2: early for rounding, so look for a defect" in line


@pytest.mark.parametrize("losses", [(1e-7, 9e-6), (1e-4, 1e-3), (2e-5,)])
def test_nothing_is_said_of_growth_where_steps_are_equal_or_the_first_is_not(losses: tuple[float, ...]) -> None:
    assert grows(*losses) is None
    assert grown(compare("no memory", SAME, "fp32"), "fp32") is None


def test_keys_of_the_run_config_are_given_as_in_a_run(tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", tiny_config(tmp_path))
    given = ["--optim.lr=0.5", "--model.dim", "48", "--steps=7", "--parallel.sequence_parallel=false"]
    settings, run = parse([f"--config={config}", "--nproc", "1,2", *given])
    assert (settings.nproc, settings.steps, settings.stages) == ([1, 2], 7, [1, 2, 3])
    assert run.overrides == {"optim.lr": 0.5, "model.dim": 48, "parallel.sequence_parallel": False}
    assert parse([str(config), "2"])[0] == Settings(str(config), [2])
    for words, message in (
        ([f"--{key}=1"], f"--{key}: in a comparison of layouts {instead}") for key, instead in INSTEAD.items()
    ):
        with pytest.raises(UserError, match=message):
            parse([f"--config={config}", "--nproc=2", *words])
    for word, message in (
        ("--optim.lrr=1", "optim.lrr"), ("--step=1", "did you mean --steps"), ("--run_dir=x", "which keeps no run"),
        ("--model.dim=33", "model.n_heads=4 does not divide model.dim=33"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            main([f"--config={config}", "--nproc=2", word])


def test_what_stopped_a_layout_is_told() -> None:
    verdict = compare("rank 1: out of memory", SAME, "fp32")
    assert not verdict.equal
    (candidate,) = fitting(tiny(), 1, [1])
    assert "FAILED: rank 1: out of memory" in line(candidate, verdict)


def tool(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/layouts.py", *words]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"nproc": [0]}, "--nproc=0: expected numbers of processes"),
        ({"nproc": [2], "steps": 0}, "--steps=0: expected 1 or more"),
        ({"nproc": [2], "zero": [1, 4]}, "--zero=1,4: possible are 0, 1, 2 and 3"),
        ({"nproc": [2], "json": "none/table.json"}, "--json=none/table.json: no such folder"),
        ({"nproc": [2], "json": __file__}, f"--json={__file__}: exists already; name another file"),
        ({"nproc": [7]}, "train.global_batch_size=16 is not divisible by 7 data-parallel ranks"),
    ],
)
def test_bad_input_is_refused_by_name(tmp_path: Path, flags: dict[str, Any], message: str) -> None:
    write_text(tmp_path, documents=1)
    config = write_config(tmp_path / "config.yaml", tiny_config(tmp_path))
    with pytest.raises(UserError) as error:
        layouts(Settings(str(config), **flags))
    assert message in str(error.value)


def test_missing_files_are_named_before_any_work(tmp_path: Path) -> None:
    raw = tiny_config(tmp_path)
    with pytest.raises(UserError, match=rf"data\.train={tmp_path}/train\.jsonl"):
        layouts(Settings(str(write_config(tmp_path / "config.yaml", raw)), [2]))
    write_text(tmp_path, documents=1)
    raw["tokenizer"] = {"kind": "sentencepiece", "path": f"{tmp_path}/no.model"}
    with pytest.raises(UserError, match=rf"{tmp_path}/no\.model"):
        layouts(Settings(str(write_config(tmp_path / "config.yaml", raw)), [2]))


@pytest.mark.full
@pytest.mark.distributed
def test_sound_layouts_are_equal_and_planted_faults_are_found(tmp_path: Path) -> None:
    write_text(tmp_path, documents=60)
    config = write_config(tmp_path / "config.yaml", tiny_config(tmp_path, train={"seed": 1}))
    table = tmp_path / "table.json"
    done = tool(f"--config={config}", "--nproc=2", "--zero=1", "--steps=2", "--shrink", f"--json={table}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 layouts are equal to one process" in done.stdout
    found = json.loads(table.read_text())
    cuts = [(entry["tensor"], entry["pipeline"], entry["expert"]) for entry in found["layouts"]]
    assert cuts == [(1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1)]
    assert all(len(entry["rows"]) == 2 and entry["routing"] == "equal" for entry in found["layouts"])
    losses = [one["loss"] for one in found["reference"]]
    assert losses[0] != losses[1]

    small = validate(found["config"], "table.json")
    candidates = [candidate for candidate in fitting(small, 2, [1]) if candidate.layout.pipeline == 1]
    job = ROOT / "tests/tools/faulty_layouts_job.py"
    results = list(trained([candidate.config for candidate in candidates], 2, 2, job))
    sound, failed, faulty = (compare(rows, found["reference"], "fp32") for rows in results)
    assert sound.equal
    assert failed.failure is not None and "RuntimeError: no experts today" in failed.failure
    # norms and routers are few: their missing gradients are 1e-4 of the whole norm, ten times the bound
    assert not faulty.equal and faulty.failure is None
    assert faulty.grad_norm is not None and faulty.grad_norm > BOUND["fp32"]


def test_one_process_has_nothing_cut() -> None:
    pipeline = {"pipeline": 2, "pipeline_schedule": "dualpipev"}
    config = changed(
        tiny(train={"global_batch_size": 6, "micro_batch_size": 4}),
        {"tensor": 2, **pipeline, "expert": 2, "zero_stage": 2, "offload_optimizer": True},
        {"precision": "bf16"},
    )
    one = alone(config)
    assert (check_layout(one, 1).tensor, check_layout(one, 1).pipeline) == (1, 1)
    assert (one.train.precision, one.train.micro_batch_size, one.parallel.offload_optimizer) == ("fp32", 3, False)
