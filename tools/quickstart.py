"""The two ends of `make pretrain`: text to shards before the training, and what the trained model is worth after it.

`prepare` writes the standard library's sources as JSONL, trains a tokenizer and shards both splits; what exists
already stays. `report` sets the run's held-out bits per byte beside gzip, xz and n-gram models on the same files, and
samples a text.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from llm.cli import run_cli
from llm.errors import UserError
from llm.paths import PathText
from llm.report.write import NAME

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_TOKENS = 300


def prepare(data: PathText = "runs/data/stdlib", vocab_size: int = 8192) -> None:
    """Make the corpus, the tokenizer and the shards of the quickstart configs.

    data: folder to fill
    vocab_size: tokens of the tokenizer
    """
    folder = Path(data)
    model = folder / "tokenizer.model"
    steps: list[tuple[Path, list[str]]] = [
        (folder / "text", ["tools/stdlib_corpus.py", f"--output={folder / 'text'}"]),
        (
            model,
            [
                "tools/train_tokenizer.py",
                f"--input={folder / 'text' / 'train.jsonl'}",
                f"--output={model}",
                f"--vocab_size={vocab_size}",
            ],
        ),
    ]
    for split in ("train", "valid"):
        text = folder / "text" / f"{split}.jsonl"
        steps.append(
            (
                folder / split,
                ["tools/shard.py", f"--input={text}", f"--output={folder / split}", f"--tokenizer={model}"],
            )
        )
    for made, command in steps:
        if made.exists():
            print(f"{made}: there already")
        elif _call(command).returncode != 0:
            raise UserError(f"{command[0]} failed; its message is above")


def report(
    run_dir: PathText = "runs/quickstart",
    data: PathText = "runs/data/stdlib",
    temperature: float = 0.6,
    seed: int = 1,
) -> None:
    """Print held-out bits per byte beside the baselines, and a sampled text.

    run_dir: run folder of a finished quickstart
    data: folder that `prepare` filled
    temperature: of the sample
    seed: of the sample
    """
    results = {"this run": _bits_per_byte(Path(run_dir)), **_baselines(Path(data))}
    print(f"\nheld-out bits per byte on {Path(data) / 'text' / 'valid.jsonl'} (less is better):")
    for name, value in sorted(results.items(), key=lambda item: item[1]):
        print(f"  {value:.4f}  {name}")
    sample = _sample(run_dir, temperature, seed)
    lines = [line for line in sample.splitlines() if line.strip()]
    accepted = sum(is_python_line(line) for line in lines)
    print(f"\na sample at temperature {temperature}:\n\n{sample}\n")
    print(f"tokenize accepts {accepted} of its {len(lines)} lines")
    first = "" if shutil.which("lattice") else f"after `. {os.path.relpath(sys.prefix)}/bin/activate`: "
    print(
        f"{first}curves: tensorboard --logdir {Path(run_dir) / 'tb'}; "
        f"more text: lattice generate --model {run_dir} --prompt 'class '; "
        f"next: lattice train --config quickstart_long, or your own text: lattice configs quickstart > mine.yaml"
    )
    page = Path(run_dir) / NAME
    print(f"report: {page}" if page.exists() else f"report: lattice report {run_dir}")


def is_python_line(line: str) -> bool:
    """Whether the standard `tokenize` reads the line alone; an open bracket or string may go on in the next line."""
    try:
        return all(
            token.type != tokenize.ERRORTOKEN
            for token in tokenize.generate_tokens(io.StringIO(line.strip() + "\n").readline)
        )
    except tokenize.TokenError as error:
        return "EOF in multi-line" in str(error)
    except SyntaxError:
        return False


def _bits_per_byte(run_dir: Path) -> float:
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{path}: no such file; --run_dir names a run folder")
    values = [json.loads(line).get("valid_bits_per_byte") for line in path.read_text().splitlines()]
    if not values or values[-1] is None:
        raise UserError(f"{path}: the run has not reached its last step; start it again to resume")
    return float(values[-1])


def _baselines(folder: Path) -> dict[str, float]:
    kept = folder / "baselines.json"
    if not kept.exists():
        text = folder / "text"
        command = [
            "tools/baselines.py",
            f"--train={text / 'train.jsonl'}",
            f"--valid={text / 'valid.jsonl'}",
            f"--output={kept}",
        ]
        done = _call(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise UserError(f"tools/baselines.py failed: {done.stderr.strip().splitlines()[-1:]}")
    return {str(name): float(value) for name, value in json.loads(kept.read_text()).items()}


def _sample(run_dir: str, temperature: float, seed: int) -> str:
    command = ["launch/generate.py", f"--model={run_dir}", "--prompt=def ", f"--max_new_tokens={SAMPLE_TOKENS}"]
    command += [f"--temperature={temperature}", f"--seed={seed}"]
    done = _call(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"launch/generate.py failed: {done.stderr.strip().splitlines()[-1:]}")
    return "def " + done.stdout.rstrip("\n")


def _call(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a script of ours, whose paths are those of the working directory."""
    return subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], **options)


def quickstart(*, data: PathText = "runs/data/stdlib", vocab_size: int = 8192) -> None:
    """Make the corpus, the tokenizer and the shards of the quickstart configs, as `prepare` does.

    data: folder to fill
    vocab_size: tokens of the tokenizer
    """
    prepare(data, vocab_size)  # data not by place: a misspelt `prepare` would be a folder


if __name__ == "__main__":
    run_cli(quickstart, prepare=prepare, report=report)
