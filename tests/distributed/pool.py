"""Ranks that stay for the session and are handed one job after the other: a start costs each rank two seconds.

For jobs that leave nothing behind in the process: what they set in modules they set back, and they end by returning. A
job that fails ends its ranks, and the next one gets new ones. Jobs that kill, stop or crash ranks, and whatever tests
the start of a job, use `harness.run`, which starts torchrun.
"""

import atexit
import dataclasses
import importlib
import json
import os
import select
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.distributed.harness import ROOT, environment, keep_port

POOLS: dict[int, "Pool"] = {}
CPU_SECONDS = [0.0]
"""Of the jobs so far, on all ranks."""


def run_job(script: str, *arguments: str, nproc: int, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """The `main()` of a script under tests/ on `nproc` ranks that are started for the first such job of the session.

    As `harness.run`: the return code is 0, or 1 where a rank raised; output of all ranks is captured.
    """
    pool = POOLS.get(nproc) or POOLS.setdefault(nproc, Pool(nproc))
    try:
        done = pool.perform(script.removesuffix(".py").replace("/", "."), arguments, timeout)
    except BaseException:
        POOLS.pop(nproc).end()
        raise
    if done.returncode:
        POOLS.pop(nproc).end()
    return done


@atexit.register
def end_all() -> None:
    while POOLS:
        POOLS.popitem()[1].end()


class Pool:
    """Processes that read jobs from their standard input and answer on their standard output, a line each."""

    def __init__(self, size: int) -> None:
        self._port = keep_port()
        port = str(self._port.getsockname()[1])
        self._folder = tempfile.TemporaryDirectory(prefix="lattice-ranks-")
        self._processes = []
        for rank in range(size):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
            place = {key: str(value) for key, value in ranks.items()} | {"MASTER_PORT": port} if size > 1 else {}
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.distributed.pool", *map(str, self._outputs(rank))],
                    env=environment() | place,
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )

    def _outputs(self, rank: int) -> tuple[Path, Path]:
        return Path(self._folder.name, f"stdout{rank}"), Path(self._folder.name, f"stderr{rank}")

    def perform(self, module: str, arguments: tuple[str, ...], timeout: float) -> subprocess.CompletedProcess[str]:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps([module, *arguments]) + "\n")
            process.stdin.flush()
        answers: dict[Any, int] = {}
        waited = [process.stdout for process in self._processes]
        while len(answers) < len(waited) and not any(answers.values()):
            ready, _, _ = select.select([file for file in waited if file not in answers], [], [], timeout)
            if not ready:
                raise subprocess.TimeoutExpired([module, *arguments], timeout, *self._said())
            for file in ready:
                status, seconds = (file.readline() or "1 0").split()  # a process that died says nothing
                answers[file] = int(status)
                CPU_SECONDS[0] += float(seconds)
        return subprocess.CompletedProcess([module, *arguments], max(answers.values()), *self._said())

    def _said(self) -> tuple[str, str]:
        files = zip(*(self._outputs(rank) for rank in range(len(self._processes))), strict=True)
        out, err = ("".join(file.read_text(errors="replace") for file in of_a_kind) for of_a_kind in files)
        return out, err

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        self._port.close()
        self._folder.cleanup()


def serve(*outputs: str) -> None:
    """A rank: jobs from standard input until it ends, what each prints to `outputs` (of stdout and stderr)."""
    answers = os.fdopen(os.dup(1), "w")
    for stream, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    from llm.parallel.launch import process

    process.quiet_libraries()
    world = process.start(120, 1)
    process.start = lambda timeout_s, threads: dataclasses.replace(world, timeout_s=timeout_s)
    counted = 0.0
    for line in sys.stdin:
        module, *arguments = json.loads(line)
        for path in outputs:
            os.truncate(path, 0)
        sys.argv = [module, *arguments]
        try:
            importlib.import_module(module).main()
            dist.barrier()
            status = 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        spent = sum(os.times()[:4])
        print(status, spent - counted, file=answers, flush=True)
        counted = spent


if __name__ == "__main__":
    serve(*sys.argv[1:])
