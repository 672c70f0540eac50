"""How much disk space a run's checkpoints take, and that the dry run says where there is less."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from llm.parallel.layout import Layout
from llm.plan.memory import checkpoint_bytes
from llm.train import dry_run
from llm.train.config import RunConfig, validate
from llm.train.disk import checkpoints_at_once, room
from tests.distributed.harness import tiny_config


def config_with(tmp_path: Path, **sections: Any) -> RunConfig:
    raw = tiny_config(tmp_path, **sections)
    raw["model"] = {**raw["model"], "vocab_size": 258}
    return validate(raw, "config")


def most_at_once(config: RunConfig, best_step: int) -> int:
    """By following a run step by step, whose validation loss falls until `best_step`."""
    own, steps = config.checkpoint, config.train.steps
    assert steps is not None
    folder: list[int] = []
    most, best = 0, None
    for step in range(1, steps + 1):
        new_best = own.keep_best and step % config.eval.interval == 0 and step <= best_step
        best = step if new_best else best
        if step == steps or step % own.interval == 0 or new_best:
            folder.append(step)
            most = max(most, len(folder))
            newest = folder[-own.keep :]
            for_good = [old for old in folder if own.keep_every and old % own.keep_every == 0]
            folder = [old for old in folder if old in newest or old in for_good or old == best]
    return most


def test_checkpoints_at_once_are_those_of_the_worst_run(tmp_path: Path) -> None:
    runs = product((1, 7, 20), (1, 3, 50), (1, 3), (None, 2), (0, 1), (2, 5))
    for steps, interval, keep, every, best, checks in runs:
        checkpoint: dict[str, Any] = {"interval": interval, "keep": keep, "keep_best": bool(best)}
        checkpoint |= {"keep_every": None if every is None else every * interval}
        config = config_with(
            tmp_path,
            train={"steps": steps},
            checkpoint=checkpoint,
            eval={"interval": checks},
            optim={"warmup_steps": 0},
        )
        real = max(most_at_once(config, best_step) for best_step in range(steps + 1))
        # the best, and the one in the making, may be some that stay anyway
        assert real <= checkpoints_at_once(config) <= real + 2, checkpoint


def test_without_a_number_of_steps_those_that_stay_and_the_one_in_the_making_count(tmp_path: Path) -> None:
    config = config_with(tmp_path, train={"steps": None, "epochs": 2}, checkpoint={"keep": 2, "keep_best": True})
    assert checkpoints_at_once(config) == 4


@pytest.mark.parametrize(
    ("optim", "values"), [({}, 3), ({"name": "sgd"}, 1), ({"ema_decay": 0.9}, 4), ({"lr_factors": {"embedding": 0}}, 3)]
)
def test_a_checkpoint_has_each_element_once_on_every_layout(
    tmp_path: Path, optim: dict[str, Any], values: int
) -> None:
    config = config_with(tmp_path, optim=optim)
    found = {checkpoint_bytes(dry_run.workload(config, layout)) for layout in (Layout(1), Layout(4, tensor=2))}
    frozen = 258 * 32 if "lr_factors" in optim else 0  # no moments
    assert found == {4 * (values * 61_600 - 2 * frozen)}


def test_a_disk_without_room_is_a_warning_of_the_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_with(tmp_path, checkpoint={"interval": 5, "keep": 2})
    run_dir = tmp_path / "run"
    needed = 3 * 12 * 61_600  # two that stay and one in the making
    monkeypatch.setattr("llm.train.disk.free_space", lambda folder: (4096, needed - 100))
    (line,) = [line for line in dry_run.report(config, Layout(1), run_dir).splitlines() if "warning" in line]
    assert line.startswith(f"# warning: the file system of {run_dir} has 2.11 MiB free; use another --run_dir")
    (run_dir / "checkpoints" / "step_00000005").mkdir(parents=True)
    (run_dir / "checkpoints" / "step_00000005" / "rank").write_bytes(bytes(100))
    assert room(run_dir) == (needed - 100, 100)  # which a resumed run replaces
    assert "warning" not in dry_run.report(config, Layout(1), run_dir)
    monkeypatch.setattr("llm.train.disk.free_space", lambda folder: None)
    assert "warning" not in dry_run.report(config, Layout(1), run_dir)


def test_the_room_of_a_folder_that_is_not_there_yet_is_that_of_the_one_above(tmp_path: Path) -> None:
    found = room(tmp_path / "a" / "b")
    assert found is not None and found[0] > 0 and found[1] == 0
