"""Pretrained against from scratch against n-grams, on molecules split by scaffolds (issue L).

    python tools/molecules.py prepare --data DIR                            # runs/data/molecules
    python launch/pretrain.py --nproc 2 --config configs/siblings/hyformer_zinc.yaml --run_dir runs/hyformer_zinc
    python tools/benchmarks/molecules.py baseline
    python tools/benchmarks/molecules.py finetune --pretrained runs/hyformer_zinc
    python tools/benchmarks/molecules.py report

The baseline is ridge regression or logistic regression on counts of character n-grams or their logarithms; the longest
n-gram, counts or logarithms, and the strength of the penalty are chosen on the validation part. A fine-tuned model is
the checkpoint that was best on the validation part. All are scored on the test part, which nothing was chosen by.
It needs RDKit and scikit-learn (`make chem`); `finetune` does one run after the other and goes on where it stopped.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

from llm.atomic import write_file
from llm.cli import run_cli
from llm.errors import UserError
from llm.paths import PathText
from tools.benchmarks.harness import RESULTS
from tools.benchmarks.machine import hardware, versions
from tools.molecules import LABELS, SEEDS, SPLITS
from tools.scaffold_split import PARTS, read_rows

ROOT = Path(__file__).resolve().parents[2]
DATA = "runs/data/molecules"
WORK = "runs/molecules"
LONGEST = (4, 5, 6)
STRENGTHS = {"regression": (0.1, 1.0, 10.0, 100.0, 1000.0), "classification": (0.01, 0.1, 1.0, 10.0, 100.0)}
"""Of the penalty of a ridge, and of its inverse in a logistic regression."""
CLASSIFICATION = ("bbbp",)
ASKED = {"delaney": (1.076, 1.071), "lipo": (0.784, 0.795), "bbbp": (0.946, 0.745)}
"""What issue L measured with such a baseline: the mean of the balanced splits, and the deterministic one."""
BEGINNINGS = ("scratch", "pretrained")

Scores = dict[str, dict[str, float]]
"""The score on the test part, by data set and split."""


def baseline(data: PathText = DATA, output: PathText = f"{WORK}/baseline.json") -> None:
    """Fit and score n-grams on all splits, and write the scores to a JSON file.

    data: what tools/molecules.py prepared
    output: the file
    """
    found: Scores = {}
    for name, split in splits(LABELS, SPLITS):
        found.setdefault(name, {})[split] = value = ngram_score(Path(data), name, split)
        print(f"{name} {split}: {value:.3f}", flush=True)
    write_file(Path(output), _json(found))


def finetune(
    pretrained: PathText | None = None,
    data: PathText = DATA,
    output: PathText = WORK,
    datasets: list[str] | None = None,
    seeds: int = len(SEEDS),
    nproc: int = 1,
) -> None:
    """Fine-tune from a pretrained model and from scratch, by configs/siblings/hyformer_DATASET.yaml, and score both.

    pretrained: run folder of the pretrained model; none: from scratch alone
    data: what tools/molecules.py prepared
    output: folder of the runs and of a file of scores for each
    datasets: some of delaney, lipo, bbbp; default: all
    seeds: how many of the balanced splits
    nproc: processes of a run
    """
    if pretrained is not None and not Path(pretrained).is_dir():
        raise UserError(f"--pretrained={pretrained}: no such run folder")
    for name in datasets or []:
        if name not in LABELS:
            raise UserError(f"--datasets: {name!r} is not one of {', '.join(LABELS)}")
    for name, split in splits(datasets or LABELS, [f"balanced-{seed}" for seed in range(seeds)] + ["deterministic"]):
        for beginning in BEGINNINGS if pretrained is not None else BEGINNINGS[:1]:
            folder = Path(output) / f"{name}-{split}-{beginning}"
            if not (folder / "score.json").exists():
                more = [f"--model.init_from={pretrained}"] if beginning == "pretrained" else []
                seconds = _train(name, Path(data) / name / split, folder, nproc, more)
                scored = {"score": model_score(folder, Path(data) / name / split, name), "seconds": seconds}
                write_file(folder / "score.json", _json(scored))
            scored = json.loads((folder / "score.json").read_text())
            print(f"{name} {split} {beginning}: {scored['score']:.3f} in {scored['seconds']:.0f} s", flush=True)


def report(scored: PathText = WORK, output: PathText | None = None, notes: str = "") -> None:
    """Write a dated table of all that was scored.

    scored: the folder with baseline.json and the fine-tuned runs
    output: the file; default: tools/benchmarks/results/DATE-molecules.md
    notes: what else is to be said of the measurement
    """
    read: dict[str, Scores] = {"n-grams": json.loads((Path(scored) / "baseline.json").read_text())}
    seconds = []
    for beginning in BEGINNINGS:
        for name, split in splits(LABELS, SPLITS):
            file = Path(scored) / f"{name}-{split}-{beginning}" / "score.json"
            if file.exists():
                content = json.loads(file.read_text())
                read.setdefault(beginning, {}).setdefault(name, {})[split] = content["score"]
                seconds.append(content["seconds"])
    day = date.today().isoformat()
    lines = [f"# Molecules split by scaffolds, {day}", "", hardware(), "", versions(), ""]
    lines += [notes, ""] if notes else []
    if seconds:
        lines += [f"Seconds of a fine-tuning run: {min(seconds):.0f} to {max(seconds):.0f}.", ""]
    lines += [
        "RMSE of delaney and lipo (lower is better), ROC-AUC of bbbp (higher is better), on the test part. Balanced:",
        "the mean of n splits with other seeds and its standard error; the difference is of the same splits.",
        "",
        *table(read),
    ]
    write_file(Path(output or RESULTS / f"{day}-molecules.md"), ("\n".join(lines) + "\n").encode())
    print("\n".join(table(read)))


def table(read: dict[str, Scores]) -> list[str]:
    """Lines of a Markdown table: for each data set what the issue measured, and the mean of each contestant."""
    columns = [name for name in ("n-grams", *BEGINNINGS) if name in read]
    head = ["data", "split", "issue's n-grams", *columns, "pretrained - scratch", "pretrained - n-grams"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for name in LABELS:
        for kind, asked in zip(("balanced", "deterministic"), ASKED[name], strict=True):
            cells = [_spread(_values(read[column], name, kind)) for column in columns]
            ours = _by_split(read.get("pretrained", {}), name, kind)
            for other in ("scratch", "n-grams"):
                theirs = _by_split(read.get(other, {}), name, kind)
                cells.append(_spread([ours[split] - theirs[split] for split in ours if split in theirs], "+.3f"))
            lines.append(f"| {' | '.join([name, kind, f'{asked:.3f}', *cells])} |")
    return lines


def splits(datasets: Iterable[str], names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(data set, name of a split): all sets of a split before the next split, so that what is cut short has some of
    all.
    """
    datasets = list(datasets)
    for split in names:
        yield from ((name, split) for name in datasets)


def ngram_score(data: Path, name: str, split: str) -> float:
    """The score of the n-grams that are best on the validation part."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge

    parts = [read_rows(str(data / name / split / f"{part}.csv"), "smiles", "smiles", "--data") for part in PARTS]
    texts = [[row["smiles"] for row in rows] for rows in parts]
    labels = [np.array([float(row[LABELS[name]]) for row in rows]) for rows in parts]
    kind = "classification" if name in CLASSIFICATION else "regression"
    best: tuple[float, float] | None = None
    for longest in LONGEST:
        vectorizer = CountVectorizer(analyzer="char", ngram_range=(1, longest), lowercase=False, dtype=np.float64)
        counts = [vectorizer.fit_transform(texts[0]), *map(vectorizer.transform, texts[1:])]
        for features in (counts, [matrix.log1p() for matrix in counts]):
            for strength in STRENGTHS[kind]:
                if kind == "regression":
                    model = Ridge(alpha=strength).fit(features[0], labels[0])
                    said = [model.predict(matrix) for matrix in features[1:]]
                else:
                    model = LogisticRegression(C=strength, max_iter=1000).fit(features[0], labels[0])
                    said = [model.decision_function(matrix) for matrix in features[1:]]
                valid, test = (score(name, labels[i + 1], said[i]) for i in range(2))
                better = best is None or (valid > best[0] if kind == "classification" else valid < best[0])
                best = (valid, test) if better else best
    assert best is not None
    return best[1]


def score(name: str, labels: np.ndarray, said: np.ndarray) -> float:
    """RMSE, or ROC-AUC of a classification, by scikit-learn."""
    from sklearn.metrics import roc_auc_score, root_mean_squared_error

    return float((roc_auc_score if name in CLASSIFICATION else root_mean_squared_error)(labels, said))


def model_score(run: Path, parts: Path, name: str) -> float:
    """The score of a run's best checkpoint on the test part."""
    from llm import LLM

    rows = read_rows(str(parts / "test.csv"), "smiles", "smiles", "--data")
    labels = np.array([float(row[LABELS[name]]) for row in rows])
    model = LLM.from_pretrained(best_checkpoint(run))
    said = model.predict([str(row["smiles"]) for row in rows]).double().numpy()
    if name in CLASSIFICATION:
        assert model.args.prediction_names is not None
        return score(name, labels, said[:, model.args.prediction_names.index("1")])
    return score(name, labels, said[:, 0])


def best_checkpoint(run: Path) -> Path:
    """The checkpoint of a run with the lowest loss on the validation part, which checkpoint.keep_best keeps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [(line["valid_loss"], line["step"]) for line in lines if "valid_loss" in line]
    return run / "checkpoints" / f"step_{min(measured)[1]:08d}"


def _train(name: str, parts: Path, folder: Path, nproc: int, more: list[str]) -> float:
    """Run a fine-tuning, its output beside it; returns its seconds."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "launch/pretrain.py", "--config", f"configs/siblings/hyformer_{name}.yaml"]
    command += ["--run_dir", str(folder), f"--data.train.path={parts / 'train.csv'}"]
    command += [f"--data.valid.path={parts / 'valid.csv'}", *more, *(["--nproc", str(nproc)] if nproc > 1 else [])]
    began = time.perf_counter()
    with folder.with_name(f"{folder.name}.log").open("wb") as log:
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise UserError(f"{' '.join(command)}: ended with {code}; see {folder}.log")
    return time.perf_counter() - began


def _by_split(scores: Scores, name: str, kind: str) -> dict[str, float]:
    return {split: value for split, value in scores.get(name, {}).items() if SPLITS[split][0] == kind}


def _values(scores: Scores, name: str, kind: str) -> list[float]:
    return list(_by_split(scores, name, kind).values())


def _spread(values: Sequence[float], form: str = ".3f") -> str:
    if len(values) < 2:
        return f"{values[0]:{form}}" if values else "-"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):{form}} ± {error:.3f} (n={len(values)})"


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


if __name__ == "__main__":
    run_cli(report, baseline=baseline, finetune=finetune, report=report)
