"""The peak arithmetic of a device, of which model FLOPs utilisation (mfu) is a share."""

import torch

BF16_PEAKS = (
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("A30", 165e12),
    ("L40S", 362e12),
)
"""Part of a CUDA device's name, and its dense bf16 peak in FLOP/s by the maker's data sheet; the first match holds."""


def peak_flops(configured: float | None, device: torch.device) -> float | None:
    """FLOP/s of one device: what log.peak_flops says, else the table's on a GPU that it knows, else None."""
    if configured is not None or device.type != "cuda":
        return configured
    return peak_by_name(torch.cuda.get_device_name(device))


def peak_by_name(name: str) -> float | None:
    """Dense bf16 peak of a GPU by the name that CUDA gives it."""
    return next((peak for part, peak in BF16_PEAKS if part.lower() in name.lower()), None)
