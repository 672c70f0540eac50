"""Writing a report: the page as large as it may be, whole or not at all."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from llm.atomic import write_file
from llm.errors import UserError
from llm.report.folder import RunFolder, read_folder
from llm.report.page import page

NAME = "report.html"
MOST_BYTES = 6_000_000
"""Of the file, 4.8 million of which are plotly.js."""
PIXELS = (600, 400, 280, 200, 140, 100, 70, 48, 32, 20)
"""What curves are thinned to, the most for which the file is small enough; 600 is about the width of a chart."""


def write_report(run_dirs: Sequence[Path], output: Path) -> None:
    """Write the report of a run, or of several compared. UserError where a folder holds no run, plotly is missing, or
    the runs are too many for one file. OSError where the file cannot be written.
    """
    runs = [read_folder(path) for path in run_dirs]
    name_apart(runs)
    write_file(output, content(runs, plotly_js()))


def content(runs: Sequence[RunFolder], script: str, most: int = MOST_BYTES) -> bytes:
    """The page in at most so many bytes. UserError where that is not possible."""
    for pixels in PIXELS:
        made = page(runs, script, pixels).encode(errors="replace")
        if len(made) <= most:
            return made
    raise UserError(f"a report of {len(runs)} runs would have {len(made):,} bytes of {most:,}; give fewer runs")


def plotly_js() -> str:
    """The library that draws the curves. UserError where the package is not installed."""
    found = importlib.util.find_spec("plotly")  # its Python, which takes a second to import, is not needed
    if found is None or not found.submodule_search_locations:
        raise UserError("the package plotly is not installed; pip install plotly")
    path = Path(found.submodule_search_locations[0]) / "package_data" / "plotly.min.js"
    return path.read_text(encoding="utf-8").replace("</script", "<\\/script")


def name_apart(runs: Sequence[RunFolder]) -> None:
    """Runs whose folders have one name are called by as much of their paths as distinguishes them."""
    paths = [run.path.resolve() for run in runs]
    for run, path in zip(runs, paths, strict=True):
        others = [other for other in paths if other != path]
        depth = 1
        while depth < len(path.parts) and any(other.parts[-depth:] == path.parts[-depth:] for other in others):
            depth += 1
        run.name = "/".join(path.parts[-depth:])
