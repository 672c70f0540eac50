"""A process's place among all processes of the job."""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process among all processes of the job."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    store: dist.Store | None = None
    """Key-value store shared by all ranks; None before the process group exists."""
    timeout_s: float = 600.0
    """Seconds after which a rank gives up waiting for another."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0
