"""Run under torchrun: train a run, then replay some of its steps, all in one job to save start-up time."""

import json
import shutil
import sys
from pathlib import Path

from llm.parallel.collectives import main_decides
from llm.parallel.launch import process
from llm.train.config import load_config
from llm.train.replay import replay


def main() -> None:
    config_path, run_dir, steps = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    process.quiet_libraries()
    world = process.start(60, 1)
    from llm.train.trainer import Trainer

    config = load_config(config_path)
    Trainer(config, run_dir, world).fit()
    main_decides(lambda: cut_off(run_dir), world)
    for folder, step in [*((run_dir, step) for step in steps), (stopped(run_dir), config.train.steps)]:
        replay(Trainer(load_config(folder / "config.yaml"), folder, world), step)
    in_stages = load_config(staged(run_dir) / "config.yaml", {"parallel.pipeline": 2})
    replay(Trainer(in_stages, staged(run_dir), world), steps[0])


def stopped(run_dir: Path) -> Path:
    """Where the copy lies that looks as if the run had ended in its last step, before it was recorded."""
    return run_dir.with_name("stopped")


def staged(run_dir: Path) -> Path:
    """Where the copy lies that is replayed on a pipeline."""
    return run_dir.with_name("staged")


def cut_off(run_dir: Path) -> None:
    shutil.copytree(run_dir, staged(run_dir))
    folder = stopped(run_dir)
    shutil.copytree(run_dir, folder)
    rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(rows[:-1]))
    shutil.rmtree(max((folder / "checkpoints").glob("step_*")))


if __name__ == "__main__":
    process.run(main)
