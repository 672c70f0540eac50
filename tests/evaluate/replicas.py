"""Models of one process, as the evaluation takes them."""

import torch

from llm import LLM
from llm.generation.pictures import Pictures
from llm.parallel.grid import make_grid
from llm.parallel.launch.world import World
from llm.parallel.replica import Replica
from llm.parallel.stages import split
from vision.opening import LIMITS


def replica_of(model: LLM) -> Replica:
    """A model that this process has as a whole."""
    return Replica(model, make_grid(World(0, 1, 0, torch.device("cpu"))), split(model.args, 1))


def pictures_of(model: LLM) -> Pictures:
    """What reads its images."""
    return Pictures(model.args.vision, "model", LIMITS)
