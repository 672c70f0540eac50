"""Evaluations of a tiny model for tests: its folder, tasks as their users write them, and what came out."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from llm import LLM, ModelArgs
from llm.boxes import whole
from llm.checkpoint.run_folder import save_tokenizer
from llm.checkpoint.store import CheckpointStore
from llm.parallel.launch.world import World
from llm.tokenizer import ByteTokenizer
from tests.distributed.harness import TINY_MODEL

CONTEXT = 64


def tiny(seed: int) -> LLM:
    """A model with every kind of layer."""
    args = {**TINY_MODEL, "max_seq_len": CONTEXT, "vocab_size": ByteTokenizer().vocab_size, "init_std": 0.1}
    return LLM(ModelArgs.model_validate(args), seed=seed)


def write_model(folder: Path, seed: int = 0, change: Callable[[LLM], object] = lambda _: None) -> Path:
    """The tiny model, with every kind of layer, as a folder of ours; `change` is made to it first."""
    model = tiny(seed)
    change(model)
    model.save_pretrained(folder, tokenizer=ByteTokenizer())
    return folder


def write_checkpoint(run: Path, step: int) -> None:
    """A checkpoint of a run of the tiny model, drawn by its step."""
    model, tokenizer = tiny(seed=step), ByteTokenizer()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    owned = [
        (name, "master", whole(shapes[name]), 0, parameter.detach().flatten())
        for name, parameter in model.named_parameters()
    ]
    store = CheckpointStore(run / "checkpoints", World(0, 1, 0, torch.device("cpu")), keep=9, keep_best=False)
    meta = {"config": {"model": model.args.model_dump(mode="json")}, "tokenizer": tokenizer.fingerprint}
    store.save(step, shapes, owned, meta)
    save_tokenizer(tokenizer, run)


def write_tasks(folder: Path, documents: int = 24) -> dict[str, Path]:
    """Task files by the names of the tasks: choices, generations, and text to predict, of very different lengths."""
    draw = random.Random(11)

    def words(most: int) -> str:
        return " ".join("".join(draw.choices("abcde", k=draw.randint(1, 4))) for _ in range(draw.randint(1, most)))

    rows = {
        "choices": [
            {"query": words(6), "choices": [words(3) for _ in range(draw.randint(2, 4))], "gold": draw.randint(0, 1)}
            for _ in range(documents)
        ],
        "texts": [{"text": words(40)} for _ in range(documents // 4)],
        "questions": [{"question": words(5), "answer": words(2)} for _ in range(documents // 4)],
    }
    kinds: dict[str, dict[str, Any]] = {
        "choices": {
            "kind": "multiple_choice", "prompt": "{{ query }}", "choices": "{{ choices }}", "gold": "{{ gold }}",
            "metrics": ["acc", "acc_norm", "acc_bytes"],
        },
        "texts": {"kind": "perplexity"},
        "questions": {
            "kind": "generate", "prompt": "{{ question }}", "gold": "{{ answer }}", "max_new_tokens": 6,
            "metrics": ["exact_match", "f1"],
        },
    }  # fmt: skip
    files = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, section in kinds.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        files[name] = folder / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump({"name": name, "data": {"path": f"{name}.jsonl"}, **section}))
    return files


def words_of(model: Path, tasks: list[Path], output: Path, *more: str) -> list[str]:
    """The words of launch/evaluate.py."""
    return ["--model", str(model), "--tasks", ",".join(map(str, tasks)), "--output", str(output), *more]


def content(output: Path) -> dict[str, bytes]:
    """The bytes of what does not depend on ranks, batches and time, by file."""
    samples = sorted((output / "samples").glob("*.jsonl"))
    return {path.name: path.read_bytes() for path in (output / "results.json", *samples)}


def keys(output: Path) -> list[str]:
    """Of every whole line of the journals."""
    lines = [line for path in (output / "journal").glob("*.jsonl") for line in path.read_bytes().splitlines(True)]
    return [json.loads(line)["key"] for line in lines if line.endswith(b"\n")]
