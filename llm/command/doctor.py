"""`lattice doctor`: what this machine has, and whether two processes of it can add numbers up together."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from llm.cli import run_cli
from llm.errors import UserError
from llm.paths import free_space

PACKAGES = (
    "torch", "triton", "deepspeed", "fairscale", "numpy", "pydantic", "safetensors", "tokenizers", "sentencepiece",
    "pyarrow", "transformers",
)  # fmt: skip
OF_THE_CODE = {"deepspeed": "0.19.8", "fairscale": "0.4.13"}
"""Versions whose insides the code reads (llm/parallel/engine/deepspeed_private.py), as setup.py asks for them."""
COMPILERS = ("c++", "g++", "clang++", "nvcc")
SHORT_OF_DISK, SHORT_OF_SHM = 1 << 30, 64 << 20
JOB_S = 180.0
"""After which the all-reduce is given up; a start of two processes takes 5 to 30 s."""
GB = 1e9


def doctor(nproc: int = 2) -> None:
    """Print what this machine has, and what an all-reduce between processes of it gives. Exit status 0: a run can
    start; 1: it cannot, and the last line says why.

    nproc: processes of the all-reduce
    """
    if nproc < 2:
        raise UserError(f"--nproc={nproc}: an all-reduce is between 2 processes or more")
    wrong: list[str] = []
    for part in (_versions, _machine, _devices, _compilers, _disk):
        for name, text in part(wrong):
            print(f"{name:<14} {text}", flush=True)
    for name, text in _reduced(nproc, wrong):
        print(f"{name:<14} {text}", flush=True)
    if wrong:
        for line in wrong[:-1]:
            print(f"wrong: {line}", flush=True)
        print(f"error: {wrong[-1]}", file=sys.stderr)
        raise SystemExit(1)
    print("nothing is wrong")


Lines = Iterator[tuple[str, str]]


def _versions(wrong: list[str]) -> Lines:
    yield "lattice", f"{_version('lattice-llm') or 'a checkout that is not installed'}, {Path(__file__).parents[1]}"
    yield "python", f"{platform.python_version()}, {sys.executable}"
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    found = {name: _version(name) for name in PACKAGES}
    yield "packages", ", ".join(f"{name} {version}" for name, version in found.items() if version)
    for name, wanted in OF_THE_CODE.items():
        if found[name] is None:
            wrong.append(f"{name} is missing; pip install {name}=={wanted}")
        elif found[name] != wanted:
            wrong.append(f"{name} {found[name]} is installed, and Lattice reads the insides of {wanted}; "
                         f"pip install {name}=={wanted}")  # fmt: skip


def _machine(wrong: list[str]) -> Lines:
    from llm.generation.device import physical_cores

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield "processor", f"{_cpu_name()}, {physical_cores()} cores and {allowed} threads for this process"
    total, free = _memory()
    yield "memory", "unknown" if total is None else f"{total / GB:.1f} GB, {(free or 0) / GB:.1f} GB free"


def _devices(wrong: list[str]) -> Lines:
    import torch

    from llm.generation.device import is_fast

    built = torch.version.cuda or torch.version.hip
    count = torch.cuda.device_count()
    yield "gpus", f"{count}; torch is built {f'for {built}' if built else 'without CUDA'}"
    if built is None and shutil.which("nvidia-smi") is not None:
        wrong.append("this machine has nvidia-smi, but torch is a CPU build; install the build of its CUDA version")
    for i in range(count):
        found = torch.cuda.get_device_properties(i)
        capability = f"compute capability {found.major}.{found.minor}"
        yield f"gpu {i}", f"{found.name}, {found.total_memory / GB:.1f} GB, {capability}"
    where = torch.device("cuda" if count else "cpu")
    speeds = [
        f"{name} {'yes' if is_fast(dtype, where) else 'no'}"
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))
    ]
    yield "fast", f"{', '.join(speeds)} (on the {'GPU' if count else 'CPU'}; else float32 takes as long or less)"


def _compilers(wrong: list[str]) -> Lines:
    found = [(name, path) for name in COMPILERS if (path := shutil.which(name)) is not None]
    if not any(name != "nvcc" for name, _ in found):
        yield "compilers", "no C++ compiler: train.compile=true is not possible, all else is"
        return
    yield "compilers", ", ".join(f"{name} {_compiler_version(path)}" for name, path in found)


def _disk(wrong: list[str]) -> Lines:
    for name, folder, least in (("disk here", Path.cwd(), SHORT_OF_DISK), ("/dev/shm", Path("/dev/shm"), SHORT_OF_SHM)):
        space = free_space(folder) if folder.exists() else None
        if space is None:
            continue
        yield name, f"{space[1] / GB:.1f} GB free, {folder}"
        if space[1] < least:
            wrong.append(f"{folder} has {space[1] / GB:.2f} GB free, and a run wants {least / GB:.2f} GB or more")


def _reduced(nproc: int, wrong: list[str]) -> Lines:
    """An all-reduce on the CPUs, and one on the GPUs where there are enough."""
    import torch

    for backend in ("gloo", *(("nccl",) if torch.cuda.device_count() >= nproc else ())):
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if backend == "gloo" else {})
        job = [sys.executable, str(Path(__file__).with_name("doctor_job.py")), f"--nproc={nproc}"]
        try:
            done = subprocess.run(job, env=environment, capture_output=True, text=True, timeout=JOB_S)
        except subprocess.TimeoutExpired:
            wrong.append(f"all-reduce of {nproc} processes over {backend}: no answer after {JOB_S:.0f} s")
            continue
        lines = done.stdout.splitlines()
        if done.returncode == 0 and lines:
            yield "all-reduce", lines[-1]
            continue
        said = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.strip()]
        why = said[-1] if said else f"status {done.returncode}"
        wrong.append(f"all-reduce of {nproc} processes over {backend}: {why}")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory() -> tuple[int | None, int | None]:
    """(bytes that this process may have, those of them that are free): of the machine, or of the control group where
    that allows less.
    """
    try:
        rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(rows[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return None, None
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no group, or "max"
        return total, free
    return min(total, limit), min(free, limit - used)


def _compiler_version(path: str) -> str:
    done = subprocess.run([path, "--version"], capture_output=True, text=True)
    found = re.search(r"(?:release|version|\)) V?(\d+\.\d+(?:\.\d+)*)", done.stdout)
    return found[1] if found is not None else "of unknown version"


def main(words: Sequence[str]) -> None:
    """The command line."""
    run_cli(doctor, words)
