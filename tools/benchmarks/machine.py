"""What a measurement was made on, in words for a result file."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

MATRIX_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")
PACKAGES = ("torch", "deepspeed", "transformers")
ROOT = Path(__file__).resolve().parents[2]


def hardware() -> str:
    """Processor with the flags that decide the speed of matrix products, cores, memory, load, and GPU if there is
    one.
    """
    fields = _cpu_fields()
    flags = [flag for flag in MATRIX_FLAGS if flag in fields.get("flags", "").split()]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    words = [
        f"{fields.get('model name', platform.processor() or 'unknown processor')} ({' '.join(flags) or 'no AVX'})",
        f"{len(os.sched_getaffinity(0))} cores",
        f"{memory:.0f} GiB",
        f"load {os.getloadavg()[0]:.1f} when written",
    ]
    return ", ".join(words + ([_gpu()] if torch.cuda.is_available() else []))


def versions() -> str:
    """Python, those of the packages that are compared and installed, and the commit of this project."""
    known = [f"{name} {found}" for name in PACKAGES if (found := _version(name)) is not None]
    return ", ".join([f"Python {platform.python_version()}", *known, f"commit {_commit()}"])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_fields() -> dict[str, str]:
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    return commit + (" with uncommitted changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def _gpu() -> str:
    """Name, and the power cap where nvidia-ml-py is installed: capped cards are slower."""
    name = torch.cuda.get_device_name()
    try:
        import pynvml
    except ImportError:
        return name
    pynvml.nvmlInit()
    cap = pynvml.nvmlDeviceGetEnforcedPowerLimit(pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device()))
    return f"{name} capped at {cap / 1000:.0f} W"
