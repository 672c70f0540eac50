"""Record the golden traces, or see what has changed against those that are there.

    python tests/golden/record.py                # runs every case, says what changed, writes files that are missing
    python tests/golden/record.py --overwrite    # and takes what was found as golden from now on

On a machine other than that of the files nothing is compared bit for bit. To show there that a change moves no bit, run
`python tests/golden/record.py --folder=FOLDER` in a checkout of the commit before it, and again, with the same FOLDER,
in one of the commit after it: the first writes, the second compares. Status 2 where something changed.
"""

import sys
import tempfile
from collections import defaultdict
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from llm.atomic import write_file
from llm.cli import run_cli
from llm.errors import UserError
from tests.golden.cases import CONFIGS, FOLDER, Case, every_case
from tests.golden.runs import Runs, run_cases
from tests.golden.trace import (
    CLOSE,
    Golden,
    differences,
    file_of,
    golden_of,
    load,
    other_machine,
    relative,
    text_of,
)


def record(
    overwrite: bool = False, configs: list[str] | None = None, folder: str = str(FOLDER), threads: int | None = None
) -> None:
    """Run the cases and compare them with the golden files, or make these.

    overwrite: replace files whose runs are other ones now
    configs: of these only
    folder: where the golden files are
    threads: CPU threads of a process, instead of those of the configs
    """
    chosen = list(CONFIGS) if configs is None else configs
    for name in chosen:
        if name not in CONFIGS:
            raise UserError(f"--configs={name}: use {', '.join(CONFIGS)}")
    with tempfile.TemporaryDirectory() as temporary:
        runs = run_cases((case for case in every_case() if case.config in chosen), Path(temporary), threads)
    changed = [name for name in chosen if not _settle(name, runs, Path(folder), overwrite)]
    if changed:
        raise UserError(f"{', '.join(changed)}: not what is recorded; --overwrite takes it as golden from now on")


def _settle(name: str, runs: Runs, folder: Path, overwrite: bool) -> bool:
    """Compare a config's runs with its file, and write it where that is asked for or there is none; whether the file is
    right now."""
    cases = [case for case in runs.said if case.config == name]
    if not runs.ran(cases[0]):
        print(f"{name}: not run: this device has no arithmetic for it")
        return True
    one = Case(name, "one")
    traces = {case.layout: runs.traces[case] for case in cases}
    golden = golden_of(name, runs.machine[1], runs.text_digest, runs.said[one], traces)
    print(_described(golden))
    file = file_of(name, folder)
    if file.exists():
        kept = load(name, folder)
        lines = _compared(kept, cases, runs)
        unrecorded = [layout for layout in kept.layouts if layout not in traces]
        lines += [f"{name} on {layout}: recorded, but refused by the validator now" for layout in unrecorded]
        for line in dict.fromkeys(lines):  # what is true of the config is said of each layout
            print(f"  {line}")
        if not lines and not overwrite:
            return True
        if not overwrite:
            return False
    folder.mkdir(parents=True, exist_ok=True)
    write_file(file, text_of(golden).encode())
    print(f"  written: {file.name}")
    return True


def _described(golden: Golden) -> str:
    """How far the run is from a tie."""
    margins = {"choice of a router": golden.router_margin, "greedy token": golden.greedy and golden.greedy["margin"]}
    reported = [f"nearest other {what} {margin:.1e} of the logits" for what, margin in margins.items() if margin]
    losses = [golden.layouts["one"].steps[at]["loss"] for at in (0, -1)]
    return "; ".join([f"{golden.config}: loss {losses[0]:.4f} to {losses[1]:.4f}", *reported])


def _compared(kept: Golden, cases: list[Case], runs: Runs) -> list[str]:
    """What has changed; prints how far apart the numbers are."""
    lines: list[str] = []
    furthest: dict[str, float] = defaultdict(float)
    for case in cases:
        trace, machine = runs.traces[case], runs.machine[case.ranks]
        lines += differences(kept, case, trace, machine, runs.text_digest, runs.of_one(case))
        if case.layout in kept.layouts:
            for right, row in zip(kept.layouts[case.layout].steps, trace.steps, strict=False):
                for key in CLOSE:
                    furthest[key] = max(furthest[key], relative(right.get(key), row.get(key)) or 0.0)
    others = other_machine(kept, runs.machine[1])
    print(f"  {'another machine: ' + ', '.join(others) if others else 'the machine of the file'}")
    reported = ", ".join(f"{key} {apart:.1e}" for key, apart in furthest.items())
    print(f"  largest relative difference over all layouts and steps: {reported}")
    return lines


if __name__ == "__main__":
    run_cli(record)
