"""Reports of run folders: what they show, what they pass over, and that nothing of a run is ever taken for markup."""

import base64
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llm.errors import UserError
from llm.report import write
from llm.report.experts import load_map
from llm.report.folder import read_folder
from llm.report.layout import drawn, layouts
from llm.report.rows import Column, read_metrics
from llm.report.thin import thinned
from llm.report.write import MOST_BYTES, content, plotly_js, write_report
from llm.train.folder import close_log
from tests.report.folders import SCRIPT, SPIKE, add_start, write_run
from tests.shared import ROOT
from tools.report import report


class Elements(HTMLParser):
    """The names of all elements, and the text of those that are scripts or wanted."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.words: list[str] = []
        self.keys: list[tuple[str, bool]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        given = dict(attrs)
        if given.get("data-key"):
            self.keys.append((str(given["data-key"]), given.get("class") == "differs"))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def page_of(*folders: Path) -> str:
    runs = [read_folder(folder) for folder in folders]
    write.name_apart(runs)
    return content(runs, "/* library */").decode()


def data_of(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="page-data">(.*?)</script>', page)
    assert found is not None
    return json.loads(found[1])


def points(curve: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
    x, y = (base64.b64decode(curve[key]) for key in ("x", "y"))
    return np.frombuffer(x, "<u4"), np.frombuffer(y, "<f4")


def chart(page: str, title: str) -> dict[str, Any]:
    (found,) = [one for one in data_of(page)["charts"] if one["title"] == title]
    return found


def test_a_run_of_100_000_steps_fits_and_keeps_its_spike(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 100_000, fields=30)
    write_report([folder], folder / "report.html")
    text = (folder / "report.html").read_text()
    assert len(text.encode()) <= MOST_BYTES
    steps, loss = points(chart(text, "Loss")["curves"][0])
    assert loss.max() == SPIKE and steps[loss.argmax()] == 40_000
    assert steps[0] == 1 and steps[-1] == 100_000 and len(steps) < 2000


def test_each_pixel_keeps_its_least_largest_and_last_value() -> None:
    values = np.random.default_rng(0).normal(size=5000)
    steps = np.arange(3, 10_003, 2)
    thin = thinned(Column(steps, values), 40, (3, 10_001))
    assert (np.diff(thin.steps) > 0).all() and len(thin.steps) <= 121
    pixel, of_thin = ((x - 3) * 40 // 9_999 for x in (steps, thin.steps))
    for i in range(40):
        whole, kept = values[pixel == i], thin.values[of_thin == i]
        assert (kept.min(), kept.max(), kept[-1]) == (whole.min(), whole.max(), whole[-1])


def test_texts_of_a_run_stay_texts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "<script>alert(0)<script>", 20, data={"train": SCRIPT}, **{f"x{SCRIPT}": 1})
    add_start(folder, 0, 2)
    sample = {"step": 5, "prompt": f"p{SCRIPT}", "text": f"t{SCRIPT}"}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (folder / "log.txt").write_text(f"note: {SCRIPT}\n")
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    rows[-1] = rows[-1][:-1] + f', "loss/{SCRIPT}": 1.5, "skipped": "{SCRIPT}"}}'
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    text = page_of(folder)
    found = Elements(text)
    assert found.names.count("script") == 3, "the data, the library, and the page's own"
    assert "img" not in found.names
    whole = "".join(found.words)
    for shown in (f"t{SCRIPT}", f"p{SCRIPT}", f"note: {SCRIPT}", f"web{SCRIPT}"):
        assert shown in whole, "as text"
    assert "<" not in json.dumps([one["curves"] for one in data_of(text)["charts"]]), "names in curves are escaped too"


def test_torn_and_damaged_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 30)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[4] = "\0" * 40
    lines[9] = '{"step": "ten", "loss": 1}'
    lines[19] = "[1, 2]"
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 31, "lo']))
    metrics = read_metrics(folder / "metrics.jsonl")
    assert metrics.damaged == 4
    assert metrics.column("loss").steps.tolist() == [n for n in range(1, 31) if n not in (5, 10, 20)]
    assert "4 damaged lines of metrics.jsonl passed over" in page_of(folder)


def test_a_pipe_or_device_in_the_place_of_a_file_is_not_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 20)
    for name in ("metrics.jsonl", "config.yaml"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    (folder / "log.txt").symlink_to("/dev/zero")
    run = read_folder(folder)
    assert run.metrics.columns == {} and run.config == {} and run.events == []
    assert "Run run" in page_of(folder)


def test_of_a_step_that_is_there_twice_the_later_row_counts(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 1, "loss": 3.0}, {"step": 3, "loss": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loss = read_metrics(tmp_path / "metrics.jsonl").column("loss")
    assert loss.steps.tolist() == [1, 2] and loss.values.tolist() == [3.0, 2.0]


def test_several_runs_share_axes_and_the_keys_that_differ_are_marked(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name / "run", 20 + n, lr=0.001 * (n + 1)) for n, name in enumerate("abc")]
    text = page_of(*folders)
    loss = chart(text, "Loss")
    names = [curve["name"] for curve in loss["curves"]]
    assert names == [f"{run}/run: {of}" for run in "abc" for of in ("training", "held out")]
    assert [curve["colour"] for curve in loss["curves"]] == [0, 0, 1, 1, 2, 2]
    differ = {key for key, differs in Elements(text).keys if differs}
    assert differ == {"optim.lr", "train.steps"}
    assert "parallel.tensor" in {key for key, _ in Elements(text).keys}
    assert "only the 2 keys that differ" in text


def test_the_speed_of_a_step_that_was_passed_over_is_not_drawn(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 20)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[6] |= {"skipped": "passed over", "loss": None, "tokens_per_s": 1e9, "step_time_s": 1e-6}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = page_of(folder)
    for title in ("Tokens per second", "Time of a step", "Waiting for data"):
        steps, _ = points(chart(text, title)["curves"][0])
        assert steps.tolist() == [step for step in range(1, 21) if step != 7]
    assert points(chart(text, "Learning rate")["curves"][0])[0].tolist() == list(range(1, 21))
    assert "steps without an update: passed over 1" in text


@pytest.mark.parametrize(
    ("parts", "drawn", "unit"),
    [
        (["autoregressive", "moe_balance", "moe_z"], [], ""),
        (["lm", "moe_balance"], [], "nats"),
        (["lm", "mlm", "moe_z"], ["LM", "MLM"], "nats"),
    ],
)
def test_losses_that_a_run_has_none_of_are_not_drawn_and_those_of_numbers_are_no_nats(
    tmp_path: Path, parts: list[str], drawn: list[str], unit: str
) -> None:
    folder = write_run(tmp_path / "run", 20)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {f"{part}_loss": 0.0 if part.startswith("moe") else row["loss"] for part in parts}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = page_of(folder)
    assert chart(text, "Loss")["unit"] == unit
    charts = [one for one in data_of(text)["charts"] if one["title"] == "Parts of the loss"]
    assert [curve["name"] for one in charts for curve in one["curves"]] == drawn


def test_many_runs_are_thinned_until_they_fit(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"run{n}", 3000) for n in range(3)]
    runs = [read_folder(folder) for folder in folders]
    whole = content(runs, "")
    small = content(runs, "", most=len(whole) // 2)
    assert len(small) <= len(whole) // 2
    _, loss = points(chart(small.decode(), "Loss")["curves"][0])
    assert loss.max() == SPIKE
    with pytest.raises(UserError, match="give fewer runs"):
        content(runs, "x" * 1000, most=1000)


def test_the_load_of_experts_is_a_map_over_steps(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 100, moe=(2, 4))
    add_start(folder, 0, 1)
    found = load_map(read_folder(folder))
    assert found is not None
    assert found.labels[:2] == ["layer 1, expert 0", "layer 1, expert 1"] and found.labels[-1] == "layer 3, expert 3"
    assert found.steps.tolist() == list(range(10, 101, 10))
    # layer 1 at its second row: 10, 11, 12, 13 tokens, of which an even share is 11.5
    np.testing.assert_allclose(found.loads[:4, 1], np.array([10, 11, 12, 13]) / 11.5)
    np.testing.assert_allclose(found.loads[:4].mean(0), 1.0)
    (drawn_map,) = data_of(page_of(folder))["maps"]
    assert len(base64.b64decode(drawn_map["loads"])) == 8 * len(drawn_map["steps"])


def test_of_very_many_experts_each_layer_shows_its_busiest(tmp_path: Path) -> None:
    found = load_map(read_folder(write_run(tmp_path / "run", 100, moe=(3, 600))))
    assert found is not None and found.loads.shape == (3, 10) and len(found.labels) == 3
    assert found.loads[0, 1] == pytest.approx(609 / np.arange(10, 610).mean())


def test_layouts_are_drawn_rank_by_rank_and_from_which_step_on(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 20)
    add_start(folder, 0, 4, tensor=2)
    add_start(folder, 5, 4, tensor=2)
    add_start(folder, 9, 16, tensor=2, pipeline=2, expert=2)
    found = layouts(read_folder(folder))
    assert [(since, layout.world) for since, layout in found] == [("from step 1", 4), ("from step 10", 16)]
    picture = drawn(found[1][1])
    assert sorted(map(int, re.findall(r">(\d+)</text>", picture))) == list(range(16))
    assert picture.count("<svg") == 4, "a block for each data-parallel rank"


def test_without_starts_the_layout_is_that_of_config_and_metrics(tmp_path: Path) -> None:
    ((_, layout),) = layouts(read_folder(write_run(tmp_path / "run", 20)))
    assert (layout.world, layout.tensor, layout.data) == (8, 2, 4)


def test_events_and_samples_are_read_from_the_log_of_an_older_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 20)
    (folder / "log.txt").write_text(
        "step      4/20  loss 3.0000\n--- sample at step 4, prompt 'a\\n' ---\nresumed from nowhere\n---\n"
        "step 5: loss 9.0 is above 5.0, guard.spike_threshold over the last ones; going back to the last checkpoint, "
        "to pass over rows 8 to 15\nresumed from r/checkpoints/step_4 (step 4, 32 rows seen)\nchanged: ranks 2 -> 4\n"
        "step 5: passed over (rows 8 to 15), no update\ndone: 20 steps, 5 tokens; run folder r\n"
    )
    run = read_folder(folder)
    assert [(e.step, e.kind) for e in run.events] == [
        (5, "rewind"), (4, "resume"), (4, "change"), (5, "skip"), (5, "end"),
    ]  # fmt: skip
    assert [tuple(sample) for sample in run.samples] == [(4, "a\n", "resumed from nowhere")]


def test_a_run_ends_alike_where_its_report_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run", 20)
    said: list[str] = []
    log: Any = SimpleNamespace(say=said.append, close=lambda: said.append("closed"))
    run: Any = SimpleNamespace(folder=folder, config=SimpleNamespace(log=SimpleNamespace(report=True)))
    path = folder / "report.html"
    path.mkdir()  # as good as a folder that is read-only, for root too
    close_log(run, log)
    assert said == [f"no report: {path}: Is a directory", "closed"]
    assert not [file for file in folder.iterdir() if file.name.startswith(".")], "nothing half-written is left"
    path.rmdir()
    monkeypatch.setattr(write.importlib.util, "find_spec", lambda name: None)
    close_log(run, log)
    assert said[2:] == [f"no report: {path}: the package plotly is not installed; pip install plotly", "closed"]
    monkeypatch.undo()
    close_log(run, log)
    assert said[4:] == [f"report: {path}", "closed"] and path.stat().st_size > 1_000_000


def test_the_command_makes_one_file_of_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (str(write_run(tmp_path / name, 20)) for name in "ab")
    report((a, b), output=str(tmp_path / "both.html"))
    assert capsys.readouterr().out == f"{tmp_path / 'both.html'}\n"
    assert "2 runs compared" in (tmp_path / "both.html").read_text()
    report((a,))
    assert (tmp_path / "a" / "report.html").exists()
    with pytest.raises(UserError, match="wants --output FILE"):
        report((a, b))
    with pytest.raises(UserError, match="no run folder"):
        report((str(tmp_path),))


def test_the_page_asks_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    text = page_of(write_run(tmp_path / "run", 20))
    assert not re.search(r"\b(src|href)=\"(?!#)", text) and "url(" not in text
    assert "</script" not in plotly_js()


def test_the_command_does_not_wait_for_torch() -> None:
    code = "import sys, tools.report; sys.exit('torch' in sys.modules or 'plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
