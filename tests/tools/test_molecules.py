"""Scaffold splits keep a scaffold together, in the sizes and order of the published splits; generated molecules are
counted as they are defined."""

import csv
import json
import random
import sys
from pathlib import Path

import pytest

from llm.errors import UserError
from llm.tokenizers.smiles import CONTROL
from llm.train.config.load import load_config
from tests.shared import ROOT
from tools.benchmarks import molecules as benchmark
from tools.molecules import prepare
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


def test_prepared_molecules_have_one_vocabulary_and_every_split(tmp_path: Path) -> None:
    pytest.importorskip("rdkit")
    labels = {"zinc20k": "logP", "delaney": "logp", "lipo": "lipo", "bbbp": "p_np"}
    data = tmp_path / "data"
    data.mkdir()
    for number, (name, label) in enumerate(labels.items()):
        rows = [(f"C{'C' * n}C1{'N' * (number + 1)}{'C' * n}1", n) for n in range(2, 22)]
        with (data / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("smiles", label), *rows])
    prepare(str(data), str(tmp_path / "out"))
    assert (tmp_path / "out" / "vocab.txt").read_text().split() == [*CONTROL, "1", "C", "N"]
    for name in ("delaney", "lipo", "bbbp"):
        whole = sorted((data / f"{name}.csv").read_text().splitlines()[1:])
        found = {folder.name for folder in (tmp_path / "out" / name).iterdir()}
        assert found == {*(f"balanced-{seed}" for seed in range(5)), "deterministic"}
        for name_of_split in found:
            parts = [tmp_path / "out" / name / name_of_split / f"{part}.csv" for part in ("train", "valid", "test")]
            lines = [part.read_text().splitlines() for part in parts]
            assert [len(part) - 1 for part in lines] == [16, 2, 2]
            assert sorted(line for part in lines for line in part[1:]) == whole
    (data / "lipo.csv").unlink()
    with pytest.raises(UserError, match=r"--data=.*: holds no lipo\.csv"):
        prepare(str(data), str(tmp_path / "other"))


def test_ngrams_are_chosen_on_the_validation_part_and_scored_on_the_test(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    draw = random.Random(0)
    for name, column in (("delaney", "logp"), ("bbbp", "p_np")):
        folder = tmp_path / name / "balanced-0"
        folder.mkdir(parents=True)
        for part, n in (("train", 300), ("valid", 60), ("test", 60)):
            texts = ["".join(draw.choices("CNO", k=12)) for _ in range(n)]
            value = {"logp": lambda text: 0.5 * text.count("CN") - 1, "p_np": lambda text: int(text.count("CN") > 1)}
            with (folder / f"{part}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([("smiles", column), *((text, value[column](text)) for text in texts)])
    assert benchmark.ngram_score(tmp_path, "delaney", "balanced-0") < 0.05  # linear in the count of a 2-gram
    assert benchmark.ngram_score(tmp_path, "bbbp", "balanced-0") > 0.99


@pytest.mark.parametrize("name", ["zinc", "delaney", "lipo", "bbbp"])
def test_each_config_is_of_one_model_and_reads_what_is_prepared(name: str) -> None:
    config = load_config(ROOT / f"configs/siblings/hyformer_{name}.yaml")
    first = load_config(ROOT / "configs/siblings/hyformer_zinc.yaml").model
    head = {"n_prediction", "prediction", "resid_dropout", "head_dropout"}
    assert config.model.model_dump(exclude=head) == first.model_dump(exclude=head)
    assert config.tokenizer.path == f"{benchmark.DATA}/vocab.txt"
    (*_, source) = config.data.train
    columns = {"delaney": "logp", "lipo": "lipo", "bbbp": "p_np", "zinc": ["logP", "qed", "SAS"]}
    assert source.columns == {"text": "smiles", "label": columns[name]}
    folder = "zinc20k/all" if name == "zinc" else f"{name}/balanced-0/train"
    assert source.path == f"{benchmark.DATA}/{folder}.csv"


def test_the_table_has_means_with_standard_errors_and_differences_of_the_same_splits() -> None:
    read = {
        "n-grams": {"delaney": {"balanced-0": 1.0, "balanced-1": 2.0, "deterministic": 1.5}},
        "scratch": {"delaney": {"balanced-0": 1.0, "balanced-1": 1.2, "balanced-2": 5.0}},
        "pretrained": {"delaney": {"balanced-0": 0.8, "balanced-1": 1.1}},
    }
    lines = benchmark.table(read)
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == [
        "delaney",
        "balanced",
        "1.076",
        "1.500 ± 0.500 (n=2)",
        "2.400 ± 1.301 (n=3)",
        "0.950 ± 0.150 (n=2)",
        "-0.150 ± 0.050 (n=2)",
        "-0.550 ± 0.350 (n=2)",
    ]
    assert "| deterministic | 1.071 | 1.500 | - | - | - | - |" in lines[3]
    assert len(lines) == 8


def test_a_run_is_scored_at_its_best_checkpoint(tmp_path: Path) -> None:
    lines = [{"step": 5, "loss": 0.1}, {"step": 10, "valid_loss": 0.4}, {"step": 20, "valid_loss": 0.3}]
    lines.append({"step": 30, "valid_loss": 0.3})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert benchmark.best_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_00000020"
