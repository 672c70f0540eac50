"""Which arithmetic is faster on this machine: float32 or bf16."""

import statistics
import time

import torch
import torch.nn.functional as F

from llm.parallel.precision import has_arithmetic


def faster_precision(dim: int, device: torch.device) -> tuple[str, str]:
    """("bf16" or "fp32", the reason in words) for matrix products of width `dim` on `device`.

    GPUs with bf16 arithmetic always take it. On a CPU bf16 is many times faster where the processor has matrix units
    for it and several times slower where it is emulated, so both are timed; bf16 must win clearly, as it also costs
    precision and casts.
    """
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16" if supported else "fp32"), ("the GPU has bf16 arithmetic" if supported else "the GPU lacks bf16")
    if not has_arithmetic("bf16"):
        return "fp32", "this device has no bf16 arithmetic"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.ones(1024, dim, dtype=dtype), torch.ones(2 * dim, dim, dtype=dtype)
        times = []
        for _ in range(6):
            started = time.perf_counter()
            F.linear(x, w)
            times.append(time.perf_counter() - started)
        seconds[dtype] = statistics.median(times[1:])
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    return (
        "bf16" if ratio >= 1.5 else "fp32"
    ), f"a bf16 matrix product takes {1 / ratio:.2f}x the time of a float32 one here"
