"""Run under torchrun: engine_job.py, but norms of queries and keys start away from 1, so that each of their elements
matters; and on several ranks Muon's buckets are so small that parameters, and stacks of experts, spread over several.
"""

import os

import torch

from llm import init
from llm.parallel import muon
from llm.parallel.launch import process
from tests.distributed import engine_job

constant = init.Constant.values


def uneven_norms(draw: init.Constant, seed: int, name: str, start: int, stop: int) -> torch.Tensor:
    values = constant(draw, seed, name, start, stop)
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        values += 0.5 * torch.from_numpy(init.normal(seed, name, start, stop))
    return values


def main() -> None:
    buckets = muon.BUCKET_ELEMENTS
    init.Constant.values = uneven_norms  # type: ignore[method-assign]
    if int(os.environ["WORLD_SIZE"]) > 1:
        muon.BUCKET_ELEMENTS = 1500  # an expert's matrix has 768 elements, wq 1024
    try:
        engine_job.main()
    finally:
        init.Constant.values, muon.BUCKET_ELEMENTS = constant, buckets  # type: ignore[method-assign]


if __name__ == "__main__":
    process.run(main)
