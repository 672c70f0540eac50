"""metrics.csv of a run: the same points as every other place of curves, in a table that grows with them."""

import csv
from pathlib import Path

from llm.train.csv_table import CsvTable
from llm.train.log import RunLog
from tests.train.test_log import ROW


def write_steps(run_dir: Path, first: int, last: int, loss: float = 2.0, validated: tuple[int, ...] = ()) -> None:
    log = RunLog(run_dir, first_step=first, steps=9, interval=100, curves=[CsvTable(run_dir, first)])
    for step in range(first, last + 1):
        valid = {"valid_loss": loss + 1} if step in validated else {}
        log.step({**ROW, "step": step, "loss": loss, **valid})
    log.sample(last, "a", "a text is no number")
    log.close()


def rows_of(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_each_step_is_a_row_with_the_names_of_the_curves(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 3)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert [float(row["train/loss"]) for row in rows] == [2.0] * 3 and float(rows[0]["optim/lr"]) == 0.1
    assert "throughput/mfu" not in rows[0], "it was never known"


def test_a_curve_that_begins_later_is_a_column_that_was_empty_before(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 4, validated=(2, 4))
    assert [row["val/loss"] for row in rows_of(tmp_path)] == ["", "3.0", "", "3.0"]
    assert [row["train/loss"] for row in rows_of(tmp_path)] == ["2.0"] * 4


def test_a_resumed_run_replaces_rows_of_repeated_steps_and_a_torn_one(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 5, validated=(2,))
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("6,2.0")
    write_steps(tmp_path, 4, 6, loss=1.0, validated=(6,))
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert [row["train/loss"] for row in rows] == ["2.0"] * 3 + ["1.0"] * 3
    assert [row["val/loss"] for row in rows] == ["", "3.0", "", "", "", "2.0"]


def test_a_table_that_cannot_be_written_is_said_and_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").mkdir()
    write_steps(tmp_path, 1, 3)
    text = (tmp_path / "log.txt").read_text()
    assert "metrics.csv cannot be written" in text and "the run goes on without" in text
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3
