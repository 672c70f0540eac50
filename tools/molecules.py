"""Molecules for configs/siblings: `python tools/molecules.py prepare --data DIR` writes what they read.

DIR holds zinc20k.csv (ZINC, with logP, qed and SAS), delaney.csv (solubility, in its column logp), lipo.csv
(lipophilicity) and bbbp.csv (blood-brain barrier), each with a column `smiles`. The vocabulary is made of the molecules
of all four, of which it holds no more than which atoms and bonds there are. It needs RDKit (the extra `chem`).
"""

import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from llm.atomic import new_directory
from llm.cli import run_cli
from llm.errors import UserError
from llm.paths import PathText
from llm.tokenizer import SmilesTokenizer, smiles_vocabulary
from tools.scaffold_split import PARTS, Mode, read_rows, scaffold_groups, split_groups, table

PRETRAINING = "zinc20k"
LABELS = {"delaney": "logp", "lipo": "lipo", "bbbp": "p_np"}
"""The column that is predicted, by data set."""
SEEDS = range(5)
SPLITS: dict[str, tuple[Mode, int]] = {
    **{f"balanced-{seed}": ("balanced", seed) for seed in SEEDS}, "deterministic": ("deterministic", 0)
}  # fmt: skip
"""Mode and seed of the splits of each data set, by the names of their folders."""


def prepare(data: PathText, output: PathText = "runs/data/molecules") -> None:
    """Write vocab.txt, zinc20k/all.csv and DATASET/SPLIT/{train,valid,test}.csv into a new folder, SPLIT being
    balanced-0 to balanced-4 and deterministic (tools/scaffold_split.py).

    data: the folder with the four files
    output: the folder to make
    """
    if Path(output).exists():
        raise UserError(f"--output={output}: exists; remove it or name another folder")
    names = [PRETRAINING, *LABELS]
    for name in names:
        if not (file := Path(data) / f"{name}.csv").is_file():
            raise UserError(f"--data={data}: holds no {file.name}")
    rows = {name: read_rows(str(Path(data) / f"{name}.csv"), "smiles", "smiles", "--data") for name in names}
    for name, column in LABELS.items():
        if column not in rows[name][0]:
            raise UserError(f"--data={data}: {name}.csv has no column {column!r}")

    def texts() -> Iterator[tuple[str, str]]:
        for name in names:
            yield from ((f"{name}.csv, row {i}", str(row["smiles"])) for i, row in enumerate(rows[name], 1))

    tokenizer = SmilesTokenizer(smiles_vocabulary(texts()))
    with new_directory(Path(output)) as folder:
        (folder / "vocab.txt").write_bytes(tokenizer.serialized())
        (folder / PRETRAINING).mkdir()
        (folder / PRETRAINING / "all.csv").write_bytes(table(rows[PRETRAINING]))
        print(f"vocab.txt: {tokenizer.vocab_size} tokens")
        print(f"{PRETRAINING}: {len(rows[PRETRAINING]):,} molecules")
        for name in LABELS:
            groups, invalid = scaffold_groups([str(row["smiles"]) for row in rows[name]])
            print(f"{name}: {len(rows[name]):,} rows, {len(invalid)} of them no molecules, {len(groups):,} scaffolds")
            for split, (mode, seed) in SPLITS.items():
                (folder / name / split).mkdir(parents=True)
                for part, places in zip(PARTS, split_groups(groups, mode, seed), strict=True):
                    (folder / name / split / f"{part}.csv").write_bytes(table([rows[name][i] for i in places]))


if __name__ == "__main__":
    run_cli(prepare, prepare=prepare)
