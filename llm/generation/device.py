"""Where a model generates, in which dtype, and with how many threads."""

import os
from pathlib import Path
from typing import Literal

import torch

from llm.errors import UserError
from llm.pretrained import dtype_of

Dtype = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALL_MODEL = 32_000_000
"""Parameters up to which one thread is as fast as several, or faster: what a token costs is then the host's work
between short products, and threads that wait for each other lose all where other processes want the cores (measured on
two busy cores, 1.4 to 34 million parameters: 4 to 18 times the time of one thread)."""


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_for(model: Path, asked: Dtype, where: torch.device) -> torch.dtype:
    """The dtype asked for. `auto` is what the run was trained in, or a folder's weights are in, if `where` has fast
    arithmetic for it: a GPU with such units, a CPU with AMX for it; else float32. UserError where a GPU has no bf16."""
    if asked != "auto":
        if asked == "bf16" and where.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError("--dtype=bf16: this GPU has no bf16 arithmetic; use fp16 or fp32")
        return DTYPES[asked]
    own = dtype_of(model)
    return own if is_fast(own, where) else torch.float32


def is_fast(dtype: torch.dtype, where: torch.device) -> bool:
    """Whether generating in it takes less time than in float32. On CPUs without matrix units bf16 takes as long, row by
    row, or longer."""
    if dtype == torch.float32:
        return True
    if where.type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == torch.bfloat16:
        return bool(torch.cpu._is_amx_tile_supported())
    return bool(torch.cpu._is_amx_fp16_supported())


def set_threads(asked: int | None, n_parameters: int) -> None:
    """Threads of a product on a CPU: those asked for; else what OMP_NUM_THREADS says, which torch has read; else one
    for a small model, and for others one for each physical core that this process may use."""
    if asked is not None:
        if asked < 1:
            raise UserError(f"--threads={asked}: expected 1 or more")
        torch.set_num_threads(asked)
    elif not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(1 if n_parameters <= SMALL_MODEL else physical_cores())


def physical_cores() -> int:
    """Physical cores that this process may use: by its affinity, and by its control group's share of time."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_siblings(cpu) for cpu in allowed}
    quota = _quota()
    return max(1, len(cores) if quota is None else min(len(cores), int(quota)))


def _siblings(cpu: int) -> str:
    """Names the physical core that a CPU is a thread of."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _quota() -> float | None:
    """CPUs' worth of time that the control group allows; None = no limit."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        return None
