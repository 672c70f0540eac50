"""Score generated molecules: `python tools/score_molecules.py --input samples.jsonl --train zinc.csv`.

Validity, uniqueness and novelty as MOSES and GuacaMol have them: the share of texts that RDKit reads as a molecule, the
share of those molecules that are different ones, and the share of the different ones that are not in the training data.
Molecules are compared by their canonical SMILES. It needs RDKit (the extra `chem`).
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from llm.atomic import write_file
from llm.cli import run_cli
from llm.paths import PathText, refuse_existing
from tools.scaffold_split import rdkit, read_rows


@dataclass(frozen=True)
class Scores:
    """Counts; unique and novel are of valid molecules, each counted once."""

    generated: int
    valid: int
    unique: int
    novel: int

    def lines(self) -> list[str]:
        """What a user reads; a share of nothing is not said."""
        of = (("valid", self.generated), ("unique", self.valid), ("novel", self.unique))
        counts = asdict(self)
        return [f"{name}: {counts[name] / total:.1%} ({counts[name]:,} of {total:,})" for name, total in of if total]


def score(
    input: PathText,
    train: PathText,
    column: str = "completion",
    train_column: str = "smiles",
    output: PathText | None = None,
) -> None:
    """Print which share of generated molecules is valid, unique and novel.

    input: what launch/generate.py wrote with --prompts and --output, or another file of rows
    train: the training data, with a molecule a row
    column: of the input's SMILES
    train_column: of the training data's SMILES
    output: JSON file to write the counts to as well
    """
    if output is not None:
        refuse_existing(output, "--output", "remove it or name another file")
    generated = [str(row[column]) for row in read_rows(input, column, "--column", "--input")]
    known = [str(row[train_column]) for row in read_rows(train, train_column, "--train_column", "--train")]
    found = scores(generated, known)
    print("\n".join(found.lines()))
    if output is not None:
        write_file(Path(output), (json.dumps(asdict(found), indent=2) + "\n").encode())


def scores(generated: Sequence[str], known: Sequence[str]) -> Scores:
    """Scores of texts against the molecules of the training data; UserError without RDKit."""
    valid = [name for text in generated if (name := canonical(text)) is not None]
    seen = {name for text in known if (name := canonical(text)) is not None}
    return Scores(len(generated), len(valid), len(set(valid)), len(set(valid) - seen))


def canonical(text: str) -> str | None:
    """The canonical SMILES of a text; None where it is no molecule."""
    chem, _ = rdkit()
    molecule = chem.MolFromSmiles(text)
    return None if molecule is None or not molecule.GetNumAtoms() else str(chem.MolToSmiles(molecule))


if __name__ == "__main__":
    run_cli(score)
