"""Start and end of a process of a job: the only place that creates the default process group or ends a process.

Three habits, each bought with a hang that somebody had to debug:
- the rendezvous store gets a prefix per restart attempt; otherwise a restarted job reads the addresses of its dead
  predecessor;
- the time-out is set before any group exists, because every later group copies it and never asks again;
- an exception ends the process by flush and `os._exit`, so that no peer waits for a clean-up that itself waits for
  peers.
"""

import contextlib
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from llm.errors import UserError

EXIT_USER_ERROR = 2
EXIT_FAILURE = 1


@dataclass(frozen=True)
class World:
    """This process among all processes of the job."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    store: dist.Store | None = None
    """Key-value store shared by all ranks; None before the process group exists."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_world() -> World:
    """Rank and size as torchrun gives them; one process when started by plain `python`. No group is made."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return World(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), local_rank, device)


def start(timeout_s: float, threads: int) -> World:
    """Create the default process group and make DeepSpeed use it; return this process's place.

    `threads` are the CPU threads of this process. They are set here because sums change their bits with the number of
    threads.
    """
    world = read_world()
    torch.set_num_threads(threads)
    timeout = timedelta(seconds=timeout_s)
    dist.distributed_c10d.default_pg_timeout = timeout
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "RANK" in os.environ:
        base, _, _ = next(iter(dist.rendezvous("env://", timeout=timeout)))
    else:
        base = dist.HashStore()
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt{attempt}", base)
    dist.init_process_group(
        backend="nccl" if world.device.type == "cuda" else "gloo",
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=timeout,
        device_id=world.device if world.device.type == "cuda" else None,
    )
    return replace(world, store=store)


def quiet_libraries() -> None:
    """Silence what a user cannot act on: deprecation notes of dependencies and DeepSpeed's progress reports."""
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings(
            "ignore", category=category, module=r"(torch|deepspeed|fairscale|tensorboard|google)(\..*)?"
        )
    for name in ("DeepSpeed", "deepspeed", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def stdout_to_nowhere() -> Iterator[None]:
    """DeepSpeed prints while it initialises; what a run prints is a contract, so those lines are dropped."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def run(main: Callable[[], None]) -> None:
    """Call `main`, then end the process: status 0, 2 after a UserError (one line), 1 after anything else (with its
    traceback).

    A UserError in which all ranks agree is printed by rank 0 alone. torchrun hears of a failure through its error
    file, so that its own report repeats the line.
    """
    rank = int(os.environ.get("RANK", 0))
    try:
        main()
    except UserError as error:
        line = f"error: {' '.join(str(error).split())}"
        if rank != 0 and (error.agreed or not dist.is_initialized()):
            time.sleep(
                3
            )  # all ranks found the same; rank 0 says it, unless torchrun ends it because another rank left first
        else:
            print(line if rank == 0 else f"{line} (rank {rank})", file=sys.stderr)
        _tell_torchrun(line)
        _leave(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        if rank == 0:
            print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        _leave(130)
    except SystemExit as leaving:
        _leave(leaving.code if isinstance(leaving.code, int) else EXIT_FAILURE)
    except BaseException as error:  # a bug, or a peer that died: keep the traceback, name the rank in the last line
        traceback.print_exc()
        line = f"error: rank {rank}: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
        print(line, file=sys.stderr)
        _tell_torchrun(line)
        _leave(EXIT_FAILURE)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    _leave(0)


def torchrun(script: str, arguments: list[str], nproc: int, threads: int) -> int:
    """Start `script` on `nproc` processes of this machine through torchrun, in this process; return its exit status.

    For one machine this saves typing torchrun's own flags, and a failed worker's line stays the last one: torchrun
    would add a traceback of its own.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun_main

    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    logging.disable(logging.ERROR)  # torchrun's report of what the worker has already said
    try:
        torchrun_main(["--standalone", f"--nproc_per_node={nproc}", script, *arguments])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        print(f"error: rank {rank} was killed by {failure.signal_name()}; the same command resumes", file=sys.stderr)
        return 128 - failure.exitcode
    except SignalException as signal:
        print(f"stopped by {signal.sigval.name}; the same command resumes from the last checkpoint", file=sys.stderr)
        return 128 + signal.sigval
    return 0


def _tell_torchrun(line: str) -> None:
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with contextlib.suppress(OSError), open(path, "w") as file:
            json.dump({"message": {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}}, file)


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
