"""What the bits of a float result depend on beside the program: names of the machine's arithmetic, and a probe of it.

Where all of this is the same, a run gives the same bits; where anything differs, it may give others.
"""

import ctypes
import hashlib
import os
import platform
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from llm.init import normal

SETTINGS = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
)
"""Environment variables that choose other kernels."""


def machine() -> dict[str, Any]:
    """This process's: processor, instructions that torch and oneDNN use, versions, threads, and the probe."""
    return {
        "processor": processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "onednn_isa": onednn_isa(),
        "settings": {key: os.environ[key] for key in SETTINGS if key in os.environ},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "arithmetic": probe(),
    }


def processor() -> str:
    """Vendor, family and model, as Linux names them; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".strip()
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    keys = ("vendor_id", "cpu family", "model", "stepping")
    numbers = [f"{key} {said[key]}" if key != "vendor_id" else said[key] for key in keys if key in said]
    return ", ".join(filter(None, [*numbers, said.get("model name")])) or platform.machine()


@cache
def onednn_isa() -> str:
    """The instruction set that oneDNN uses. torch does not pass the question on, but oneDNN prints the answer before
    the first work that it does verbosely; so a process can ask once.
    """
    with tempfile.TemporaryFile() as file:
        stdout = os.dup(1)
        try:
            os.dup2(file.fileno(), 1)
            with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
                torch.ones(2, 2).to_mkldnn()
            ctypes.CDLL(None).fflush(None)
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
        file.seek(0)
        found = re.search(r"cpu,isa:(.*)", file.read().decode(errors="replace"))
    return found[1] if found else "unknown"


@torch.no_grad()
def probe() -> str:
    """Digest of what this machine makes of fixed numbers, in float32 and bf16: products and sums of odd sizes, and
    functions that vector units and C libraries compute differently.
    """
    digest = hashlib.sha256()
    for dtype in (torch.float32, torch.bfloat16):
        x, w = (torch.from_numpy(normal(0, name, 0, 96 * 67)).view(96, 67).to(dtype) for name in ("probe.x", "probe.w"))
        heads = x[:, :64].view(4, 24, 64)
        for y in (
            F.linear(x, w),
            x.mT @ w,
            heads @ heads.mT,
            *(function(x) for function in (torch.exp, torch.tanh, torch.rsqrt, F.gelu, F.silu)),
            x.softmax(-1),
            x.float().logsumexp(-1),
            x.sum(),
            x.float().square().sum().sqrt(),
        ):
            digest.update(y.nan_to_num().float().numpy().tobytes())
    return digest.hexdigest()[:16]
