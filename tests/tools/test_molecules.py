"""Scaffold splits keep a scaffold together, in the sizes and order of the published splits; generated molecules are
counted as they are defined."""

import csv
import json
import sys
from pathlib import Path

import pytest

from llm.errors import UserError
from tools.scaffold_split import scaffold_groups, split, split_groups
from tools.score_molecules import score

GROUPS = [[0, 1, 2], [3], [4], *([i] for i in range(5, 20)), [*range(20, 35)], [*range(35, 40)]]
"""Of 40 molecules: 15, 5 and 3 of one scaffold are more than half of a test set of 4."""


def places(parts: tuple[list[int], ...]) -> list[int]:
    return sorted(place for part in parts for place in part)


@pytest.mark.parametrize("seed", range(5))
def test_a_balanced_split_has_each_molecule_once_and_large_scaffolds_before_others(seed: int) -> None:
    train, valid, test = parts = split_groups(GROUPS, "balanced", seed)
    assert places(parts) == list(range(40))
    assert (len(train), len(valid), len(test)) == (32, 4, 4)
    assert {0, *range(20, 40)} <= set(train)  # together 23, which training has room for
    assert all(set(group) <= set(part) for group in GROUPS for part in parts if set(group) & set(part))
    assert parts == split_groups(GROUPS, "balanced", seed)
    assert parts != split_groups(GROUPS, "balanced", seed + 1)


def test_a_deterministic_split_gives_the_largest_scaffolds_to_training_and_of_equals_the_later() -> None:
    train, valid, test = split_groups(GROUPS, "deterministic", 7)
    assert train == [*range(20, 35), *range(35, 40), 0, 1, 2, *range(19, 10, -1)]
    assert valid == [10, 9, 8, 7] and test == [6, 5, 4, 3]


def test_rows_of_one_molecule_however_written_and_of_one_scaffold_are_together() -> None:
    pytest.importorskip("rdkit")
    smiles = ["Cc1ccccc1", "CCO", "OCC", "C1", "Clc1ccccc1", "c1ccc2ccccc2c1", "", "N[C@H]1CCCC1F", "N[C@@H]1CCCC1"]
    groups, invalid = scaffold_groups(smiles)
    assert groups == [[0, 4], [1, 2], [5], [7, 8]] and invalid == [3, 6]


def test_a_split_is_three_files_with_all_columns_and_invalid_rows_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rdkit")
    rings = [f"C{'C' * n}C1{'C' * n}1" for n in range(2, 22)]
    rows = [(smiles, str(i), "a, b") for i, smiles in enumerate([*rings, "C1CC", "OCC"])]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("smiles", "y", "note"), *rows])
    split(str(tmp_path / "a.csv"), str(tmp_path / "out"), seed=3)
    said = capsys.readouterr().out
    assert "1 of 22 rows are no molecules and left out: row 21 ('C1CC')" in said
    assert "train 16, valid 2, test 3 of 22 rows, 21 scaffolds" in said
    found = []
    for name in ("train", "valid", "test"):
        with (tmp_path / "out" / f"{name}.csv").open(newline="") as file:
            first, *more = map(tuple, csv.reader(file))
            assert first == ("smiles", "y", "note")
            found += more
    assert sorted(found) == sorted(row for row in rows if row[0] != "C1CC")
    with pytest.raises(UserError, match="exists"):
        split(str(tmp_path / "a.csv"), str(tmp_path / "out"))
    (tmp_path / "b.csv").write_text("smiles\nCCO\nCC\n")
    with pytest.raises(UserError, match="of 1 scaffolds none is left for train"):
        split(str(tmp_path / "b.csv"), str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"b\.csv, row 1: has no text in column 'mol' \(--column\); it has 'smiles'"):
        split(str(tmp_path / "b.csv"), str(tmp_path / "none"), column="mol")
    assert not (tmp_path / "none").exists()


def test_generated_molecules_are_valid_unique_and_novel_as_defined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rdkit")
    texts = ["CCO", "OCC", "c1ccccc1", "CCN", "C1", "", "C(C)(C)(C)(C)C", "CCBr"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"prompt": "", "completion": text}) + "\n" for text in texts))
    (tmp_path / "t.csv").write_text("smiles\nC1=CC=CC=C1\nNCC\n")
    score(str(tmp_path / "a.jsonl"), str(tmp_path / "t.csv"), output=str(tmp_path / "scores.json"))
    assert json.loads((tmp_path / "scores.json").read_text()) == {"generated": 8, "valid": 5, "unique": 4, "novel": 2}
    assert capsys.readouterr().out.splitlines() == [
        "valid: 62.5% (5 of 8)",
        "unique: 80.0% (4 of 5)",
        "novel: 50.0% (2 of 4)",
    ]


def test_without_rdkit_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rdkit", None)
    (tmp_path / "a.csv").write_text("smiles\nCCO\n")
    with pytest.raises(UserError, match="molecules need RDKit, which is not installed: `make chem`"):
        split(str(tmp_path / "a.csv"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
