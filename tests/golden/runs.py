"""Golden cases as real jobs: one for all cases of a number of ranks."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed.harness import run, write_text
from tests.distributed.pool import run_job
from tests.golden.cases import Case, run_config
from tests.golden.trace import Trace, digest_of_files, read_trace

DOCUMENTS = 60
SECONDS_A_CASE = 120  # more than ten times what one takes on a quiet machine


@dataclass(frozen=True)
class Runs:
    """What became of some cases."""

    machine: dict[int, dict[str, Any]]
    """By number of ranks."""
    text_digest: str
    traces: dict[Case, Trace]
    said: dict[Case, dict[str, Any]]
    """What job.py says of each."""

    def ran(self, case: Case) -> bool:
        """False where this device has no arithmetic for the precision of the config."""
        return bool(self.said[case]["ran"])

    def of_one(self, case: Case) -> dict[str, Any] | None:
        """What job.py says of a run of one process."""
        return self.said[case] if case.ranks == 1 else None


def run_cases(cases: Iterable[Case], folder: Path, threads: int | None = None) -> Runs:
    """Run them in `folder`, a new one; AssertionError with a job's last words where one fails."""
    cases, text = list(cases), folder / "text"
    write_text(text, DOCUMENTS)
    machine, traces, said = {}, {}, {}
    for ranks in sorted({case.ranks for case in cases}):
        own = [case for case in cases if case.ranks == ranks]
        out = folder / f"ranks{ranks}"
        out.mkdir(parents=True)
        file = out / "cases.json"
        file.write_text(json.dumps({str(case): run_config(case, text, threads) for case in own}))
        start = run_job if threads is None else run  # kept ranks have one thread
        done = start("tests/golden/job.py", str(file), str(out), nproc=ranks, timeout=600 + SECONDS_A_CASE * len(own))
        assert done.returncode == 0, done.stderr
        machine[ranks] = json.loads((out / "machine.json").read_text())
        for case in own:
            said[case] = json.loads((out / f"{case}.json").read_text())
            if said[case]["ran"]:
                traces[case] = read_trace(out / str(case))
    digest = digest_of_files(text / f"{name}.jsonl" for name in ("train", "valid"))
    return Runs(machine, digest, traces, said)
