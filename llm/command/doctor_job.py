"""Run by `lattice doctor` on several processes: rank + 1 in every element, added up over all ranks, and looked at."""

import argparse
import sys
import time
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.distributed as dist

from llm.errors import UserError
from llm.parallel.launch import local, process

ELEMENTS = 1 << 20
TIMEOUT_S = 120.0


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nproc", type=int)
    nproc = parser.parse_args().nproc
    if nproc is not None:
        sys.exit(local.torchrun(__file__, [], nproc, threads=1))
    process.quiet_libraries()
    world = process.start(TIMEOUT_S, threads=1)
    values = torch.full((ELEMENTS,), float(world.rank + 1), device=world.device)
    dist.barrier()
    began = time.perf_counter()
    dist.all_reduce(values)
    low, high = float(values.min()), float(values.max())  # which waits for a GPU
    took = time.perf_counter() - began
    expected = world.size * (world.size + 1) / 2
    if low != expected or high != expected:
        raise UserError(f"the sum is {low:g} to {high:g} on rank {world.rank}, and should be {expected:g}")
    if world.is_main:
        print(
            f"{world.size} processes over {dist.get_backend()}: 1 to {world.size} added up to {expected:g} in each of "
            f"{ELEMENTS} elements, {1e3 * took:.1f} ms"
        )


if __name__ == "__main__":
    process.run(main)
