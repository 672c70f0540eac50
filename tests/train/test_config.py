"""The run config: what is refused, how it is said, and the learning-rate schedules."""

from pathlib import Path
from typing import Any

import pytest
import torch

from launch import pretrain
from llm.errors import UserError
from llm.train.config import OptimConfig, accumulation_steps, differences, learning_rate, load_config, validate
from llm.train.flags import help_text, parse_run_flags
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
        ({"model": {"moe": {"n_experts": 4, "topk": 2}}}, "unknown key model.moe.topk; did you mean top_k?"),
        ({"train": {"seq_len": 65}}, "train.seq_len=65 is above model.max_seq_len=64"),
        ({"optim": {"decay_steps": 5}}, "optim.decay_steps belongs to optim.schedule=wsd"),
        ({"parallel": {"zero_stage": 3}}, "parallel.zero_stage=3 is not available yet"),
    ],
)
def test_a_wrong_config_names_its_key(tmp_path: Path, sections: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as error:
        config_with(tmp_path, **sections)
    assert expected in str(error.value)


def test_the_global_batch_must_be_cut_evenly_and_the_message_says_how(tmp_path: Path) -> None:
    config = config_with(tmp_path, train={"global_batch_size": 12, "micro_batch_size": 4})
    assert accumulation_steps(config, 1) == 3
    assert accumulation_steps(config, 3) == 1
    with pytest.raises(UserError, match="use train.micro_batch_size=3"):
        accumulation_steps(config, 2)


def test_every_schedule_warms_up_peaks_and_ends_where_it_says() -> None:
    steps = 100
    for schedule in ("cosine", "wsd", "constant"):
        optim = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=10, schedule=schedule)  # type: ignore[arg-type]
        rates = [learning_rate(optim, steps, step) for step in range(1, steps + 1)]
        assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0
        assert all(later <= earlier for earlier, later in zip(rates[9:], rates[10:], strict=False))
        assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    wsd = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=10, schedule="wsd", decay_steps=40)
    assert learning_rate(wsd, steps, 60) == 1.0 and learning_rate(wsd, steps, 70) == pytest.approx(0.5)


def test_only_what_changes_the_mathematics_counts_as_a_difference(tmp_path: Path) -> None:
    saved = config_with(tmp_path).model_dump(mode="json")
    same = config_with(tmp_path, train={"steps": 500, "micro_batch_size": 2}, log={"interval": 1}, eval={"interval": 7})
    assert differences(saved, same.model_dump(mode="json")) == []
    other = config_with(tmp_path, train={"seed": 3}, optim={"lr": 0.5}).model_dump(mode="json")
    assert differences(saved, other) == ["optim.lr: 0.001 -> 0.5", "train.seed: 0 -> 3"]
    assert differences(saved, other, allowed=("optim",)) == ["train.seed: 0 -> 3"]


@pytest.mark.parametrize(
    ("flags", "sections", "expected"),
    [
        ([], {"train": {"stesp": 3}}, "unknown key train.stesp; did you mean steps?"),
        (["--runn_dir=x"], {}, "unknown flag --runn_dir; did you mean --run_dir?"),
        (["--dry_run=maybe"], {}, "--dry_run=maybe: expected true or false"),
        (["--log.tensorboard=perhaps"], {}, "log.tensorboard='perhaps'"),
        (["--train.steps=many"], {}, "train.steps='many'"),
        (["--train.steps"], {}, "train.steps=true: expected a value other than true or false"),
        (["--optim.clip_norm=false"], {}, "optim.clip_norm=false: expected a value"),
        (["--run_dir"], {}, "--run_dir needs a value"),
        (["stray"], {}, "unexpected word 'stray'"),
        (
            [],
            {"train": {"global_batch_size": 7}},
            "train.global_batch_size=7 is not divisible by train.micro_batch_size=4",
        ),
        ([], {"model": {"n_kv_heads": 3}}, "n_kv_heads=3"),
        ([], {"model": {"layer_pattern": ["attn:sideways"]}}, "sideways"),
        ([], {"parallel": {"tensor": 2}}, "parallel.tensor=2"),
        (["--optim.min_lr=1"], {}, "optim.min_lr=1"),
        (["--optim.betas=[1.5, 0.9]"], {}, "optim.betas.0=1.5"),
        ([], {"eval": {"prompts": []}}, "eval.prompts"),
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
    monkeypatch.setattr("sys.argv", ["p", "--config", str(config), "--dry_run", "--log.tensorboard=false"])
    pretrain.main()
    assert "tensorboard: false" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (bytes(range(256)), "not a text file; expected YAML"),
        (b"- a\n- b\n", "expected a mapping of sections, found list"),
        (b"a: [1\n", "not valid YAML"),
        (b"? [1, 2]\n: 3\n", "not valid YAML"),
        (b"a: 2024-99-99\n", "not valid YAML"),
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


def test_help_lists_every_key_with_its_documentation() -> None:
    text = help_text()
    assert "--train.global_batch_size" in text and "over all ranks; does not depend on the layout" in text
    assert "--model.moe.n_experts" in text
