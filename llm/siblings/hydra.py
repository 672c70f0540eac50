"""HYDRA's public names over `LLM` and the one trainer: docs/siblings/hydra.md goes through them one by one.

    python -m llm.siblings.hydra train | resume | list | debug
"""

from llm.siblings.hydra_config import ModelType, TrainConfig, default_config, read_config
from llm.siblings.hydra_model import Hydra, create_model

__all__ = ["Hydra", "ModelType", "TrainConfig", "create_model", "default_config", "read_config"]

if __name__ == "__main__":
    from llm.parallel.launch import process
    from llm.siblings.hydra_command import main

    process.run(main)
