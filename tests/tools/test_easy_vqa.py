"""tools/easy_vqa.py: both spellings of the data give the same rows; the permuted test asks the same questions about
other pictures; scoring counts by what was asked.
"""

import io
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llm.errors import UserError
from tools.easy_vqa import kind_of, prepare, score

COLOURS = ("red", "green", "blue", "gray", "teal")
N = {"train": 60, "test": 5}


def asked(number: int) -> list[list[object]]:
    colour = COLOURS[number % len(COLOURS)]
    return [
        [f"is there a {colour} shape in picture {number}?", "yes", number],
        ["what color is the shape?", colour, number],
        ["what shape does the image contain?", "circle", number],
        *([f"is there no {COLOURS[i]} shape?", "no", number] for i in range(3)),
    ]


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    for part, n in N.items():
        (folder / f"{part}_questions.json").write_text(json.dumps([q for i in range(n) for q in asked(i)]))
        images = [{"bytes": png(i), "path": None} for i in range(n)]
        pq.write_table(pa.table({"image_id": list(range(n)), "image": images}), folder / f"{part}_images.parquet")
    return folder


@pytest.fixture(scope="module")
def prepared(tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "rows"
    prepare(str(tables), str(folder))
    return folder


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_the_repositorys_own_folders_give_the_same_files(tables: Path, prepared: Path, tmp_path: Path) -> None:
    for part, n in N.items():
        (tmp_path / "data" / part / "images").mkdir(parents=True)
        (tmp_path / "data" / part / "questions.json").write_bytes((tables / f"{part}_questions.json").read_bytes())
        for i in range(n):
            (tmp_path / "data" / part / "images" / f"{i}.png").write_bytes(png(i))
    prepare(str(tmp_path), str(tmp_path / "rows"))
    found, expected = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "rows", prepared)
    )
    assert found == expected


def test_a_training_row_is_a_picture_with_all_its_questions_and_no_picture_is_on_both_sides(prepared: Path) -> None:
    train, valid = rows(prepared, "train"), rows(prepared, "valid")
    shown = [row["images"] for row in train + valid]
    assert sorted(shown) == sorted([f"train/{i}.png"] for i in range(N["train"]))
    for row in train:
        number = int(re.findall(r"\d+", row["images"][0])[0])
        said = [turn["content"].removeprefix("<image>") for turn in row["messages"]]
        assert said == [text for question, answer, _ in asked(number) for text in (question, answer)]
        assert [turn["content"].count("<image>") for turn in row["messages"]] == [1, *[0] * 11]


def test_questions_alone_are_the_open_ones_and_a_third_of_the_others_and_none_of_held_out_pictures(
    prepared: Path,
) -> None:
    held_out = {row["images"][0] for row in rows(prepared, "valid")}
    found = rows(prepared, "train_single")
    assert not held_out & {row["images"][0] for row in found}
    assert all(len(row["messages"]) == 2 and row["messages"][0]["content"].startswith("<image>") for row in found)
    kinds = [kind_of(row["messages"][1]["content"]) for row in found]
    n = N["train"] - len(held_out)
    assert {kind: kinds.count(kind) for kind in kinds} == {"shape": n, "colour": n, "yes/no": 2 * n}


def test_permuted_questions_are_the_same_about_other_pictures(prepared: Path) -> None:
    test, permuted = rows(prepared, "test"), rows(prepared, "test_permuted")
    assert len(test) == N["test"] * 6
    for a, b in zip(test, permuted, strict=True):
        assert (a["messages"], a["answer"]) == (b["messages"], b["answer"])
        assert a["images"] != b["images"]


def test_scoring_counts_by_what_was_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = [("yes", " yes"), ("no", "yes"), ("circle", "circle"), ("blue", "red")]
    lines = (json.dumps({"answer": answer, "completion": said}) + "\n" for answer, said in answers)
    (tmp_path / "answers.jsonl").write_text("".join(lines))
    score(str(tmp_path / "answers.jsonl"))
    found = {line.split()[0]: line.split()[1:4] for line in capsys.readouterr().out.splitlines()}
    assert found == {
        "all": ["2", "of", "4"], "yes/no": ["1", "of", "2"], "shape": ["1", "of", "1"], "colour": ["0", "of", "1"]
    }  # fmt: skip
    assert kind_of("triangle") == "shape"


@pytest.mark.parametrize("missing", ["test_questions.json", "test_images.parquet"])
def test_what_is_missing_is_named_and_nothing_is_written(missing: str, tables: Path, tmp_path: Path) -> None:
    for file in tables.iterdir():
        if file.name != missing:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=missing):
        prepare(str(tmp_path), str(tmp_path / "rows"))
    assert not (tmp_path / "rows").exists()
