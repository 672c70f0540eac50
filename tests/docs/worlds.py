"""What a reader of a page has at hand when he comes to its code: a folder with models, and names from the text."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from llm import LLM, ModelArgs
from llm.tokenizer import ByteTokenizer
from tests.distributed.evaluations import write_model
from tests.shared import ROOT

SMALL: dict[str, Any] = {"dim": 16, "n_layers": 1, "n_heads": 2, "ffn_hidden": 24, "max_seq_len": 64}


def stand_in(folder: Path, monkeypatch: Any) -> None:
    """Work in an empty folder, in which what pages name by path is found: configs, the sources of docs, a model."""
    for name in ("configs", "docs", "launch", "tools", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
    write_model(folder / "runs" / "my")
    monkeypatch.chdir(folder)
    torch.manual_seed(0)


def names_of(page: str) -> dict[str, Any]:
    """Names that a page's code has from its text; the models that it reads are written into the working directory."""
    return WORLDS[page]() if page in WORLDS else {}


def _save(path: str, **keys: Any) -> LLM:
    """A small model of ours at a path."""
    keys = {"vocab_size": ByteTokenizer().vocab_size, **SMALL, **keys}
    model = LLM(ModelArgs.model_validate(keys))
    tokenizer = None if "input_dim" in keys else ByteTokenizer()
    model.save_pretrained(path, tokenizer=tokenizer)
    return model


def _evaluation_tasks() -> dict[str, Any]:
    _save("runs/delaney", n_prediction=1, prediction="regression", prediction_names=("logp",))
    return {}


def _generation() -> dict[str, Any]:
    tokenizer = ByteTokenizer()
    sources = {"first_ids": tokenizer.source_ids("ab"), "second_ids": tokenizer.source_ids("c")}
    return {"tokenizer": tokenizer, **sources, **_prompts()}


def _prompts() -> dict[str, Any]:
    return {"prompt_ids": torch.tensor([[1, 2], [3, 4], [5, 6]]), "next_ids": torch.tensor([[7], [8], [9]])}


def _seq2seq() -> dict[str, Any]:
    _save("runs/reverse", encoder_layers=1)
    return {}


def _values() -> dict[str, Any]:
    _save("runs/series", input_dim=2, output_dim=2)
    return {"features": torch.randn(2, 5, 2)}


WORLDS: dict[str, Callable[[], dict[str, Any]]] = {
    "docs/evaluation_tasks.md": _evaluation_tasks,
    "docs/generation.md": _generation,
    "docs/seq2seq.md": _seq2seq,
    "docs/values.md": _values,
}


@cache
def encoder_decoder() -> LLM:
    """For blocks that are about one, on a page whose other models are none."""
    return LLM(ModelArgs.model_validate({"vocab_size": ByteTokenizer().vocab_size, "encoder_layers": 1, **SMALL}))


def write_jsonl(path: str, rows: list[dict[str, Any]]) -> None:
    """A file of rows in the working directory."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
