"""The report of an evaluation: whole in one file, nothing in it runs, and the documents that matter are in it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from llm.errors import UserError
from llm.evaluate.charts import ticks
from llm.evaluate.outputs import Output
from llm.evaluate.ranking import worst_and_best
from llm.evaluate.report import write_report
from llm.evaluate.results_md import write_markdown
from tests.evaluate.written import answer_samples, choice_samples, write_output


class Tags(HTMLParser):
    """Elements that are open at the end, all that were met, and what their attributes point to."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.met: set[str] = set()
        self.targets: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.met.add(tag)
        self.targets += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.met.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def report(tmp_path: Path, outputs: list[Path], **options: object) -> str:
    write_report(outputs, tmp_path / "report.html", **options)  # type: ignore[arg-type]
    return (tmp_path / "report.html").read_text()


def test_the_report_needs_no_other_file_and_its_elements_are_closed(tmp_path: Path) -> None:
    Image.new("RGB", (600, 300), "red").save(tmp_path / "red.png")
    samples = choice_samples(1)
    for sample in samples:
        sample["images"] = ["red.png"]
    one = write_output(tmp_path / "one", {"vqa": samples, "gsm8k": answer_samples(1)})
    two = write_output(tmp_path / "two", {"vqa": samples, "gsm8k": answer_samples(2)})
    for outputs in ([one], [one, two]):
        found = Tags(report(tmp_path, outputs, image_roots=[tmp_path]))
        assert not found.open and {"svg", "img", "table"} <= found.met
        assert all(target.startswith(("#", "data:image/webp;base64,")) for target in found.targets)


def test_nothing_of_a_document_is_markup_and_control_characters_are_shown(tmp_path: Path) -> None:
    samples = choice_samples(1, n=2)
    samples[0]["prompt"] = "<script>alert(1)</script><img src=x onerror=y>\x07\ud800"
    samples[1]["responses"][0]["text"] = "</pre><style>*{display:none}"
    text = report(tmp_path, [write_output(tmp_path / "<i>out", {"task<u>": samples})])
    found = Tags(text)
    assert not found.open and not found.met & {"script", "img", "i", "u"} and text.count("<style") == 1
    assert "&lt;script&gt;alert(1)" in text and "\u2407" in text


def test_an_image_that_is_gone_is_named(tmp_path: Path) -> None:
    samples = choice_samples(1, n=2)
    samples[0]["images"] = ["gone/a.png"]
    assert "image gone/a.png: not found" in report(tmp_path, [write_output(tmp_path / "out", {"vqa": samples})])


def test_the_surest_mistakes_are_the_worst_documents_and_the_surest_right_answers_the_best() -> None:
    samples = [
        {"metrics": {"acc": acc}, "responses": [{"logprob": -1.0}, {"logprob": -1.0 - margin}]}
        for acc, margin in [(0, 1.0), (1, 0.1), (0, 3.0), (1, 2.0), (None, 9.0)]
    ]
    assert worst_and_best(samples, "acc", 2) == ([2, 0], [3, 1])
    assert worst_and_best(samples, "acc", 9) == ([2, 0], [3, 1]), "no document twice"
    assert worst_and_best([{"metrics": {"ppl": p}} for p in (3.0, 9.0, 1.0)], "ppl", 1) == ([1], [2])


def test_a_long_prompt_is_folded_not_lost(tmp_path: Path) -> None:
    samples = choice_samples(1, n=2)
    samples[0]["prompt"] = "begin " + "x " * 3000 + "end"
    text = report(tmp_path, [write_output(tmp_path / "out", {"task": samples})])
    assert "characters ..." in text and "begin " + "x " * 3000 + "end" in text


def test_checkpoints_are_drawn_against_their_steps(tmp_path: Path) -> None:
    outputs = [write_output(tmp_path / str(step), {"task": choice_samples(step)}, partial=True) for step in (10, 20)]
    text = report(tmp_path, outputs, steps=[10, 20])
    assert "Score against step" in text and len(re.findall("<polyline", text)) == 2  # acc and acc_norm
    assert "step 20" in text and "partial" in text and not Tags(text).open
    write_markdown(outputs, tmp_path / "results.md", steps=[10, 20])
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert "|  | task\\* acc | task\\* acc_norm |" in lines
    assert [line.split(" | ")[0] for line in lines if line.startswith("| step")][-2:] == ["| step 10", "| step 20"]


def test_a_table_in_markdown_is_not_broken_by_names(tmp_path: Path) -> None:
    out = write_output(tmp_path / "a|b", {"ta|sk": choice_samples(1)})
    write_markdown([out], tmp_path / "results.md")
    rows = [line for line in (tmp_path / "results.md").read_text().splitlines() if line.startswith("| ta\\")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [5, 5]


def test_ticks_are_round_and_cover_the_range() -> None:
    assert ticks(0.12, 0.58) == pytest.approx([0.2, 0.3, 0.4, 0.5])
    assert ticks(0, 1000) == [0, 200, 400, 600, 800, 1000]
    assert ticks(3.0, 3.0) == [3.0]


def test_an_output_without_results_or_with_a_damaged_line_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no results\.json"):
        Output.read(tmp_path)
    out = write_output(tmp_path / "out", {"task": choice_samples(1, n=2)})
    file = out / "samples" / "task.jsonl"
    file.write_text(file.read_text() + '{"doc": ')
    with pytest.raises(UserError, match=r"task\.jsonl: line 3"):
        Output.read(out).samples("task")
    (out / "results.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="expected an object"):
        Output.read(out)
