"""One way for every launch script that needs ranks: parse the words, check what they ask for, print what would be done,
or start the ranks and do it.

What can be refused is refused before a process group exists.
"""

import sys
from collections.abc import Sequence
from typing import Protocol, Self

from llm import environment
from llm.errors import UserError
from llm.malloc import keep_freed
from llm.parallel.launch import local, process
from llm.parallel.launch.world import World
from llm.train.stop import leave_before_first_step

HELP = ("--help", "-h")


class Job(Protocol):
    """What a command line asks for."""

    @property
    def nproc(self) -> int | None:
        """Processes to start on this machine; None where the launcher has started them."""

    @property
    def dry_run(self) -> bool:
        """Whether only to say what would be done."""

    @property
    def timeout_s(self) -> float:
        """Seconds after which a rank gives up waiting for another."""

    @property
    def threads(self) -> int:
        """CPU threads of a rank."""

    @classmethod
    def parse(cls, words: Sequence[str]) -> Self:
        """The job of the words after the script's name. UserError where they contradict themselves or each other."""

    @classmethod
    def help(cls) -> str:
        """What `--help` prints."""

    def report(self) -> str:
        """What a dry run prints."""

    def check(self, rank: int) -> None:
        """UserError where files or this machine do not allow the job."""

    def words_of_a_rank(self) -> list[str]:
        """The words for each process that is started here."""

    def work(self, world: World) -> None:
        """Do it, on every rank (collective)."""


def run_job(kind: type[Job], script: str) -> None:
    """Do what the command line asks for; `script` is the file of the launch script."""
    words = sys.argv[1:]
    if any(word in HELP for word in words):
        print(kind.help())
        return
    job, rank = kind.parse(words), environment.place().rank
    if job.dry_run:
        if rank == 0:
            print(job.report(), end="")
        return
    job.check(rank)
    if job.nproc:
        sys.exit(local.torchrun(script, job.words_of_a_rank(), job.nproc, job.threads))
    work(job)


def number_of_ranks(nproc: int | None) -> int:
    """How many ranks the job will have. UserError where `--nproc` is given beside a launcher's own number."""
    place = environment.place()
    if nproc and (place.size > 1 or environment.in_torchrun()):
        raise UserError(f"--nproc={nproc} is for plain python; torchrun has --nproc_per_node")
    return nproc or place.size


def work(job: Job) -> None:
    """Begin the process group and do the job in it."""
    process.quiet_libraries()
    leave_before_first_step()
    if process.read_world().device.type == "cpu":
        keep_freed()
    job.work(process.start(job.timeout_s, job.threads))
