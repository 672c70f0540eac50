"""The picture at the top of README is drawn from the newest measurement, and shows what README says of it."""

import json
from typing import Any
from xml.etree import ElementTree

from tests.shared import ROOT
from tools.benchmarks import one_answer
from tools.benchmarks.one_answer import BOUND, KINDS, RESULTS, differences, kind_of, picture

SVG = "{http://www.w3.org/2000/svg}"


def newest() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(sorted(RESULTS.glob("*-one-answer.json"))[-1].read_text())
    return document


def test_the_picture_is_that_of_the_newest_measurement() -> None:
    assert one_answer.PICTURE.read_text() == picture(newest()), "python tools/benchmarks/one_answer.py draw"
    assert f"({one_answer.PICTURE.relative_to(ROOT)})" in (ROOT / "README.md").read_text()


def test_every_layout_is_within_the_bound_and_every_kind_among_them() -> None:
    document = newest()
    assert {kind_of(layout) for layout in document["layouts"]} == set(KINDS)
    assert max(max(differences(layout, document["reference"])) for layout in document["layouts"]) < BOUND


def test_a_difference_is_drawn_where_it_belongs_and_none_below_the_axis() -> None:
    rows = {"loss": [2.0, 1.0, 0.5], "grad_norm": [1.0, 1.0, 1.0]}
    other = {"loss": [2.0, 1.0 + 1e-7, 0.5], "grad_norm": [1.0, 1.0, 1.0 + 1e-20]}
    layout = {"tensor": 2, "pipeline": 1, "expert": 1, "data": 2, "zero_stage": 1, **other}
    drawn = ElementTree.fromstring(picture({"reference": rows, "layouts": [layout]}))
    small = [dot for dot in drawn.iter(f"{SVG}circle") if dot.get("r") == "2"]
    first, second, third = (float(dot.attrib["cy"]) for dot in small)
    assert first == third == one_answer.BOTTOM, "no difference lies on the lowest line"
    share = (-7 - one_answer.FLOOR) / (one_answer.CEILING - one_answer.FLOOR)
    assert abs(second - (one_answer.BOTTOM - share * (one_answer.BOTTOM - one_answer.TOP))) < 0.1
    assert {dot.get("fill") for dot in small} == {KINDS["tensor"][1]}
