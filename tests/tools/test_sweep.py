"""tools/sweep.py: a run for each combination, what had ended passed over, failures reported, and the table."""

import csv
import json
from pathlib import Path

import pytest

from llm.errors import UserError
from tests.distributed.harness import environment, tiny_config, write_config, write_text
from tools import sweep
from tools.sweep_plan import Trial, apart, parse, trials_of

LOSSES = {"1e-3": [3.0, 2.0, 2.5], "3e-4": [3.0, 2.75]}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "c.yaml", tiny_config(tmp_path))


def words(config: Path, *more: str) -> list[str]:
    return [f"--config={config}", f"--output={config.parent / 'out'}", "--sweep=optim.lr=1e-3,3e-4", *more]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that a sweep began; they end at once, with these losses, or fail where the width is 32."""
    began: list[str] = []

    def run(trial: Trial) -> str | None:
        began.append(trial.name)
        trial.folder.mkdir(parents=True)
        if trial.values.get("model.dim") == "32":
            return "out of memory"
        rows = [{"step": i, "valid_loss": loss} for i, loss in enumerate(LOSSES[trial.values["optim.lr"]], 1)]
        (trial.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (trial.folder / "sweep.json").write_text(json.dumps({"config": trial.config}))
        return None

    monkeypatch.setattr(sweep, "run", run)
    return began


def test_commas_within_brackets_do_not_part_values() -> None:
    assert apart("[0.9, 0.95],[0.8, 0.9]") == ["[0.9, 0.95]", "[0.8, 0.9]"]
    assert apart("a,b") == ["a", "b"]


def test_there_is_a_run_for_each_combination_in_a_folder_named_by_its_values(config: Path) -> None:
    settings, common = parse(words(config, "--sweep", "model.dim=32,64", "--train.steps=7"))
    trials = trials_of(settings, common)
    assert [trial.name for trial in trials] == [
        "optim.lr=1e-3,model.dim=32", "optim.lr=1e-3,model.dim=64", "optim.lr=3e-4,model.dim=32",
        "optim.lr=3e-4,model.dim=64",
    ]  # fmt: skip
    assert [(trial.config["optim.lr"], trial.config["model.dim"]) for trial in trials] == [
        (1e-3, 32), (1e-3, 64), (3e-4, 32), (3e-4, 64),
    ]  # fmt: skip
    assert {trial.config["train.steps"] for trial in trials} == {7}
    assert f"--run_dir={config.parent / 'out' / trials[0].name}" in trials[0].command


def test_the_table_has_the_best_first_and_what_had_ended_is_passed_over(
    config: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.main(words(config))
    assert trained == ["optim.lr=1e-3", "optim.lr=3e-4"]
    assert "[2/2] optim.lr=3e-4: valid_loss 2.75 at step 2" in capsys.readouterr().out
    sweep.main(words(config))
    assert len(trained) == 2
    assert capsys.readouterr().out.count("had ended before") == 2
    with (config.parent / "out" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["optim.lr"], row["valid_loss"], row["at step"], row["last valid_loss"]) for row in rows] == [
        ("1e-3", "2", "2", "2.5"), ("3e-4", "2.75", "2", "2.75"),
    ]  # fmt: skip
    sweep.main(words(config, "--mode=max"))
    table = (config.parent / "out" / "table.md").read_text().splitlines()
    assert table[0] == "| optim.lr | valid_loss | at step | last valid_loss | steps | run |"
    assert table[2] == "| 1e-3 | 3 | 1 | 2.5 | 3 | ended |"


def test_a_run_that_fails_is_reported_and_the_others_go_on(
    config: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        sweep.main(words(config, "--sweep=model.dim=32,64"))
    assert stopped.value.code == 1 and len(trained) == 4
    captured = capsys.readouterr()
    assert "[1/4] optim.lr=1e-3,model.dim=32: failed: out of memory" in captured.out
    assert captured.err == "2 of 4 runs failed\n"
    table = (config.parent / "out" / "table.md").read_text().splitlines()
    assert "ended" in table[2] and "ended" in table[3] and "failed: out of memory" in table[4]


def test_a_folder_whose_run_had_another_config_is_refused(config: Path, trained: list[str]) -> None:
    sweep.main(words(config, "--train.steps=4"))
    with pytest.raises(UserError, match="optim.lr=1e-3: has ended with another train.steps .4, and now 5."):
        sweep.main(words(config, "--train.steps=5"))


def test_a_metric_that_no_run_has_is_named_beside_those_there_are(config: Path, trained: list[str]) -> None:
    with pytest.raises(UserError, match="--metric=valid_acc: no run has it; there are step, valid_loss"):
        sweep.main(words(config, "--metric=valid_acc"))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--sweep=model.dim=64,63"], "optim.lr=1e-3,model.dim=63: .*model.n_heads=4 does not divide model.dim=63"),
        (["--sweep=model.dimm=64"], "unknown"),
        (["--sweep=model.dim"], "expected KEY=VALUE,VALUE"),
        (["--sweep=model.dim=64,64"], "'64' is there twice"),
        (["--optim.lr=1e-2"], "optim.lr is given twice"),
        (["--metric=speed"], "whether it is to rise or to fall is not known; give --mode"),
        (["--run_dir=x"], "--run_dir does not go with a sweep"),
        (["--nproc=0"], "--nproc=0: expected a number of processes"),
    ],
)
def test_bad_input_is_refused_before_any_run(
    flags: list[str], named: str, config: Path, trained: list[str]
) -> None:
    with pytest.raises(UserError, match=named):
        sweep.main(words(config, *flags))
    assert not trained and not (config.parent / "out").exists()


@pytest.mark.full
@pytest.mark.distributed
def test_real_runs_of_which_one_finds_no_data_and_the_other_is_not_trained_again(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, value in environment().items():
        monkeypatch.setenv(key, value)
    write_text(config.parent)
    there, gone = config.parent / "train.jsonl", config.parent / "gone.jsonl"
    given = [f"--config={config}", f"--output={config.parent / 'out'}", f"--sweep=data.train={gone},{there}"]
    given += ["--train.steps=2", "--eval.interval=2"]
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            sweep.main(given)
        assert stopped.value.code == 1
    printed = capsys.readouterr().out
    assert "gone.jsonl" in printed.splitlines()[0] and printed.count("had ended before") == 1
    with (config.parent / "out" / "table.csv").open() as file:
        first, second = csv.DictReader(file)
    assert first["data.train"] == str(there) and float(first["valid_loss"]) > 0 and first["at step"] == "2"
    assert second["valid_loss"] == "" and second["run"].startswith("failed: ")
