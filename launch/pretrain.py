"""Train a language model.

    torchrun --nproc_per_node 2 launch/pretrain.py --config configs/pretrain/quickstart.yaml [--train.steps=200 ...]

    python launch/pretrain.py --nproc 2 --config ...      # the same on one machine, without torchrun's own flags

The same command again resumes. `--dry_run` checks and prints the resolved config, and memory and
traffic of the layout; `--help` lists every key.

    python launch/pretrain.py --run_dir runs/quickstart --replay_step 120

rebuilds step 120 of a run and lists its documents, the highest loss first.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import llm.installed  # noqa: F401  (says in one line what is missing)

import yaml

from llm import environment
from llm.errors import UserError
from llm.malloc import keep_freed
from llm.parallel.launch import local, process
from llm.train.config import RunConfig, check_layout, load_config
from llm.train.config.flags import RunFlags, help_text, parse_run_flags
from llm.train.preflight import preflight
from llm.train.replay import check_replay, replay
from llm.train.stop import leave_before_first_step


def main() -> None:
    words = sys.argv[1:]
    if "--help" in words or "-h" in words:
        print(help_text())
        return
    flags = parse_run_flags(words)
    place = environment.place()
    if flags.nproc and (place.size > 1 or environment.in_torchrun()):
        raise UserError(f"--nproc={flags.nproc} is for plain python; torchrun has --nproc_per_node")
    config = load_config(flags.config, flags.overrides)
    layout = check_layout(config, flags.nproc or place.size)
    if flags.dry_run:
        if place.rank == 0:
            from llm.train.dry_run import report  # it imports torch

            run_dir = None if flags.dry_run == "config" else flags.folder()
            if run_dir is not None:
                preflight(config, run_dir)
            text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
            print(text + report(config, layout, run_dir), end="")
        return
    if flags.replay_step is not None:
        check_replay(flags.folder(), flags.replay_step, config.train.steps)
    elif place.rank == 0:
        preflight(config, flags.folder())
    if flags.nproc:
        sys.exit(local.torchrun(__file__, flags.without_nproc(words), flags.nproc, config.train.threads))
    train(config, flags)


def train(config: RunConfig, flags: RunFlags) -> None:
    process.quiet_libraries()
    leave_before_first_step()
    if process.read_world().device.type == "cpu":
        keep_freed()
    world = process.start(config.parallel.timeout_s, config.train.threads)
    from llm.train.trainer import Trainer  # its imports take seconds, so a wrong config is told first

    trainer = Trainer(config, flags.folder(), world)
    if flags.replay_step is None:
        trainer.fit()
    else:
        replay(trainer, flags.replay_step)


if __name__ == "__main__":
    process.run(main)
