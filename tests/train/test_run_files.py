"""What a run leaves for its report, for TensorBoard, and of steps that it profiles."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm.parallel.layout import Layout
from llm.train.curves import TensorBoard
from llm.train.log import MOST_EXPERT_ROWS, RunLog
from llm.train.profiling import Profiler
from tests.train.test_log import ROW


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_steps(run_dir: Path, first: int, last: int, steps: int = 12, interval: int = 2) -> None:
    log = RunLog(run_dir, first_step=first, steps=steps, interval=interval)
    log.begin(json.dumps({"step": first - 1}))
    for step in range(first, last + 1):
        log.experts(step, torch.tensor([[step, 3], [4, 5]]))
        log.step({**ROW, "step": step})
        if step % 3 == 0:
            log.sample(step, "a", f"text of {step}")
    log.close()


def test_loads_and_samples_of_repeated_steps_are_replaced_and_starts_are_kept(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 8)
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 9, "pro')
    write_steps(tmp_path, 5, 12)
    whole = tmp_path / "whole"
    write_steps(whole, 1, 12)
    for name in ("experts.jsonl", "samples.jsonl"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    assert rows_of(tmp_path / "experts.jsonl")[1] == {"step": 4, "counts": [[4, 3], [4, 5]]}
    assert [row["step"] for row in rows_of(tmp_path / "experts.jsonl")] == [2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in rows_of(tmp_path / "samples.jsonl")] == [3, 6, 9, 12]
    assert rows_of(tmp_path / "starts.jsonl") == [{"step": 0}, {"step": 4}]


def test_a_long_run_records_its_loads_about_a_thousand_times(tmp_path: Path) -> None:
    log = RunLog(tmp_path, first_step=1, steps=100_000, interval=10)
    for step in range(1, 100_001, 50):
        log.experts(step + 49, torch.ones(1, 2, dtype=torch.int64))
    log.close()
    assert len(rows_of(tmp_path / "experts.jsonl")) == MOST_EXPERT_ROWS


def test_tensorboard_gets_loads_epoch_step_time_and_the_config(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path, 1, "train:\n  steps: 12\n")
    log = RunLog(tmp_path, first_step=1, steps=12, interval=2, curves=[board])
    log.step({**ROW, "step": 1, "epoch": 0.5, "expert_load": 1.5, "expert_rank_load": 1.25, "mfu": 0.375})
    log.close()
    found = EventAccumulator(str(tmp_path / "tb"))
    found.Reload()
    wanted = {
        "progress/epoch": 0.5, "moe/expert_load": 1.5, "moe/expert_rank_load": 1.25, "throughput/mfu": 0.375,
        "throughput/step_time_s": 1.0,
    }  # fmt: skip
    assert {name: found.Scalars(name)[0].value for name in wanted} == wanted
    (event,) = found.Tensors("config/text_summary")
    assert event.step == 0 and b"    train:\n      steps: 12" in event.tensor_proto.string_val[0]


def grid_of(rank: int, **layout: int) -> Any:
    world = SimpleNamespace(rank=rank, device=torch.device("cpu"))
    return SimpleNamespace(world=world, layout=Layout(**layout))


def work() -> torch.Tensor:
    return torch.ones(8, 8) @ torch.ones(8, 8)


def test_the_named_steps_are_profiled_also_those_left_after_a_resume(tmp_path: Path) -> None:
    for first in (1, 4):
        profiler = Profiler(grid_of(0, world=1), tmp_path, (3, 4))
        for step in range(first, 6):
            with profiler.step(step):
                work()
        names = {f"steps_{max(first, 3)}-4_rank_0.json.gz"}
        (note,) = profiler.notes()
        assert names.pop() in note
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {
        "steps_3-4_rank_0.json.gz", "steps_4-4_rank_0.json.gz",
    }  # fmt: skip
    with gzip.open(tmp_path / "profile" / "steps_3-4_rank_0.json.gz") as file:
        events = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"step 3", "step 4", "aten::mm"} <= events and not {"step 2", "step 5"} & events


def test_a_run_that_ends_or_goes_back_in_between_keeps_what_was_profiled(tmp_path: Path) -> None:
    profiler = Profiler(grid_of(0, world=1), tmp_path, (1, 9))
    with profiler.step(1):
        work()
    profiler.close()
    profiler.close()
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["steps_1-1_rank_0.json.gz"]


def test_a_profile_that_cannot_be_written_is_said_and_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("a file where the folder should be")
    profiler = Profiler(grid_of(0, world=1), tmp_path, (1, 1))
    with profiler.step(1):
        result = work()
    assert result[0, 0] == 8
    (note,) = profiler.notes()
    assert note.startswith("log.profile_steps: rank 0 has no profile (") and note.endswith("; the run goes on")


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        ({"world": 4}, [0]),
        ({"world": 8, "tensor": 2, "pipeline": 2}, [0, 1, 4, 5]),
        ({"world": 4, "expert": 2}, [0, 1]),
    ],
)
def test_profiled_are_the_ranks_that_together_hold_the_model_once(layout: dict[str, int], ranks: list[int]) -> None:
    world = range(layout["world"])
    assert [rank for rank in world if Profiler(grid_of(rank, **layout), Path(), (1, 1)).steps] == ranks
