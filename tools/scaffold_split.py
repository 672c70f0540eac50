"""Split molecules by their Bemis-Murcko scaffolds: `python tools/scaffold_split.py --input bbbp.csv --output DIR`.

Molecules of one scaffold (the ring systems and what links them; Bemis & Murcko, J. Med. Chem. 1996, 39, 2887) are all
on one side, so that a model is asked about kinds of molecules that it has not seen. `balanced` is the split of Yang et
al. (chemprop, 2019), `deterministic` that of MoleculeNet (DeepChem, Wu et al. 2018). It needs RDKit (the extra `chem`).
"""

import csv
import io
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from llm.atomic import new_directory
from llm.cli import run_cli
from llm.data.listing import list_input
from llm.data.tables import columns_of, raw_rows
from llm.errors import UserError
from llm.paths import PathText

PARTS = ("train", "valid", "test")
SHARES = (0.8, 0.1, 0.1)
Mode = Literal["balanced", "deterministic"]
SHOWN = 3
"""Invalid rows that are named."""


class Groups(NamedTuple):
    """groups: places (from 0) of the molecules of each scaffold, in the order in which scaffolds first come up;
    invalid: places of texts that are no molecules.
    """

    groups: list[list[int]]
    invalid: list[int]


def split(
    input: PathText,
    output: PathText,
    column: str = "smiles",
    mode: Mode = "balanced",
    seed: int = 0,
) -> None:
    """Write train.csv, valid.csv and test.csv (8 to 1 to 1) into a new folder, with all columns of the input.

    input: a CSV, JSONL or Parquet file with one molecule a row
    output: the folder to make
    column: the column of SMILES
    mode: balanced (scaffolds with more molecules than half the test set in random order, then the others in random
        order) or deterministic (the largest first); each in turn goes to training while there is room, then to
        validation, then to the test
    seed: of balanced
    """
    if mode not in ("balanced", "deterministic"):
        raise UserError(f"--mode={mode}: is balanced or deterministic")
    if Path(output).exists():
        raise UserError(f"--output={output}: exists; remove it or name another folder")
    rows = read_rows(input, column)
    groups, invalid = scaffold_groups([str(row[column]) for row in rows])
    if invalid:
        named = ", ".join(f"row {i + 1} ({rows[i][column]!r})" for i in invalid[:SHOWN])
        more = ", ..." if len(invalid) > SHOWN else ""
        print(f"{input}: {len(invalid)} of {len(rows)} rows are no molecules and left out: {named}{more}")
    parts = split_groups(groups, mode, seed)
    for name, places in zip(PARTS, parts, strict=True):
        if not places:
            raise UserError(f"--input={input}: of {len(groups)} scaffolds none is left for {name}")
    with new_directory(Path(output)) as folder:
        for name, places in zip(PARTS, parts, strict=True):
            (folder / f"{name}.csv").write_bytes(table([rows[i] for i in places]))
    sizes = ", ".join(f"{name} {len(places):,}" for name, places in zip(PARTS, parts, strict=True))
    print(f"{output}: {sizes} of {len(rows):,} rows, {len(groups):,} scaffolds")


def read_rows(input: str, column: str, option: str = "--column", key: str = "--input") -> list[dict[str, Any]]:
    """All rows of the files given as `key`. UserError where there are none, or one lacks the column, which `option`
    chooses."""
    rows: list[dict[str, Any]] = []
    for file in list_input(input, key).files:
        where = f"{key}={file.path}"
        if not file.type.has_rows:
            raise UserError(f"{where}: is text; rows of molecules are .csv, .jsonl or .parquet")
        for row in raw_rows(file, where):
            if not isinstance(row.value, dict) or not isinstance(row.value.get(column), str):
                has = columns_of(row.value) if isinstance(row.value, dict) else "no columns"
                raise UserError(f"{where}, {row.place}: has no text in column {column!r} ({option}); it has {has}")
            if rows and row.value.keys() != rows[0].keys():
                raise UserError(f"{where}, {row.place}: has other columns than the first row")
            rows.append(row.value)
    if not rows:
        raise UserError(f"{key}={input}: has no rows")
    return rows


def scaffold_groups(smiles: Sequence[str]) -> Groups:
    """Molecules by scaffold, without chirality; all rows of one molecule, however written, are in one group. UserError
    without RDKit.
    """
    chem, scaffold_of = rdkit()
    groups: dict[str, list[int]] = {}
    scaffolds: dict[str, str] = {}
    invalid = []
    for place, text in enumerate(smiles):
        molecule = chem.MolFromSmiles(text)
        if molecule is None or not molecule.GetNumAtoms():
            invalid.append(place)
            continue
        name = chem.MolToSmiles(molecule)
        if name not in scaffolds:
            scaffolds[name] = scaffold_of(mol=molecule, includeChirality=False)
        groups.setdefault(scaffolds[name], []).append(place)
    return Groups(list(groups.values()), invalid)


def split_groups(groups: Sequence[list[int]], mode: Mode, seed: int) -> tuple[list[int], list[int], list[int]]:
    """Places of the molecules for training, validation and test, group by group."""
    total = sum(map(len, groups))
    if mode == "deterministic":
        ordered = sorted(groups, key=lambda group: (len(group), group[0]), reverse=True)
    else:
        draw = random.Random(seed)
        large = [group for group in groups if len(group) > SHARES[2] * total / 2]
        others = [group for group in groups if len(group) <= SHARES[2] * total / 2]
        draw.shuffle(large)
        draw.shuffle(others)
        ordered = [*large, *others]
    train: list[int] = []
    valid: list[int] = []
    test: list[int] = []
    for group in ordered:
        if len(train) + len(group) <= SHARES[0] * total:
            train += group
        elif len(valid) + len(group) <= SHARES[1] * total:
            valid += group
        else:
            test += group
    return train, valid, test


def table(rows: Sequence[dict[str, Any]]) -> bytes:
    """Rows as a CSV file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows(row.values() for row in rows)
    return text.getvalue().encode()


def rdkit() -> tuple[Any, Any]:
    """rdkit.Chem, silent about texts that are no molecules, and the function that gives a molecule's scaffold.
    UserError where RDKit is not installed."""
    try:
        from rdkit import Chem, RDLogger
        from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles
    except ImportError:
        raise UserError("molecules need RDKit, which is not installed: `make chem` makes .venv-chem with it") from None
    RDLogger.DisableLog("rdApp.*")
    return Chem, MurckoScaffoldSmiles


if __name__ == "__main__":
    run_cli(split)
