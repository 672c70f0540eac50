"""The run config: one YAML file, one schema, overrides from the command line.

Everything is checked here, before a process group exists: unknown keys, wrong types, impossible combinations. A
message names the key (`train.steps`) and says what is possible instead. The line under each field is what `--help`
prints.
"""

from llm.train.config.data import DataConfig
from llm.train.config.layout import accumulation_steps, check_layout, layout_of
from llm.train.config.load import config_of, load_config, validate
from llm.train.config.optim import OptimConfig
from llm.train.config.outputs import CheckpointConfig, EvalConfig, LogConfig
from llm.train.config.schema import ModelSection, ParallelConfig, RunConfig
from llm.train.config.section import Section
from llm.train.config.train import GuardConfig, TrainConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "GuardConfig",
    "LogConfig",
    "ModelSection",
    "OptimConfig",
    "ParallelConfig",
    "RunConfig",
    "Section",
    "TrainConfig",
    "accumulation_steps",
    "check_layout",
    "config_of",
    "layout_of",
    "load_config",
    "validate",
]
