"""The report of a run, or of several compared: `python tools/report.py RUN [RUN ...] [--output FILE]`.

One HTML file that needs no other: curves, loads of experts, samples, layout, data, events and config, of several runs
on the same axes with the keys that differ marked (docs/report.md). A run writes its own when it ends; this makes one at
any time, of a run that is still at work too, and takes nothing but the files of the run folders.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from llm.cli import Places, run_cli
from llm.errors import UserError
from llm.paths import PathText
from llm.report.write import NAME, write_report


def report(runs: Places, output: PathText | None = None) -> None:
    """Write the report of a run, or of several compared, as one HTML file.

    runs: run folders, as many as are to be compared
    output: the file; of one run left out, report.html in its folder
    """
    if output is None and len(runs) > 1:
        raise UserError("a report of several runs wants --output FILE")
    path = Path(runs[0]) / NAME if output is None else Path(output)
    write_report([Path(run) for run in runs], path)
    print(path)


def main() -> None:
    run_cli(report)


if __name__ == "__main__":
    main()
