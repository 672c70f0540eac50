"""What the environment says of this process's job: the only place that reads a launcher's variables.

torchrun and others like it (Kubeflow, AzureML, a shell script of one's own) give each process RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT, mostly LOCAL_RANK too. All of them together mean a process among several, none of them a
process alone. Half of them, left over or forgotten, is refused: whoever guesses waits for ranks that never come, or
trains the same run on every machine.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from llm.errors import UserError

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
WHOLE = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}
"""Variables that are whole numbers, and the least that each can be."""
MARKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""One of these says that somebody counts processes. An address alone does not: job scripts export it for torchrun."""
STARTED_BY = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}
"""How many processes a launcher started that gives none of the above."""


@dataclass(frozen=True)
class Place:
    """This process among all processes of its job, as its launcher gave it."""

    rank: int = 0
    size: int = 1
    local_rank: int | None = 0
    """Among the processes of this machine; None where several processes were started and nothing says."""
    launched: bool = False
    """Whether a launcher gave it; False in plain `python`."""


def place(environment: Mapping[str, str] | None = None) -> Place:
    """The place of this process. UserError naming the variable that is missing, wrong or at odds with another one."""
    given = os.environ if environment is None else environment
    found = [name for name in MARKS if name in given]
    if not found:
        for name, launcher in STARTED_BY.items():
            if given.get(name, "1").isdecimal() and int(given.get(name, "1")) > 1:
                raise UserError(
                    f"{name}={given[name]}: {launcher} started {given[name]} processes, but nothing says which of "
                    f"them this is (RANK and WORLD_SIZE); have it start one torchrun a machine (launch/node.sh)"
                )
        return Place()
    missing = [name for name in NEEDED if name not in given]
    if missing:
        raise UserError(
            f"{_listed(missing)} {_is(missing)} missing in the environment, beside {_listed(found)}: half of a "
            f"launcher's variables; for one process, or --nproc, type `unset {' '.join(found)}`, "
            f"else start with torchrun, which sets them all"
        )
    number = {name: _whole(name, given[name], least) for name, least in WHOLE.items() if name in given}
    if not given["MASTER_ADDR"].strip():
        raise UserError("MASTER_ADDR is empty in the environment; expected the name or address of rank 0's machine")
    if number["MASTER_PORT"] > 65535:
        raise UserError(f"MASTER_PORT={number['MASTER_PORT']}: expected a port, up to 65535")
    size, here = number["WORLD_SIZE"], number.get("LOCAL_WORLD_SIZE")
    if here is not None and here > size:
        raise UserError(f"LOCAL_WORLD_SIZE={here}: there are only WORLD_SIZE={size} processes in all")
    for name, of, bound in (("RANK", "WORLD_SIZE", size), ("LOCAL_RANK", "LOCAL_WORLD_SIZE", here or size)):
        if number.get(name, 0) >= bound:
            raise UserError(
                f"{name}={number[name]} and {of if of in number else 'WORLD_SIZE'}={bound} contradict each other: "
                f"ranks count from 0 to {bound - 1}"
            )
    local = number.get("LOCAL_RANK", 0 if size == 1 else None)
    return Place(number["RANK"], size, local, launched=True)


def rank_or_zero() -> int:
    """This process's rank for a message, whatever the environment says."""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0


def in_torchrun() -> bool:
    """Whether torchrun started this process. What else sets these variables does not restart it or end its peers."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def ranks_here() -> int:
    """Processes of this job on this machine, which share its cores."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(text)) if text.isdecimal() else 1


def alone() -> dict[str, str]:
    """This environment without a launcher's variables: of a process that is a job of its own."""
    taken = {*MARKS, *NEEDED, "LOCAL_WORLD_SIZE"}
    return {key: value for key, value in os.environ.items() if key not in taken and not key.startswith("TORCHELASTIC")}


def _whole(name: str, text: str, least: int) -> int:
    if not text.strip():
        raise UserError(f"{name} is empty in the environment; expected a whole number, or `unset {name}`")
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise UserError(f"{name}={text} in the environment: expected a whole number, {least} or more")
    return value


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _is(names: list[str]) -> str:
    return "are" if names[1:] else "is"
