"""The job of launch/finetune.py: a training that goes on from a model, which is measured before the first step."""

from typing import ClassVar

from llm.jobs.pretrain import Pretrain
from llm.train.config import RunConfig


class Finetune(Pretrain):
    """As a pretraining, with the same config and run folder, but `eval.at_start` is true unless the config says."""

    script: ClassVar[str] = "launch/finetune.py"
    example: ClassVar[str] = "configs/finetune/own_chats.yaml"

    @classmethod
    def completed(cls, config: RunConfig) -> RunConfig:
        if "at_start" in config.eval.model_fields_set or config.data.valid is None:
            return config
        return config.model_copy(update={"eval": config.eval.model_copy(update={"at_start": True})})
