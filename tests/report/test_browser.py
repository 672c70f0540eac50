"""A report in a browser: nothing of it fails, and nothing is wider than a telephone or a screen.

Wants Chromium, as Debian's package `chromium` has it; without, the test skips.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llm.report.write import write_report
from tests.report.folders import SCRIPT, add_start, write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (400, 1400)
PROBE = """<script>
alert = () => console.log("ALERT");
dispatchEvent(new Event("beforeprint")); // draws what lies below the screen, too
const look = (tries) => {
  const figures = [...document.querySelectorAll("figure.plot")];
  const undrawn = figures.filter((figure) => !figure.querySelector("svg.main-svg")).length;
  if (undrawn && tries) return setTimeout(() => look(tries - 1), 100);
  const wide = figures.filter((figure) => [...figure.querySelectorAll("svg")].some(
    (svg) => svg.getBoundingClientRect().right > figure.getBoundingClientRect().right + 1));
  const page = document.documentElement;
  console.log("PROBE " + JSON.stringify({
    width: innerWidth, scroll: page.scrollWidth, figures: figures.length, undrawn,
    wide: wide.map((figure) => figure.textContent.slice(0, 40)),
  }));
};
addEventListener("load", () => look(100));
</script>"""


def looked_at(page: Path, folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """(what the probe in the page says at each width, everything else on its console)."""
    (folder / "probed.html").write_text(page.read_text() + PROBE)
    frames = "".join(f'<iframe src="probed.html" style="width:{width}px;height:2000px"></iframe>' for width in WIDTHS)
    (folder / "frames.html").write_text(f"<!doctype html><style>iframe{{border:0}}</style>{frames}")
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000",
            "--window-size=1900,2000", "--dump-dom", (folder / "frames.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    said = re.findall(r'CONSOLE[^"]*"(.*?)", source: ', done.stderr, re.DOTALL)
    found = [json.loads(line.removeprefix("PROBE ")) for line in said if line.startswith("PROBE ")]
    return sorted(found, key=lambda one: one["width"]), [line for line in said if not line.startswith("PROBE ")]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt install chromium, for reports in a browser")
def test_a_report_fits_a_telephone_and_a_screen_without_an_error(tmp_path: Path) -> None:
    long = "_" * 60
    runs = [write_run(tmp_path / f"{n}{long}", 400, moe=(2, 4), lr=0.1 * n, **{"k" * 90: SCRIPT}) for n in (1, 2)]
    for run in runs:
        add_start(run, 0, 16, tensor=2, pipeline=2, expert=2)
        (run / "samples.jsonl").write_text(json.dumps({"step": 5, "prompt": "w" * 400, "text": SCRIPT + "x" * 400}))
        (run / "log.txt").write_text(f"note: {'n' * 300}\nstep 30: passed over (rows 8 to 15), no update\n")
    for compared in (runs[:1], runs):
        write_report(compared, tmp_path / "report.html")
        found, said = looked_at(tmp_path / "report.html", tmp_path)
        assert said == [], "the console is silent, and no text of the run was run"
        assert [one["width"] for one in found] == list(WIDTHS)
        for one in found:
            assert one["scroll"] <= one["width"] and one["wide"] == []
            assert one["undrawn"] == 0 and one["figures"] > 15
