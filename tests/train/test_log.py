"""What a run reports: rows of repeated steps are replaced, every sink of curves gets the same points."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from llm.errors import UserError
from llm.report.folder import read_folder
from llm.train.curves import WANDB_ID, WeightsAndBiases
from llm.train.folder import begun_before
from llm.train.log import RunLog

ROW = {
    "loss": 2.0, "lm_loss": 2.0, "grad_norm": 1.0, "lr": 0.1, "tokens_per_s": 10.0, "data_wait_s": 0.0, "mfu": None,
    "step_time_s": 1.0, "memory_gb": 1.0,
}  # fmt: skip


class FakeRun:
    """Keeps what a real run would send; like the service it drops steps that lie behind."""

    def __init__(self, module: Any, **options: Any) -> None:
        self.module, self.options, self.finished = module, options, False

    def log(self, values: dict[str, Any], step: int) -> None:
        points = self.module.points.setdefault(self.options["id"], {})
        if step >= max(points, default=0):
            points.setdefault(step, {}).update(values)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = types.ModuleType("wandb")
    module.runs, module.points, module.refuse = [], {}, False
    module.Error = type("Error", (Exception,), {})
    module.Html = lambda text: ("html", text)

    def init(**options: Any) -> FakeRun:
        if module.refuse:
            raise module.Error("api_key not configured")
        module.runs.append(FakeRun(module, **options))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def write_steps(run_dir: Path, first: int, last: int, loss: float = 2.0) -> None:
    sink = WeightsAndBiases(run_dir, {"train": {"seed": 0}})
    log = RunLog(run_dir, first_step=first, steps=9, interval=100, curves=[sink], measures=["dpo_margin"])
    for step in range(first, last + 1):
        log.step({**ROW, "step": step, "loss": loss, "dpo_margin": 0.25})
    log.sample(last, "a", "<b>text")
    log.close()


def test_wandb_gets_every_step_under_the_names_of_the_curves(tmp_path: Path, wandb: Any) -> None:
    write_steps(tmp_path, 1, 3)
    (run,) = wandb.runs
    assert run.finished and run.options["config"] == {"train": {"seed": 0}} and run.options["dir"] == str(tmp_path)
    points = wandb.points[run.options["id"]]
    assert list(points) == [1, 2, 3]
    assert points[2]["train/loss"] == 2.0 and points[2]["optim/lr"] == 0.1
    assert points[2]["train/dpo_margin"] == 0.25, "a measure of an objective"
    assert "throughput/mfu" not in points[2], "null is no point"
    assert points[3]["sample"] == ("html", "<pre>&lt;b&gt;text</pre>")


def test_a_resumed_run_goes_on_with_the_same_wandb_run_and_no_curve_doubles_back(tmp_path: Path, wandb: Any) -> None:
    write_steps(tmp_path, 1, 5)
    write_steps(tmp_path, 4, 7)
    first, second = wandb.runs
    assert first.options["id"] == second.options["id"] == (tmp_path / WANDB_ID).read_text()
    assert second.options["resume"] == "allow"
    assert list(wandb.points) == [first.options["id"]]
    assert list(wandb.points[first.options["id"]]) == [1, 2, 3, 4, 5, 6, 7]


def test_two_run_folders_are_two_wandb_runs(tmp_path: Path, wandb: Any) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_steps(tmp_path / name, 1, 1)
    assert len(wandb.points) == 2 and [run.options["name"] for run in wandb.runs] == ["a", "b"]


def test_what_wandb_refuses_is_one_line_that_says_what_to_do(tmp_path: Path, wandb: Any) -> None:
    wandb.refuse = True
    with pytest.raises(UserError, match="log.wandb=true: api_key not configured; try `wandb login`, or WANDB_MODE"):
        write_steps(tmp_path, 1, 1)


def test_rows_of_repeated_steps_are_replaced_and_a_torn_one_is_dropped(tmp_path: Path, wandb: Any) -> None:
    write_steps(tmp_path, 1, 5, loss=2.0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    write_steps(tmp_path, 4, 6, loss=3.0)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 2.0), (2, 2.0), (3, 2.0), (4, 3.0), (5, 3.0), (6, 3.0)]


def test_the_error_that_ends_a_run_is_in_its_log_and_an_event_of_its_report_but_not_twice_on_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path, first_step=1, steps=9, interval=5, curves=[])
    log.step({**ROW, "step": 1})
    log.failed(UserError("step 2: the gradient is not finite;\nguard.nonfinite=raise"))
    log.failed(RuntimeError("out of memory"))
    log.close()
    *_, mended, bug = read_folder(tmp_path).events
    assert mended == (2, "error", "error: step 2: the gradient is not finite; guard.nonfinite=raise")
    assert bug == (2, "error", "error: RuntimeError: out of memory")
    assert "error" not in capsys.readouterr().out, "the process prints it last"


def test_a_run_that_was_ended_before_its_first_checkpoint_says_that_it_begins_anew(tmp_path: Path) -> None:
    assert begun_before(tmp_path, 0) == []
    log = RunLog(tmp_path, first_step=1, steps=9, interval=1, curves=[])
    log.step({**ROW, "step": 1})
    assert begun_before(tmp_path, 1) == []
    (line,) = begun_before(tmp_path, 0)
    log.say(line)
    log.close()
    (event,) = read_folder(tmp_path).events
    assert event == (0, "resume", "begins anew: this run was ended before its first checkpoint")


def test_a_step_that_was_passed_over_is_not_said_to_have_no_finite_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path, first_step=1, steps=9, interval=1, curves=[])
    for step, skipped in ((1, "passed over"), (2, "loss")):
        log.step({**ROW, "step": step, "loss": None, "grad_norm": None, "skipped": skipped})
    log.close()
    first, second = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert first.count("not computed") == 2 and "not finite" not in first
    assert second.count("not finite") == 2


def test_what_tasks_found_is_a_line_each_and_a_curve_but_for_the_standard_errors(tmp_path: Path, wandb: Any) -> None:
    sink = WeightsAndBiases(tmp_path, {})
    log = RunLog(tmp_path, first_step=1, steps=9, interval=100, curves=[sink])
    found = {"eval/arc/acc": 0.5, "eval/arc/acc_stderr": 0.05, "eval/arc/acc_norm": None, "eval/wiki/ppl": 7.25}
    log.first({"step": 0, **found})
    log.step({**ROW, "step": 1, "valid_loss": 2.0, **found})
    log.close()
    points = wandb.points[wandb.runs[0].options["id"]]
    for step in (0, 1):
        drawn = {key: value for key, value in points[step].items() if key.startswith("eval/")}
        assert drawn == {"eval/arc/acc": 0.5, "eval/wiki/ppl": 7.25}
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines[:2] == ["step 0: arc: acc 0.5000 +- 0.0500, acc_norm no value", "step 0: wiki: ppl 7.2500"]
    assert lines[-3:] == ["step 1: validation loss 2.0000", *(line.replace("step 0", "step 1") for line in lines[:2])]
