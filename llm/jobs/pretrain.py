"""The job of launch/pretrain.py: a training, or a step of one rebuilt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import yaml

from llm.jobs.runner import number_of_ranks
from llm.parallel.launch.world import World
from llm.parallel.layout import Layout
from llm.train.config import RunConfig, check_layout, load_config
from llm.train.config.flags import RunFlags, help_text, parse_run_flags
from llm.train.preflight import preflight
from llm.train.replay import check_replay, replay


@dataclass(frozen=True)
class Pretrain:
    """A run of a config, whose layout has been checked."""

    words: list[str]
    flags: RunFlags
    config: RunConfig
    layout: Layout

    script: ClassVar[str] = "launch/pretrain.py"
    example: ClassVar[str] = "configs/pretrain/quickstart.yaml"

    @classmethod
    def parse(cls, words: Sequence[str]) -> Self:
        """The run that these words ask for. UserError naming the flag or key."""
        flags = parse_run_flags(list(words), cls.example)
        ranks = number_of_ranks(flags.nproc)
        config = cls.completed(load_config(flags.config, flags.overrides))
        return cls(list(words), flags, config, check_layout(config, ranks))

    @classmethod
    def completed(cls, config: RunConfig) -> RunConfig:
        """The config with what this job has by default and another one has not."""
        return config

    @classmethod
    def help(cls) -> str:
        return help_text(cls.script)

    @property
    def nproc(self) -> int | None:
        return self.flags.nproc

    @property
    def dry_run(self) -> bool:
        return bool(self.flags.dry_run) or self.flags.show is not None

    @property
    def timeout_s(self) -> float:
        return self.config.parallel.timeout_s

    @property
    def threads(self) -> int:
        return self.config.train.threads

    def report(self) -> str:
        if self.flags.show is not None:
            from llm.train.show import show

            return "".join(f"{line}\n" for line in show(self.config, self.flags.folder(), self.flags.show))
        from llm.train.dry_run import report  # it imports torch

        run_dir = None if self.flags.dry_run == "config" else self.flags.folder()
        if run_dir is not None:
            preflight(self.config, run_dir)
        text = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
        return text + report(self.config, self.layout, run_dir)

    def check(self, rank: int) -> None:
        if self.flags.replay_step is not None:
            check_replay(self.flags.folder(), self.flags.replay_step, self.config.train.steps)
        elif rank == 0:
            preflight(self.config, self.flags.folder())

    def words_of_a_rank(self) -> list[str]:
        return self.flags.without_nproc(self.words)

    def work(self, world: World) -> None:
        from llm.train.trainer import Trainer  # its imports take seconds, so a wrong config is reported first

        trainer = Trainer(self.config, self.flags.folder(), world)
        if self.flags.replay_step is None:
            trainer.fit()
        else:
            replay(trainer, self.flags.replay_step)
