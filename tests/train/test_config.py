"""The run config: what is refused and how it is said, and what may change on resume."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import pretrain
from llm.errors import UserError
from llm.train.config import (
    RunConfig,
    TrainConfig,
    accumulation_steps,
    check_layout,
    load_config,
    validate,
)
from llm.train.config.explain import keys_of
from llm.train.config.flags import OWN_FLAGS, help_text, parse_run_flags
from llm.train.config.synonyms import OTHERS_NAMES
from llm.train.config.yaml_file import scalar
from llm.train.resume.differences import refused_changes
from tests.distributed.harness import tiny_config, write_config


def config_with(tmp_path: Path, **sections: dict[str, Any]) -> Any:
    return validate(tiny_config(tmp_path, **sections), "test.yaml")


def test_a_number_like_1e_4_is_a_number(tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", tiny_config(tmp_path))
    path.write_text(path.read_text().replace("lr: 0.001", "lr: 1e-3"))
    assert load_config(path).optim.lr == 1e-3


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", tiny_config(tmp_path))
    path.write_text(path.read_text() + "train: {steps: 3}\n")
    with pytest.raises(UserError, match="'train' is given twice"):
        load_config(path)


def test_overrides_win_over_the_file_and_reach_nested_keys(tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", tiny_config(tmp_path))
    flags = parse_run_flags(
        ["--config", str(path), "--train.steps=7", "--model.moe.top_k=1", "--optim.betas=[0.8, 0.9]"]
    )
    config = load_config(flags.config, flags.overrides)
    assert (config.train.steps, config.model.moe and config.model.moe.top_k, config.optim.betas) == (7, 1, (0.8, 0.9))


def test_a_model_file_is_read_from_its_path(tmp_path: Path) -> None:
    raw = tiny_config(tmp_path)
    model = write_config(tmp_path / "model.yaml", raw["model"])
    raw["model"] = str(model)
    config = load_config(write_config(tmp_path / "c.yaml", raw), {"model.dim": 64})
    assert config.model.dim == 64 and config.model.n_layers == 4


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"train": {"batch": 3}}, "unknown key train.batch; known keys here: steps, "),
        ({"optim": {"learning_rate": 1}}, "unknown key optim.learning_rate"),
        ({"train": {"steps": "ten"}}, "train.steps='ten'"),
        ({"train": {"steps": 0}}, "train.steps=0"),
        # more than a machine starts ends the process and others beside it; more than a clock counts is a traceback
        ({"train": {"threads": 100_000}}, "train.threads=100000: input should be less than or equal to 1024"),
        ({"train": {"global_batch_size": 10**20}}, "train.global_batch_size=100000000000000000000: input should be"),
        ({"parallel": {"timeout_s": 1e30}}, "parallel.timeout_s=1e+30: input should be less than or equal to"),
        ({"model": {"moe": {"n_experts": 4, "topk": 2}}}, "unknown key model.moe.topk; did you mean model.moe.top_k?"),
        ({"train": {"seq_len": 65}}, "train.seq_len=65 is above model.max_seq_len=64"),
        (
            {"checkpoint": {"interval": 100, "keep_every": 250}},
            "checkpoint.keep_every=250 is no multiple of checkpoint.interval=100",
        ),
        ({"checkpoint": {"on_failure": "ignore"}}, "checkpoint.on_failure='ignore'"),
        ({"optim": {"decay_steps": 5}}, "optim.decay_steps belongs to optim.schedule=wsd"),
        ({"parallel": {"zero_stage": 4}}, "parallel.zero_stage=4"),
        ({"parallel": {"context": 2}}, "parallel.context=2 is not available yet; use parallel.context=1"),
        (
            {"model": {"moe": {"n_experts": 4, "capacity": 3, "capacity_scope": "call"}}},
            "model.moe.capacity_scope=call counts over a whole forward",
        ),
        ({"model": {"moe": {"n_experts": 4, "balance": "call"}}}, "model.moe.balance=call is of the counts"),
        ({"parallel": {"context": 2}}, "parallel.context=2 is not available yet; use parallel.context=1"),
        ({"parallel": {"tensor": 0}}, "parallel.tensor=0"),
        ({"parallel": {"sequence_parallel": 2}}, "parallel.sequence_parallel=2"),
        ({"optim": {"muon_lr": 0.02}}, "optim.muon_lr belongs to optim.name=muon, not adamw"),
        ({"optim": {"lr_factors": {"matrices": 2.0}}}, "optim.lr_factors.matrices='matrices': input should be"),
        ({"optim": {"lr_factors": {"norm": True}}}, "optim.lr_factors.norm=true: expected a value other than true"),
        ({"optim": {"ema_decay": 1.0}}, "optim.ema_decay=1.0"),
        ({"optim": {"schedule": "one_cycle", "warmup_steps": 0}}, "optim.schedule=one_cycle needs optim.warmup_steps"),
        ({"train": {"epochs": 2}}, "train.steps=20 and train.epochs=2.0 both give the length"),
        ({"train": {"batch_schedule": [[64, 32], [64, 48]]}}, "train.batch_schedule.1 begins at row 64"),
        ({"train": {"batch_schedule": [[0, 32]]}}, "train.batch_schedule.0.0=0"),
        ({"train": {"batch_schedule": [[64, True]]}}, "train.batch_schedule.0.1=true: expected a value"),
        ({"train": {"seq_len_schedule": [[0, 12], [64, 20]]}}, "train.seq_len_schedule.1: 20 does not divide"),
        ({"train": {"skip_steps": [0]}}, "train.skip_steps.0=0"),
        ({"guard": {"spike": "explode"}}, "guard.spike='explode'"),
        ({"eval": {"patience": 3}, "data": {"valid": None}}, "eval.patience=3 needs held-out text: set data.valid"),
        ({"eval": {"best": "acc"}}, "eval.best=acc: expected valid_loss, or eval/TASK/METRIC of one of eval.tasks"),
        ({"eval": {"best": "valid_zeal"}}, "eval.best=valid_zeal: whether it is to rise or to fall is not known; set"),
        ({"eval": {"best_mode": "max"}}, "eval.best_mode=max: of losses the lowest is the best"),
        ({"eval": {"best": "valid_ppl"}, "data": {"valid": None}}, "eval.best=valid_ppl needs held-out text: set data"),
        ({"eval": {"best": "eval/arc/acc"}}, "eval.best=eval/arc/acc is of a task, and eval.tasks has none"),
        ({"eval": {"tasks": "arc_easy", "tasks_interval": 0}}, "eval.tasks_interval=0"),
        ({"log": {"trace_steps": [5, 4]}}, "log.trace_steps=[5, 4]: the first step lies after the last"),
        ({"log": {"profile_steps": [5, 4]}}, "log.profile_steps=[5, 4]: the first step lies after the last"),
        ({"log": {"profile_steps": [9, 21]}}, "log.profile_steps=[9, 21]: there is no step 21 in train.steps=20"),
        ({"log": {"trace_steps": [21, 30]}}, "log.trace_steps=[21, 30]: there is no step 30 in train.steps=20"),
        ({"deepspeed": {"zero_optimization": {"offload_optimizer": {}}}}, "set by parallel.offload_optimizer"),
        ({"train": {"lr": 1}}, "unknown key train.lr; did you mean optim.lr?"),
        ({"optim": {"max_steps": 1}}, "unknown key optim.max_steps; did you mean train.steps?"),
        ({"train": {"block_size": 1}}, "unknown key train.block_size; did you mean train.seq_len?"),
        ({"log": {"keep": 1}}, "unknown key log.keep; did you mean checkpoint.keep?"),
        ({"checkpoint": {"allow_changes": ["optim.lrr"]}}, "checkpoint.allow_changes=optim.lrr: no such key; did you"),
        ({"data": {"cache_dir": "$NO_SUCH_VARIABLE/cache"}}, "data.cache_dir='$NO_SUCH_VARIABLE/cache': $NO_SUCH_VAR"),
    ],
)
def test_a_wrong_config_names_its_key(tmp_path: Path, sections: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as error:
        config_with(tmp_path, **sections)
    assert expected in str(error.value)


def test_the_global_batch_must_be_cut_evenly_and_the_message_says_how(tmp_path: Path) -> None:
    config = config_with(tmp_path, train={"global_batch_size": 12, "micro_batch_size": 4})
    assert accumulation_steps(config, check_layout(config, 1).data) == 3
    assert accumulation_steps(config, check_layout(config, 3).data) == 1
    with pytest.raises(UserError, match=r"train\.micro_batch_size=4 x 2 .*; use train\.micro_batch_size=3"):
        check_layout(config, 2)


def test_tensor_parallel_ranks_read_the_same_rows(tmp_path: Path) -> None:
    parallel = {"tensor": 2}
    config = config_with(tmp_path, train={"global_batch_size": 12, "micro_batch_size": 4}, parallel=parallel)
    assert accumulation_steps(config, check_layout(config, 2).data) == 3
    assert accumulation_steps(config, check_layout(config, 6).data) == 1


def test_every_size_of_the_batch_schedule_must_be_cut_evenly(tmp_path: Path) -> None:
    train = {"global_batch_size": 8, "micro_batch_size": 4, "batch_schedule": [[64, 16], [128, 20]]}
    config = config_with(tmp_path, train=train)
    assert accumulation_steps(config, check_layout(config, 1).data) == 5  # of the largest batch
    # the advice holds for all of 8, 16 and 20
    with pytest.raises(UserError, match=r"train\.batch_schedule\.1\.1=20 .* use train\.micro_batch_size=2"):
        check_layout(config, 2)


def test_the_length_is_steps_or_epochs_and_a_thousand_steps_by_default() -> None:
    assert TrainConfig().steps == 1000 and TrainConfig(steps=None).steps == 1000
    assert TrainConfig(epochs=0.5).steps is None
    assert TrainConfig(epochs=None, steps=3).steps == 3


def test_a_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    config = config_with(
        tmp_path,
        optim={"schedule": "one_cycle", "lr_factors": {"norm": 0.5}},
        train={"batch_schedule": [[64, 32]], "seq_len_schedule": [[0, 12]], "skip_steps": [3]},
        log={"trace_steps": [1, 2]},
    )
    assert validate(config.model_dump(mode="json"), "again") == config


def test_wandb_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match=r"log\.wandb=true.*lattice-llm\[wandb\]"):
        config_with(tmp_path, log={"wandb": True})


def test_only_what_changes_the_mathematics_counts_as_a_difference(tmp_path: Path) -> None:
    saved = config_with(tmp_path).model_dump(mode="json")
    same = config_with(tmp_path, train={"steps": 500, "micro_batch_size": 2}, log={"interval": 1}, eval={"interval": 7})
    assert refused_changes(saved, same.model_dump(mode="json")) == []
    other = config_with(tmp_path, train={"seed": 3}, optim={"lr": 0.5}).model_dump(mode="json")
    assert refused_changes(saved, other) == ["optim.lr: 0.001 -> 0.5", "train.seed: 0 -> 3"]
    assert refused_changes(saved, other, allowed=("optim",)) == ["train.seed: 0 -> 3"]


@pytest.mark.parametrize(
    ("sections", "changed"),
    [
        ({"parallel": {"zero_stage": 2, "offload_optimizer": True}}, []),
        ({"train": {"batch_schedule": [[64, 32]], "compile": True, "activation_checkpointing": "full"}}, []),
        ({"train": {"skip_steps": [4]}, "guard": {"spike": "rewind"}, "eval": {"patience": 2}}, []),
        ({"train": {"steps": None, "epochs": 2.0}}, []),
        ({"model": {"ssm": {"kernel": "mamba_ssm"}}}, []),
        ({"model": {"ssm": {"chunk": 32}}}, ["model.ssm.chunk"]),
        ({"train": {"seq_len_schedule": [[0, 24]]}}, ["train.seq_len_schedule"]),
        ({"train": {"precision": "bf16"}}, ["train.precision"]),
        ({"optim": {"name": "muon", "ema_decay": 0.99}}, ["optim.ema_decay", "optim.name"]),
        ({"optim": {"lr_factors": {"head": 0.5}}}, ["optim.lr_factors.head"]),
    ],
)
def test_which_keys_may_change_on_resume(tmp_path: Path, sections: dict[str, Any], changed: list[str]) -> None:
    saved = config_with(tmp_path, model={"ssm": {}}).model_dump(mode="json")
    now = config_with(tmp_path, **{"model": {"ssm": {}}, **sections}).model_dump(mode="json")
    assert [line.split(":")[0] for line in refused_changes(saved, now)] == changed


def test_a_checkpoint_written_before_a_key_existed_stands_at_its_default(tmp_path: Path) -> None:
    now = config_with(tmp_path).model_dump(mode="json")
    saved = config_with(tmp_path).model_dump(mode="json")
    del saved["optim"]["muon_momentum"], saved["model"]["qk_norm"], saved["train"]["seq_len_schedule"], saved["guard"]
    assert refused_changes(saved, now) == ["model.qk_norm: None -> 'l2'"]


@pytest.mark.parametrize(
    ("flags", "sections", "expected"),
    [
        ([], {"train": {"stesp": 3}}, "unknown key train.stesp; did you mean train.steps?"),
        (["--runn_dir=x"], {}, "unknown flag --runn_dir; did you mean --run_dir?"),
        (["--dry_run=maybe"], {}, "--dry_run=maybe: expected true or false"),
        (["--log.tensorboard=perhaps"], {}, "log.tensorboard='perhaps'"),
        (["--train.steps=many"], {}, "train.steps='many'"),
        (["--train.steps"], {}, "train.steps=true: expected a value other than true or false"),
        (["--optim.clip_norm=false"], {}, "optim.clip_norm=false: expected a value"),
        (["--run_dir"], {}, "--run_dir needs a value"),
        (["stray"], {}, "unexpected word 'stray'; every option is --key=value"),
        (["quickstart"], {}, "every option is --key=value; did you mean --config quickstart?"),
        (
            [],
            {"train": {"global_batch_size": 7}},
            "train.global_batch_size=7 is not divisible by train.micro_batch_size=4",
        ),
        ([], {"train": {"batch_schedule": [[64, 18]]}}, "train.batch_schedule.0.1=18 is not divisible"),
        (["--train.epochs=2"], {}, "train.steps=20 and train.epochs=2.0 both give the length; set one of them to null"),
        ([], {"model": {"n_kv_heads": 3}}, "n_kv_heads=3"),
        ([], {"model": {"layer_pattern": ["attn:sideways"]}}, "sideways"),
        ([], {"parallel": {"tensor": 2}}, "parallel.tensor=2 does not divide the number of ranks, 1"),
        (["--nproc=2"], {"parallel": {"zero_stage": 3, "expert": 2}}, "parallel.zero_stage=3 needs parallel.expert=1"),
        (["--nproc=4", "--dry_run"], {"parallel": {"tensor": 3}}, "nearest that works on 4 ranks: parallel.tensor=4"),
        (["--optim.min_lr=1"], {}, "optim.min_lr=1"),
        (["--optim.betas=[1.5, 0.9]"], {}, "optim.betas.0=1.5"),
        ([], {"eval": {"prompts": []}}, "eval.prompts"),
        ([], {"eval": {"images": ["a.png", "b.png"]}}, "eval.images has 2 entries for 1 eval.prompts"),
        ([], {"deepspeed": {"zero_optimization": {"stage": 3}}}, "deepspeed.zero_optimization.stage"),
        ([], {"deepspeed": {"bf16": {"enabled": True}}}, "deepspeed.bf16"),
        (
            [],
            {"data": {"train": [{"path": "a", "wieght": 2}]}},
            "unknown key data.train.0.wieght; did you mean weight?",
        ),
        ([], {"data": {"train": []}}, "data.train"),
    ],
)
def test_a_launch_refuses_before_any_process_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], sections: dict[str, Any], expected: str
) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_config(tmp_path, **sections))
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--config", str(config), *flags])
    with pytest.raises(UserError) as error:
        pretrain.main()
    assert expected in str(error.value)
    assert not torch.distributed.is_initialized()


def test_false_on_the_command_line_is_false(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_config(tmp_path, log={"tensorboard": True}))
    monkeypatch.setattr("sys.argv", ["p", "--config", str(config), "--dry_run=config", "--log.tensorboard=false"])
    pretrain.main()
    assert "tensorboard: false" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (bytes(range(256)), "not a text file; expected YAML"),
        (b"- a\n- b\n", "expected a mapping of sections, found list"),
        (b"a: [1\n", "not valid YAML"),
        (b"? [1, 2]\n: 3\n", "not valid YAML"),
        (b"a:\n\t- 1\n", "not valid YAML"),
        (b"", "is empty"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "c.yaml")
    assert str(error.value).startswith(f"{tmp_path / 'c.yaml'}: {expected}")


def test_a_path_stays_as_it_was_typed() -> None:
    flags = parse_run_flags(["--config", "c.yaml", "--run_dir", "2024_01"])
    assert flags.run_dir == "2024_01"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("learning_rate: 1e-3", "unknown key learning_rate; did you mean optim.lr?"),
        ("batch_size: 8", "unknown key batch_size; did you mean train.global_batch_size?"),
        ("output_dir: x", "unknown key output_dir; did you mean --run_dir?"),
        ("trian: {steps: 3}", "unknown key trian; did you mean train?"),
        ("train.steps: 3", "unknown key train.steps; in a file it is the key steps under train"),
    ],
)
def test_a_key_that_nobody_knows_names_the_one_that_was_meant(tmp_path: Path, line: str, expected: str) -> None:
    path = write_config(tmp_path / "c.yaml", tiny_config(tmp_path))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError) as error:
        load_config(path)
    assert expected in str(error.value)


def test_every_key_that_another_trainers_name_leads_to_is_one() -> None:
    assert set(OTHERS_NAMES) <= {*keys_of(RunConfig), *OWN_FLAGS}
    assert not {name for names in OTHERS_NAMES.values() for name in names} & set(keys_of(RunConfig))


WRONG = ("text", "-1", "true", "[1, a]", "{a: 1}", "null", "1e400", "1.5", ".nan", "99999999999")


@pytest.mark.parametrize("written", WRONG)
def test_a_wrong_value_of_any_key_is_one_line_with_the_key(tmp_path: Path, written: str) -> None:
    for key in keys_of(RunConfig):
        if key.startswith(("data.train.", "data.valid.")):
            continue  # of a list's items
        raw = tiny_config(tmp_path)
        node: dict[str, Any] = raw
        *path, leaf = key.split(".")
        for part in path:
            node[part] = dict(node.get(part) or {})
            node = node[part]
        node[leaf] = scalar(written)
        try:
            validate(raw, "c.yaml")
        except UserError as error:
            line = str(error)
            assert leaf in line and key.rpartition(".")[0] in line and len(line.splitlines()) == 1, (key, line)
            assert "pydantic" not in line and len(line) < 900, (key, line)


def read(tmp_path: Path, **changes: str) -> RunConfig:
    """The tiny config with keys, `__` for a dot, written as the text of a YAML value."""
    lines = [f"{key.replace('__', '.')}: {value}" for key, value in changes.items()]
    raw = tiny_config(tmp_path)
    for key, value in (line.split(": ", 1) for line in lines):
        section, leaf = key.split(".")
        raw[section] = {**raw.get(section, {}), leaf: scalar(value)}
    return validate(raw, "c.yaml")


def test_a_number_of_yaml_1_1_is_what_was_written(tmp_path: Path) -> None:
    assert read(tmp_path, train__steps="010").train.steps == 10
    assert read(tmp_path, train__steps="0o10").train.steps == 8
    assert read(tmp_path, train__steps="1_000").train.steps == 1000
    assert read(tmp_path, train__steps="1e3").train.steps == 1000
    assert read(tmp_path, optim__lr="1e-3").optim.lr == 1e-3
    for wrong in ("1:30", "1,000", "1e3.5", "1.5"):
        with pytest.raises(UserError, match=r"train\.steps="):
            read(tmp_path, train__steps=wrong)


def test_text_that_looks_like_a_number_a_date_or_a_word_is_text(tmp_path: Path) -> None:
    config = read(tmp_path, eval__prompts="[no, 007, 2024-01-01, 1_0, 1e3]", data__train="2024")
    assert config.eval.prompts == ("no", "007", "2024-01-01", "1_0", "1e3") and config.data.train == "2024"
    assert read(tmp_path, guard__spike="off").guard.spike == "off"
    assert read(tmp_path, log__tensorboard="yes").log.tensorboard is True


def test_an_empty_section_has_its_defaults(tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", {**tiny_config(tmp_path), "guard": None, "deepspeed": None})
    assert load_config(path).guard == RunConfig.model_fields["guard"].default


def test_a_file_of_windows_with_anchors_reads(tmp_path: Path) -> None:
    text = write_config(tmp_path / "c.yaml", tiny_config(tmp_path)).read_text()
    merged = text + "guard: &a {spike: warn}\ndeepspeed: {}\n"
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbf" + merged.replace("\n", "\r\n").encode())
    assert load_config(tmp_path / "c.yaml").guard.spike == "warn"


@pytest.mark.parametrize("written", ["optim.lr,optim.min_lr", "[optim.lr, optim.min_lr]", "[optim.lr,optim.min_lr]"])
def test_a_list_reads_with_and_without_brackets(tmp_path: Path, written: str) -> None:
    path = write_config(tmp_path / "c.yaml", tiny_config(tmp_path))
    flags = parse_run_flags(["--config", str(path), f"--checkpoint.allow_changes={written}", "--train.skip_steps=3"])
    config = load_config(flags.config, flags.overrides)
    assert config.checkpoint.allow_changes == ("optim.lr", "optim.min_lr") and config.train.skip_steps == (3,)


def test_an_item_of_a_list_is_set_alone(tmp_path: Path) -> None:
    train = {"batch_schedule": [[64, 32], [128, 48]]}
    path = write_config(tmp_path / "c.yaml", tiny_config(tmp_path, train=train, eval={"prompts": ["a", "b"]}))
    words = ["--optim.betas.0=0.8", "--train.batch_schedule.1.1=16", "--eval.prompts.1=c: d", "--data.train.0.weight=2"]
    flags = parse_run_flags(["--config", str(path), *words])
    config = load_config(flags.config, flags.overrides)
    assert config.optim.betas == (0.8, 0.95) and config.train.batch_schedule == ((64, 32), (128, 16))
    assert config.eval.prompts == ("a", "c: d")
    assert not isinstance(config.data.train, str) and config.data.train[0].weight == 2


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--train.skip_steps.0=3", "give the whole list, as --train.skip_steps=[3]"),
        ("--train.batch_schedule.0.1=32", "--train.batch_schedule.0.1: train.batch_schedule is not a list there"),
        ("--optim.betas.2=0.5", "optim.betas has the items 0 to 1; give the whole list, as --optim.betas=[0.9,0.95,0."),
        ("--model.layer_pattern.0=attn", "give the whole list, as --model.layer_pattern=['attn']"),
    ],
)
def test_an_item_that_a_list_has_not_is_refused_with_the_flag_for_all(
    tmp_path: Path, flag: str, expected: str
) -> None:
    path = write_config(tmp_path / "c.yaml", tiny_config(tmp_path))
    flags = parse_run_flags(["--config", str(path), flag])
    with pytest.raises(UserError) as error:
        load_config(flags.config, flags.overrides)
    assert expected in str(error.value)


@pytest.mark.parametrize("prompt", ["Hello, world: a #1", "{not yaml", "10", "yes", "'quoted", "a: b", "*x", "- a"])
def test_a_prompt_on_the_command_line_is_text(tmp_path: Path, prompt: str) -> None:
    path = write_config(tmp_path / "c.yaml", tiny_config(tmp_path))
    flags = parse_run_flags(["--config", str(path), f"--eval.prompts={prompt}"])
    assert load_config(flags.config, flags.overrides).eval.prompts == (prompt,)


def test_a_tilde_is_the_home_folder_wherever_a_path_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    raw = tiny_config(tmp_path, data={"train": [{"path": "~/train.jsonl"}], "valid": "~/v.jsonl", "cache_dir": "~/c"})
    raw["tokenizer"] = {"kind": "characters", "path": "~/t.json"}
    write_config(tmp_path / "model.yaml", raw.pop("model"))
    write_config(tmp_path / "c.yaml", raw)
    flags = parse_run_flags(["--config=~/c.yaml", "--run_dir=~/run", "--model=~/model.yaml"])
    config = load_config(flags.config, flags.overrides)
    assert flags.folder() == tmp_path / "run" and config.data.cache_dir == str(tmp_path / "c")
    assert not isinstance(config.data.train, str) and config.data.train[0].path == str(tmp_path / "train.jsonl")
    assert (config.data.valid, config.tokenizer.path) == (str(tmp_path / "v.jsonl"), str(tmp_path / "t.json"))


def test_help_lists_every_key_with_its_documentation() -> None:
    text = help_text()
    assert "--train.global_batch_size" in text and "over all ranks; does not depend on the layout" in text
    assert "--model.moe.n_experts" in text
