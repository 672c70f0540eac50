"""Outputs of evaluations as they are written, for tests of what reads them."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np


def choice_samples(seed: int, n: int = 40, skill: float = 0.5) -> list[dict[str, Any]]:
    """Documents of a multiple-choice task, which a model of some skill has answered."""
    questions, draw = random.Random(1), random.Random(seed)
    samples = []
    for i in range(n):
        gold = questions.randrange(3)
        question = " ".join(questions.choices(["heat", "stone", "the <b>sun</b>", "water & ice", "slowly"], k=9))
        logprobs = [-questions.uniform(4, 9) for _ in range(3)]
        if draw.random() < skill:
            logprobs[gold] = max(logprobs) + draw.uniform(0.1, 3)
        right = float(int(np.argmax(logprobs)) == gold)
        responses = [
            {"text": f"choice {j}", "logprob": value, "greedy": False, "tokens": 3} for j, value in enumerate(logprobs)
        ]
        doc = {"question": question, "gold": gold, "row": i}
        samples.append(
            {"doc": doc, "prompt": f"Question: {question}\nAnswer:", "gold": gold, "responses": responses,
             "metrics": {"acc": right, "acc_norm": right}}
        )  # fmt: skip
    return samples


def answer_samples(seed: int, n: int = 30) -> list[dict[str, Any]]:
    """Documents of a generation task."""
    draw = random.Random(seed)
    samples = []
    for i in range(n):
        f1 = round(draw.random(), 3)
        response = {"text": f"The answer is {i}.\n" * draw.randint(1, 3), "tokens": draw.randint(3, 60)}
        samples.append(
            {"doc": {"row": i}, "prompt": "Q: " + "how many? " * draw.choice([3, 200]), "gold": f"#### {i}",
             "responses": [response], "metrics": {"f1": f1, "exact": float(f1 > 0.8)}}
        )  # fmt: skip
    return samples


def write_output(folder: Path, tasks: dict[str, list[dict[str, Any]]], **facts: Any) -> Path:
    """results.json, samples and run.json of an evaluation; facts: of every task."""
    results = {}
    for task, samples in tasks.items():
        file = folder / "samples" / f"{task}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        result: dict[str, Any] = {"kind": "test", "version": 1, "n": len(samples), "truncated": 0, **facts}
        for name in samples[0]["metrics"]:
            values = np.array([sample["metrics"][name] for sample in samples])
            result |= {name: values.mean(), f"{name}_stderr": values.std(ddof=1) / len(values) ** 0.5}
        results[task] = result
    model = {"digest": "0f" * 16, "dtype": "float32", "tokenizer": "ab" * 16, "parameters": 260032, "context": 512}
    (folder / "results.json").write_text(json.dumps({"model": model, "results": results}))
    run = {"model": str(folder), "ranks": 2, "device": "cpu", "hardware": {"processor": "a CPU"}, "time": "2026-11-29"}
    (folder / "run.json").write_text(json.dumps(run))
    return folder
