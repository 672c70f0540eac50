"""What the ranks of a job know of each other without a collective: who is here, who failed and why, who is stopped.

A collective that fails says "connection closed by peer" or "timed out", never which rank was the reason. So each rank
leaves its place (machine, process) in the key-value store when it comes, and a line when it fails; whoever is left
waiting reads them, and looks at the processes of its own machine.

A rank that waits here polls, so that a signal is heard: no Python handler runs while a thread waits inside a collective
or inside the store.
"""

import contextlib
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

GRACE_S = 3.0
"""How long a rank whose collective failed waits for the others' reasons. torchrun, which looks ten times a second, ends
it meanwhile where the reason was a rank of the same machine."""
MOST_NAMED = 8


class PeerError(RuntimeError):
    """A peer did not come, or was not heard from, in time."""


class Reason(NamedTuple):
    """Why a collective of this rank failed."""

    text: str
    sure: bool
    """False where it only says which ranks did not meet the failure; one of them may be the reason."""


class Roll:
    """The ranks of one attempt of the job, by what they write into the key-value store.

    Each list is one key that all append to: a question costs one request, however many ranks there are.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._base, self._rank, self._size = dist.PrefixStore("roll", store), rank, size
        self._store: dist.Store | None = None
        self._places: dict[int, dict[str, Any]] = {}
        self.roles: dict[int, str] = {}
        """What a rank does in the job, where that says more than its number."""

    def meet(self, timeout_s: float) -> dist.Store:
        """Wait until all ranks are here; a store for this attempt alone. PeerError naming the missing ranks after
        `timeout_s`.

        The store outlives a restart, and nothing that torchrun says names the attempt: where one machine restarts its
        ranks for a failure and another one because of that, they count differently. So rank 0's process names it, and
        the others go by that name once rank 0 has answered them; a name from before is not answered any more.
        """
        mine = own_place()
        if self._rank == 0:
            self._base.set("attempt", mine["token"])
        name, deadline, pause = "", time.monotonic() + timeout_s, 0.01
        while True:
            current = self._base.get("attempt").decode() if self._base.check(["attempt"]) else ""
            if current != name:
                name, self._store = current, dist.PrefixStore(current, self._base)
                self._add("places", mine)
            if self._store is not None:
                if self._rank == 0 and len(places := self._read("places")) == self._size:
                    self._store.set("all", json.dumps(list(places.items())))
                if self._store.check(["all"]):
                    places = dict(json.loads(self._store.get("all")))
                    if places.get(self._rank) == mine:
                        self._places = places
                        return dist.PrefixStore("job", self._store)
            if time.monotonic() > deadline:
                raise PeerError(f"{_ranks(self._missing())} did not come within {timeout_s:g} s")
            time.sleep(pause)
            pause = min(1.5 * pause, 0.25)

    def _missing(self) -> list[int]:
        if self._store is None or self._store.check(["all"]):  # only the name of an attempt that is over is there
            return [0]
        return sorted(set(range(self._size)) - self._read("places").keys())

    def who(self, rank: int) -> str:
        """The rank by number and role."""
        return f"rank {rank} ({self.roles[rank]})" if rank in self.roles else f"rank {rank}"

    def failed(self, line: str) -> None:
        """Leave the reason why this rank ends, for those who wait for it."""
        _in_time(lambda: self._add("failures", line))

    def why_alone(self) -> Reason | None:
        """Why a collective of this rank failed, or None where nothing is known; takes GRACE_S.

        The first of: the line of a rank that failed by itself; a rank that is gone or stopped, as seen by a rank of its
        machine; the ranks that have not met such a failure.
        """
        found: list[Reason] = []

        def look() -> None:
            self._add("alone", self._seen())
            time.sleep(GRACE_S)
            alone = self._read("alone")
            seen = next(filter(None, alone.values()), "") or self._seen()  # the first look says most
            silent = sorted(set(range(self._size)) - alone.keys() - {self._rank})
            for rank, line in self._read("failures").items():
                found.append(Reason(f"{self.who(rank)} failed: {_without(line, self.who(rank))}", True))
            if seen:
                found.append(Reason(seen, True))
            if silent:
                found.append(Reason(f"{self._named(silent)} did not meet this failure", False))

        _in_time(look, GRACE_S + 5)
        return found[0] if found else None

    def end_stopped(self) -> None:
        """Kill the stopped ranks of this machine: they do not hear the launcher's SIGTERM, and it would wait 30 s."""

        def look() -> None:
            for rank, place in self._places.items():
                if rank != self._rank and state_of(place) == "stopped":
                    os.kill(place["pid"], signal.SIGKILL)

        _in_time(look)

    def _seen(self) -> str:
        """The ranks of this machine that are gone, or stopped, without having said why; in words."""
        known = self._read("failures").keys() | self._read("alone").keys()
        states = {rank: state_of(place) for rank, place in self._places.items() if rank not in known}
        lines = []
        for rank, state in states.items():
            if state:
                what = ", ".join([*filter(None, [self.roles.get(rank)]), f"process {self._places[rank]['pid']}"])
                lines.append(f"rank {rank} ({what}) is {state}")
        return ", ".join(lines[:MOST_NAMED])

    def _named(self, ranks: list[int]) -> str:
        """Ranks, and the machines that they are on unless that is this one."""
        hosts = {_host(self._places.get(rank, {})) for rank in ranks} - {"", _host(own_place())}
        return _ranks(ranks) + (f" ({', '.join(sorted(hosts)[:MOST_NAMED])})" if hosts else "")

    def _add(self, name: str, value: Any) -> None:
        assert self._store is not None
        self._store.append(name, json.dumps([self._rank, value]) + "\n")  # type: ignore[attr-defined]

    def _read(self, name: str) -> dict[int, Any]:
        """Rank to its first value, in the order in which they came."""
        assert self._store is not None
        text = self._store.get(name).decode() if self._store.check([name]) else ""
        values: dict[int, Any] = {}
        for rank, value in map(json.loads, text.splitlines()):
            values.setdefault(rank, value)
        return values


@contextlib.contextmanager
def heard(store: dist.Store, key: str, timeout_s: float) -> Iterator[None]:
    """While this rank works, however long, those in `wait_for(store, key, timeout_s)` hear that it lives."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(min(timeout_s / 4, 10.0)):
            store.add(f"{key}/beat", 1)

    thread = threading.Thread(target=beat, name="heard", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def wait_for(store: dist.Store, key: str, timeout_s: float, who: str) -> bytes:
    """The value of `key`, once it is there; PeerError when the rank that is to write it, `who`, is not heard for
    `timeout_s`.
    """
    beat, last_heard, pause = 0, time.monotonic(), 0.001
    while not store.check([key]):
        now = store.add(f"{key}/beat", 0)
        if now != beat:
            beat, last_heard = now, time.monotonic()
        if time.monotonic() - last_heard > timeout_s:
            raise PeerError(f"{who} was not heard for {timeout_s:g} s")
        time.sleep(pause)
        pause = min(2 * pause, 0.25)
    return store.get(key)


def _without(line: str, who: str) -> str:
    """The line of a rank that failed, which may begin with who it is."""
    return line.removeprefix(f"{who}: ") if "(" in who else line


def is_peers_fault(error: BaseException) -> bool:
    """Whether a rank met this error because of another one: a collective or the store failed."""
    backend = isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL"))
    return backend or isinstance(error, (dist.DistError, PeerError))


def _in_time(action: Callable[[], None], seconds: float = 5.0) -> None:
    """Call `action`, but not longer: the machine that keeps the store may itself be what failed."""
    def call() -> None:
        with contextlib.suppress(Exception):
            action()

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)


def _ranks(ranks: list[int]) -> str:
    named = ", ".join(str(rank) for rank in ranks[:MOST_NAMED])
    more = f" and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else ""
    return f"rank {named}" if len(ranks) == 1 else f"ranks {named}{more}"


def own_place() -> dict[str, Any]:
    """This process, for others to look after: id, time of start, machine, and a token of its own."""
    began = _stat(os.getpid())[1]
    return {"pid": os.getpid(), "began": began, "machine": _machine(), "token": uuid.uuid4().hex}


def _machine() -> str:
    """Name of the machine and of the numbering of processes on it; empty where that cannot be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _host(place: dict[str, Any]) -> str:
    return str(place.get("machine", "")).partition(" ")[0]


def _stat(pid: int) -> tuple[str, str]:
    """(state, time of start) of a process, both empty when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def state_of(place: dict[str, Any]) -> str | None:
    """"gone" or "stopped"; None when the process at `place` runs, or nothing can be seen of it from here."""
    if not place.get("machine") or place["machine"] != _machine():
        return None
    state, began = _stat(place["pid"])
    if began != place["began"] or state in ("Z", "X"):
        return "gone"
    return "stopped" if state in ("T", "t") else None
