"""A kind of data of your own: proteins in a FASTA file, a row each.

    .venv/bin/python examples/own_data_source.py [FOLDER]

A kind says how the files of a source become rows; the global order, mixtures with other kinds, resuming, held-out rows
and layouts come by themselves. Its name stands under `kind` at a source. docs/extend/intervals.py makes its rows
without any file of text; SampleKind (llm/data/sample_kind.py) is for rows of JSON or tables that are to be packed.
After the run's own lines it prints (losses differ a little between machines):

    loss 5.57 -> 2.30
    MKTAY goes on IAKQRQISFVK
"""

import hashlib
import random
import sys
from pathlib import Path

import numpy as np

from llm import LLM
from llm.data.kinds import Asked, Kind, Opened, register
from llm.data.rows import Origin, Row, RowTargets, TokenOrigin
from llm.data.sources import SourceFiles
from llm.errors import UserError
from llm.runs import metrics, train
from llm.tokenizer import Tokenizer


class FastaRows:
    """A row a sequence, cut behind seq_len letters: each letter from those before it."""

    targets: tuple[str, ...] = ("lm",)
    values: tuple[str, ...] = ()

    def __init__(self, file: Path, tokenizer: Tokenizer, seq_len: int) -> None:
        self.file, self.tokenizer, self.seq_len = str(file), tokenizer, seq_len
        text = file.read_text()
        self.fingerprint = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self.found: list[tuple[int, str]] = []  # line of its name, from 1, and letters
        for number, line in enumerate(text.splitlines(), 1):
            if line.startswith(">"):
                self.found.append((number, ""))
            elif line and not self.found:
                raise UserError(f"{file}, line {number}: letters before the first line that begins with >")
            elif line:
                self.found[-1] = (self.found[-1][0], self.found[-1][1] + line)
        empty = [number for number, letters in self.found if not letters]
        if empty:
            raise UserError(f"{file}, line {empty[0]}: a name without letters")
        self.n_rows = len(self.found)

    def read(self, k: int, epoch: int) -> Row:
        ids = np.asarray(self.tokenizer.encode(self.found[k][1]), dtype=np.int64)[: self.seq_len]
        inputs = np.concatenate([[self.tokenizer.bos_id], ids[:-1]])
        return Row(inputs, {"lm": RowTargets(ids)}, np.zeros(1, dtype=np.int64))

    def origin(self, k: int, epoch: int, position: int) -> TokenOrigin:
        line, letters = self.found[k]
        return TokenOrigin(Origin(self.file, line), k, position, len(letters))

    def described(self) -> str:
        return f"({self.file}) has {self.n_rows} sequences"


class Fasta(Kind):
    name = "fasta"
    packings = ("none",)

    def open(self, files: SourceFiles, asked: Asked) -> Opened:
        rows = FastaRows(Path(files.spec.path), asked.tokenizer, asked.seq_len)
        return Opened(rows, given=files.given, notes=(f"{files.given}: {rows.n_rows} sequences",))


register(Fasta())


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file, draw = folder / "proteins.fasta", random.Random(0)
    tails = ["".join(draw.choices("ACDEFGHIKLMNPQRSTVWY", k=20)) for _ in range(200)]
    file.write_text("".join(f">protein {i}\nMKTAYIAKQRQISFVK\n{tail}\n" for i, tail in enumerate(tails)))
    config = {
        "model": {"dim": 64, "n_layers": 2, "n_heads": 4},
        "tokenizer": {"kind": "bytes"},
        "data": {"train": [{"path": str(file), "kind": "fasta"}], "cache_dir": str(folder / "cache")},
        "optim": {"lr": 3e-3},
        "train": {"steps": 40, "seq_len": 36, "global_batch_size": 8, "micro_batch_size": 8, "precision": "fp32"},
        "log": {"interval": 20, "tensorboard": False, "report": False},
    }
    run = train(config, folder / "run")
    losses = [row["loss"] for row in metrics(run)]
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    print(f"MKTAY goes on {LLM.from_pretrained(run).generate('MKTAY', max_new_tokens=11)}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "runs/examples/fasta"))
