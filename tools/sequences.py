"""Sequences of letters to reverse or to sort, by an encoder-decoder: pairs to train on, and what a trained model makes
of others.

`python tools/sequences.py run --task reverse` (or `sort`) does all of it: it writes the pairs that
configs/pretrain/reverse.yaml (or sort.yaml) reads, trains, lets the model answer greedily, and prints which share of
the answers is exact, by length. `prepare` and `score` are its two ends by themselves.

Sequences have 8 to 20 of 32 letters, drawn at random, all lengths alike. A fiftieth is held out by the hash of the
sequence, so none of these is trained on; sequences of 21 to 24 letters are longer than any trained one.
"""

import json
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from llm.atomic import new_directory
from llm.cli import run_cli
from llm.data.split import Split, text_digest
from llm.errors import UserError
from llm.paths import PathText
from llm.tokenizer import CharacterTokenizer

ROOT = Path(__file__).resolve().parents[1]
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdef"
LENGTHS = range(8, 21)
LONGER = range(21, 25)
OF_EACH_LONGER = 50
HELD_OUT = 0.02
TASKS: dict[str, Callable[[str], str]] = {
    "reverse": lambda letters: letters[::-1],
    "sort": lambda letters: "".join(sorted(letters)),
}
Name = Literal["reverse", "sort"]


def prepare(task: Name, output: PathText = "", sequences: int = 100_000) -> None:
    """Write train.jsonl, valid.jsonl and longer.jsonl, rows {prompt, target}, and tokenizer.json into a new folder.

    task: reverse or sort
    output: the folder; default: runs/data/sequences/TASK; one that is there already is left as it is
    sequences: how many are drawn, the held-out ones among them
    """
    folder = Path(output or f"runs/data/sequences/{task}")
    if folder.exists():
        print(f"{folder}: there already")
        return
    drawn, side = random.Random(0), Split(HELD_OUT, "valid")
    held_out: dict[bool, list[str]] = {False: [], True: []}
    for letters in _distinct(drawn, sequences):
        held_out[side.keeps(text_digest(letters.encode()))].append(letters)
    longer = [_letters(drawn, length) for length in LONGER for _ in range(OF_EACH_LONGER)]
    parts = {"train": held_out[False], "valid": held_out[True], "longer": longer}
    if not held_out[True]:
        raise UserError(f"--sequences={sequences}: too few to hold some out")
    with new_directory(folder) as temporary:
        (temporary / "tokenizer.json").write_bytes(CharacterTokenizer(ALPHABET).serialized())
        for name, rows in parts.items():
            lines = (json.dumps({"prompt": letters, "target": TASKS[task](letters)}) for letters in rows)
            (temporary / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    print(f"{folder}: {', '.join(f'{len(rows):,} of {name}.jsonl' for name, rows in parts.items())}")


def score(run_dir: PathText, data: PathText) -> float:
    """Let a trained model answer the held-out sequences and the longer ones greedily, print the share of exact answers
    by length, and give that of the held-out ones.

    run_dir: the run
    data: folder that `prepare` filled
    """
    shares = []
    for part, said in (("valid", "held out"), ("longer", "longer than any that was trained on")):
        questions, answers = Path(data) / f"{part}.jsonl", Path(run_dir) / f"answers_{part}.jsonl"
        answers.unlink(missing_ok=True)
        words = [f"--model={run_dir}", f"--prompts={questions}", f"--output={answers}", "--max_new_tokens=32"]
        _call("launch/generate.py", *words)
        exact: dict[int, list[bool]] = defaultdict(list)
        for row in _rows(answers):
            exact[len(row["prompt"])].append(row["completion"] == row["target"])
        found = [hit for hits in exact.values() for hit in hits]
        shares.append(sum(found) / len(found))
        print(f"{said}: {shares[-1]:.2%} of {len(found):,} answers are exact")
        for length, hits in sorted(exact.items()):
            print(f"  {length} letters: {sum(hits) / len(hits):.2%} of {len(hits)}")
    return shares[0]


def run(task: Name, run_dir: PathText = "", nproc: int = 1) -> None:
    """Prepare, train and score.

    task: reverse or sort
    run_dir: the run folder; default: runs/TASK; the same command goes on with a run that stopped
    nproc: processes
    """
    folder = run_dir or f"runs/{task}"
    prepare(task)
    config = f"configs/pretrain/{task}.yaml"
    _call("launch/pretrain.py", f"--config={config}", f"--run_dir={folder}", f"--nproc={nproc}")
    score(folder, f"runs/data/sequences/{task}")


def _distinct(drawn: random.Random, count: int) -> Iterator[str]:
    """Sequences of all lengths alike, no two of them equal."""
    seen: set[str] = set()
    while len(seen) < count:
        letters = _letters(drawn, drawn.choice(LENGTHS))
        if letters not in seen:
            seen.add(letters)
            yield letters


def _letters(drawn: random.Random, length: int) -> str:
    return "".join(drawn.choices(ALPHABET, k=length))


def _rows(file: Path) -> Iterator[dict[str, str]]:
    for line in file.read_text().splitlines():
        yield json.loads(line)


def _call(script: str, *words: str) -> None:
    if subprocess.run([sys.executable, str(ROOT / script), *words]).returncode != 0:
        raise UserError(f"{script} failed; its message is above")


if __name__ == "__main__":
    run_cli(prepare, prepare=prepare, score=score, run=run)
