"""Molecules written anew: the same molecule, the same text for a seed, a pass and a row, and one line without RDKit."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm.data.augment import augmentation_named, draw_of
from llm.data.labels import LabelOptions
from llm.errors import UserError
from llm.tokenizer import SmilesTokenizer, smiles_vocabulary
from tests.data.sample_helpers import asked_for, write_rows
from tests.data.test_labelled import opened

ENUMERATION = augmentation_named("enumerate_smiles", "augment")
MOLECULES = ["CC(=O)Oc1ccccc1C(=O)O", "CN1CCC[C@H]1c1cccnc1", "[Na+].[O-]C(=O)/C=C/Br"]
ONE = LabelOptions("regression", 1)


def written(seed: int, epoch: int, row: int, text: str) -> str:
    return ENUMERATION.written(text, draw_of(seed, epoch, row))


def rows_of(folder: Path, length: int, tokens: list[str]) -> Any:
    path = write_rows(folder / "a.jsonl", [{"text": text, "label": 1} for text in MOLECULES])
    asked = replace(asked_for(folder, length, labels=ONE, packing="none"), tokenizer=SmilesTokenizer(tokens))
    return opened(path, asked, augment="enumerate_smiles").rows


def test_another_text_of_the_same_molecule() -> None:
    chem = pytest.importorskip("rdkit.Chem")
    for row, text in enumerate(MOLECULES):
        found = {written(0, epoch, row, text) for epoch in range(20)}
        assert len(found) > 5  # of dozens of ways
        assert {chem.CanonSmiles(other) for other in found} == {chem.CanonSmiles(text)}


def test_a_seed_a_pass_and_a_row_decide_the_text_whatever_was_drawn_before() -> None:
    chem = pytest.importorskip("rdkit.Chem")
    keys = [(seed, epoch, row) for seed in range(2) for epoch in range(6) for row in range(3)]
    first = {key: written(*key, MOLECULES[0]) for key in keys}
    for key in reversed(keys):
        chem.MolToSmiles(chem.MolFromSmiles(MOLECULES[1]), doRandom=True)
        assert written(*key, MOLECULES[0]) == first[key]
    assert len(set(first.values())) > 10


@pytest.mark.parametrize("text", ["C1CC", "", "not a molecule"])
def test_what_is_no_molecule_is_left_as_it_is(text: str) -> None:
    pytest.importorskip("rdkit")
    assert written(0, 0, 0, text) == text


def test_rows_hold_molecules_written_anew_and_as_they_were_where_tokens_or_places_are_lacking(tmp_path: Path) -> None:
    chem = pytest.importorskip("rdkit.Chem")
    names = smiles_vocabulary(("a row", text) for text in [*MOLECULES, "C[C@@H](\\C)N234CC(C)(C)"])
    found: list[set[str]] = [set(), set(), set()]
    rows, tokenizer = rows_of(tmp_path / "all", 40, names), SmilesTokenizer(names)
    for epoch in range(8):
        for k in range(3):
            row = rows.read(k, epoch)
            assert np.array_equal(row.tokens, rows.read(k, epoch).tokens)
            found[rows.origin(k, epoch, 0).origin.row - 1].add(tokenizer.decode(row.tokens))
    for text, others in zip(MOLECULES, found, strict=True):
        assert len(others) > 2 and {chem.CanonSmiles(other) for other in others} == {chem.CanonSmiles(text)}
    few = smiles_vocabulary(("a row", text) for text in MOLECULES)  # none for @@
    rows, tokenizer = rows_of(tmp_path / "few", 40, few), SmilesTokenizer(few)
    nicotine = set()
    for epoch in range(12):
        for k in range(3):
            if rows.origin(k, epoch, 0).origin.row == 2:
                nicotine.add(tokenizer.decode(rows.read(k, epoch).tokens))
    assert len(nicotine) > 1 and MOLECULES[1] in nicotine and not any("@@" in text for text in nicotine)


def test_without_rdkit_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"augment=enumerate_smiles needs RDKit, .* `pip install rdkit`"):
        rows_of(tmp_path, 40, smiles_vocabulary(("a row", text) for text in MOLECULES))
