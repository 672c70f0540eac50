"""Peak memory of a training step above what the model and its optimizer hold, in a process that does nothing else.

On a GPU the allocator counts. On a CPU the kernel does: writing 5 to /proc/self/clear_refs sets the high-water mark
of resident memory (VmHWM) back to what is resident now, so the mark after a few steps is their peak, to within a few
pages; sampling from a thread would miss short peaks. Two things would spoil it. Freed memory that malloc keeps would
look like memory in use: `ENVIRONMENT` makes it go back at once. And what a contestant keeps between steps without its
being a weight, master or moment (gradient buffers of DeepSpeed) would hide in the level that the peak is measured from:
every living tensor is counted, and what is no state is added back.
"""

import ctypes
import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
"""For the process to be measured: larger blocks come from the kernel and go back to it when freed."""


@dataclass(frozen=True)
class Memory:
    """Bytes. states: weights, masters, moments; peak: the most that a step needs above them."""

    states: int
    peak: int


def peak_above_states(
    step: Callable[[], object], states: Callable[[], Iterable[Tensor]], steps: int = 3, warmup: int = 2
) -> Memory:
    """Peak of `steps` steps after `warmup` ones, above the tensors that `states()` lists after those."""
    for _ in range(warmup):
        step()
    gc.collect()
    held = storage_bytes(states())
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            step()
        return Memory(held, torch.cuda.max_memory_allocated() - held)
    kept_between_steps = storage_bytes(living_tensors()) - held
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    for _ in range(steps):
        step()
    return Memory(held, _status_bytes("VmHWM") - before + kept_between_steps)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`: views of one storage count once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def living_tensors() -> Iterable[Tensor]:
    """Every tensor with memory that Python can reach, and its gradient; none of the compiler's pretended ones."""
    for item in gc.get_objects():
        if type(item) in (Tensor, nn.Parameter) and item.layout == torch.strided and item.device.type != "meta":
            yield item
            if item.is_leaf and item.grad is not None:
                yield item.grad


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
