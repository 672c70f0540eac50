"""Start and end of a process of a job: the only place that creates the default process group or ends a process.

Four habits, each bought with a hang or a riddle that somebody had to debug:
- the rendezvous store gets a prefix per restart attempt; otherwise a restarted job reads the addresses of its dead
  predecessor;
- the time-out is set before any group exists, because every later group copies it and never asks again;
- an exception ends the process by flush and `os._exit`, so that no peer waits for a clean-up that itself waits for
  peers;
- a rank that only lost a peer waits before it says so: the report is to name the rank that failed by itself.
"""

import contextlib
import ctypes
import faulthandler
import json
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from llm import environment
from llm.errors import UserError
from llm.parallel.launch.liveness import GRACE_S, PeerError, Roll, is_peers_fault
from llm.parallel.launch.world import World
from llm.screen import protect
from llm.signals import EXIT_STOPPED

EXIT_USER_ERROR = 2
EXIT_FAILURE = 1
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when the thread that started it ends."""
_roll: Roll | None = None  # of this process's job, from `start` on, for the end of `run`
_world: World | None = None  # what `start` gave


def name_roles(roles: dict[int, str]) -> None:
    """From now on what is said of a rank that fails, by itself or by others, has its role too."""
    if _roll:
        _roll.roles = roles


def _who(rank: int) -> str:
    return _roll.who(rank) if _roll else f"rank {rank}"


def read_world() -> World:
    """Rank and size as the launcher gives them; one process when started by plain `python`. No group is made.

    UserError where the environment contradicts itself, or this machine.
    """
    place, gpus = environment.place(), torch.cuda.device_count()
    local_rank = place.local_rank or 0
    if gpus > 1 and place.local_rank is None:
        raise UserError(f"LOCAL_RANK is missing in the environment: which of this machine's {gpus} GPUs is to be used?")
    if gpus and local_rank >= gpus:
        raise UserError(f"LOCAL_RANK={local_rank}: this machine has {gpus} GPU(s), one for each process")
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return World(place.rank, place.size, local_rank, device)


def start(timeout_s: float, threads: int) -> World:
    """Create the default process group and make DeepSpeed use it; return this process's place.

    `threads` are the CPU threads of this process. They are set here because sums change their bits with the number of
    threads.
    """
    global _roll
    world = read_world()
    torch.set_num_threads(threads)
    timeout = timedelta(seconds=timeout_s)
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.distributed_c10d.default_pg_nccl_timeout = timeout  # NCCL's groups copy this one
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if world.size > 1:
        base = _meeting_place(timeout)
    else:
        base = dist.HashStore()  # nobody is to be met, wherever the variables lead
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    _roll = Roll(base, world.rank, world.size)
    store = _roll.meet(timeout_s)
    dist.init_process_group(
        backend="nccl" if world.device.type == "cuda" else "gloo",
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=timeout,
        device_id=world.device if world.device.type == "cuda" else None,
    )
    return replace(world, store=store, timeout_s=timeout_s)


def joined(timeout_s: float, threads: int) -> World:
    """`start`, or where this process has started before, as in a notebook that trains again, the same place, with
    these CPU threads. UserError where somebody else has made the default process group.
    """
    global _world
    if not dist.is_initialized():
        _world = start(timeout_s, threads)
    elif _world is None:
        raise UserError("torch.distributed has a default process group already, which Lattice makes itself; "
                        "train before it is made, or in a process of its own (nproc=1)")  # fmt: skip
    torch.set_num_threads(threads)
    return _world


def _meeting_place(timeout: timedelta) -> dist.Store:
    """The store of the job's ranks, at MASTER_ADDR and MASTER_PORT."""
    try:
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=timeout)))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ["MASTER_PORT"]
        raise UserError(f"MASTER_PORT={port} is in use on this machine by another job; give a free one") from None
    return store


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

    A UserError in which all ranks agree is printed by rank 0 alone. torchrun learns of a failure through its error
    file, so that its own report repeats the line.
    """
    protect()  # what is printed must not end what is trained
    with contextlib.suppress(ValueError, OSError):  # no descriptor to write to
        faulthandler.enable()  # a crash in native code says where
    end_with_torchrun()
    rank, launched = environment.rank_or_zero(), environment.in_torchrun()
    try:
        main()
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except UserError as error:
        line = f"error: {_one_line(error)}"
        if rank != 0 and (error.agreed or not dist.is_initialized()):
            _wait_for_the_end()  # rank 0 has probably found the same, and says it
        if rank == 0 or not error.agreed:
            _fail(line if rank == 0 else f"{line} ({_who(rank)})", EXIT_USER_ERROR)
        _notify_torchrun(line)
        _leave(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        if rank == 0:
            print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        _leave(130)
    except SystemExit as leaving:
        status = leaving.code
        if status is None or status in (0, EXIT_STOPPED) or (isinstance(status, int) and not launched):
            _leave(int(status or 0))
        if isinstance(status, int):
            _fail(f"error: {_who(rank)}: exit status {status}", status)
        _fail(f"error: {_who(rank)}: {_one_line(status)}", EXIT_FAILURE)
    except BaseException as error:
        if is_peers_fault(error):
            _fail_for_a_peer(error, rank)
        traceback.print_exc()  # a bug: keep the traceback, name the rank in the last line
        _fail(f"error: {_who(rank)}: {type(error).__name__}: {_one_line(error)}", EXIT_FAILURE)
    _leave(0)


def end_with_torchrun() -> None:
    """Have the kernel kill this rank when the torchrun that started it dies (Linux).

    torchrun ends its ranks however it ends, but not when it is killed itself (kill -9, out of memory). They would train
    on, holding the run folder against the job that takes their place, until they next need the store, which died with
    torchrun. SIGKILL, as nothing else is heard within a collective, and nothing can be agreed on without the store.
    """
    if not sys.platform.startswith("linux") or not environment.in_torchrun():
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() == 1:  # it died before, unless it is itself the first process of a container
        with contextlib.suppress(OSError):  # some systems hide other users' processes
            if b"python" not in Path("/proc/1/cmdline").read_bytes():
                _fail("error: torchrun died before this rank had begun", EXIT_FAILURE)


def _fail(line: str, status: int) -> NoReturn:
    """Say why this rank ends, to the user, to torchrun and to its peers, and end it."""
    print(line, file=sys.stderr)
    _notify_torchrun(line)
    if _roll:
        _roll.failed(line.removeprefix("error: "))
    _leave(status)


def _fail_for_a_peer(error: BaseException, rank: int) -> NoReturn:
    """End this rank, which lost a peer or waited in vain for one; with the reason as far as it can be known."""
    met = time.time()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    reason = _roll.why_alone() if _roll else None
    if reason and not reason.sure and isinstance(error, PeerError):
        reason = None  # the error itself says more
    if reason is None or not reason.sure:
        traceback.print_exception(error)
    met_as = f"{type(error).__name__}: {_one_line(error)}"
    why = met_as if reason is None else f"{reason.text}; met as {met_as}"
    line = f"error: {_who(rank)}: {why}"
    print(line, file=sys.stderr)
    _notify_torchrun(line, met)
    if _roll:
        _roll.end_stopped()
    _leave(EXIT_FAILURE)


def _wait_for_the_end() -> None:
    """Time for torchrun to end this process, because another rank has left first and said why."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(GRACE_S)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())[:500]


def _notify_torchrun(line: str, when: float | None = None) -> None:
    """Leave the line where torchrun looks for it; it reports the earliest failure, by whole seconds, as the cause."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        message = {"message": line, "extraInfo": {"timestamp": str(int(when or time.time()))}}
        with contextlib.suppress(OSError), open(path, "w") as file:
            json.dump({"message": message}, file)


def _leave(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
