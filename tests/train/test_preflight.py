"""What a run refuses before its ranks meet, its dry run refuses with the same line, and neither writes anything."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import pretrain
from llm import LLM, ModelArgs
from llm.errors import UserError
from tests.distributed.harness import TINY_MODEL, tiny_config, write_config, write_text


def refused(monkeypatch: pytest.MonkeyPatch, config: Path, *flags: str) -> str:
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--config", str(config), *flags])
    with pytest.raises(UserError) as error:
        pretrain.main()
    assert not torch.distributed.is_initialized()
    return str(error.value)


def no_text(folder: Path) -> dict[str, Any]:
    (folder / "train.jsonl").write_text("")
    return {}


def empty_documents(folder: Path) -> dict[str, Any]:
    (folder / "valid.jsonl").write_text('{"text": ""}\n' * 3)
    return {"data": {"valid": [str(folder / "valid.jsonl")]}}


def one_document_of_which_half_is_held_out(folder: Path) -> dict[str, Any]:
    (folder / "one.txt").write_text("words " * 500)
    return {"data": {"train": str(folder / "one.txt"), "valid": 0.5}}


def other_field(folder: Path) -> dict[str, Any]:
    (folder / "train.jsonl").write_text(json.dumps({"content": "a"}) + "\n")
    return {}


def few_letters(folder: Path) -> dict[str, Any]:
    (folder / "letters.json").write_text(json.dumps({"kind": "characters", "characters": "abcdefgh "}))
    tokenizer = {"kind": "characters", "path": str(folder / "letters.json")}
    return {"tokenizer": tokenizer, "eval": {"prompts": ["xyz"]}}


def other_weights(folder: Path) -> dict[str, Any]:
    args = ModelArgs.model_validate({**TINY_MODEL, "vocab_size": 258, "ffn_hidden": 64})
    LLM(args).save_pretrained(folder / "weights")
    return {"model": {"init_from": str(folder / "weights")}}


def file_in_the_way(folder: Path) -> dict[str, Any]:
    (folder / "file").write_text("a file")
    return {"data": {"cache_dir": str(folder / "file" / "cache")}}


CASES: dict[str, tuple[Callable[[Path], dict[str, Any]] | dict[str, Any], str]] = {
    "no training text": ({"data": {"train": "/no/such.txt"}}, "data.train=/no/such.txt: no such file"),
    "no held-out text": ({"data": {"valid": "/no/such.txt"}}, "data.valid=/no/such.txt: no such file"),
    "no tokenizer": ({"tokenizer": {"kind": "characters", "path": "/no/t.json"}}, "tokenizer.path=/no/t.json"),
    "small vocabulary": ({"model": {"vocab_size": 100}}, "model.vocab_size=100 is below the tokenizer's"),
    "no weights": ({"model": {"init_from": "/no/weights"}}, "/no/weights"),
    "no checkpoint": ({"checkpoint": {"resume": "/no/run"}}, "/no/run: no such file or folder"),
    "an empty file": (no_text, "has no documents"),
    "held-out documents without text": (
        empty_documents,
        "valid.jsonl: all its 3 documents are empty; text was read from --data.valid.text_field=text",
    ),
    "a share of one document": (
        one_document_of_which_half_is_held_out,
        "data.valid=0.5: of the documents of data.train=",
    ),
    "another field": (other_field, "no text in field 'text'"),
    "other letters": (few_letters, "eval.prompts: "),
    "a prompt as long as the context": (
        {"eval": {"sample_interval": 5, "prompts": ["a", "b" * 63]}},
        "eval.prompts.1 has 64 tokens, and the context of 64 (model.max_seq_len)",
    ),
    "what no validation says": (
        {"eval": {"best": "valid_roc_auc"}},
        "eval.best=valid_roc_auc: a validation of this run says valid_loss, valid_ppl, valid_bits_per_byte, valid_t",
    ),
    "other weights": (other_weights, "has shape (64, 32) there, (48, 32) here"),
    "a file for a folder": (file_in_the_way, "data.cache_dir="),
}


@pytest.mark.parametrize("case", CASES)
def test_the_dry_run_refuses_what_the_run_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    write_text(tmp_path, documents=4)
    sections, expected = CASES[case]
    made = sections(tmp_path) if callable(sections) else sections
    config = write_config(tmp_path / "c.yaml", tiny_config(tmp_path, **made))
    before = sorted(tmp_path.rglob("*"))
    lines = {refused(monkeypatch, config, f"--run_dir={tmp_path / 'run'}", *flags) for flags in ([], ["--dry_run"])}
    assert len(lines) == 1 and expected in lines.pop()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("has_gpu", "expected"), [(False, "needs a CUDA device, and this one is cpu"), (True, "cannot be imported")]
)
def test_a_kernel_that_is_not_here_is_refused_by_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_gpu: bool, expected: str
) -> None:
    write_text(tmp_path)
    model = {"layer_pattern": "ssm", "ssm": {"kernel": "mamba_ssm", "head_width": 8}, "moe": None}
    config = write_config(tmp_path / "c.yaml", tiny_config(tmp_path, model=model))
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    lines = {refused(monkeypatch, config, f"--run_dir={tmp_path / 'run'}", *flags) for flags in ([], ["--dry_run"])}
    assert len(lines) == 1 and expected in lines.pop()
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_is_a_file_is_refused_by_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path, documents=4)
    (tmp_path / "file").write_text("a file")
    config = write_config(tmp_path / "c.yaml", tiny_config(tmp_path))
    lines = {refused(monkeypatch, config, f"--run_dir={tmp_path / 'file'}", *flags) for flags in ([], ["--dry_run"])}
    assert lines == {f"{tmp_path / 'file'}: Not a directory; the run folder is to be there"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path, documents=4)
    (tmp_path / "closed").mkdir(mode=0o500)
    config = write_config(tmp_path / "c.yaml", tiny_config(tmp_path))
    assert "Permission denied" in refused(monkeypatch, config, f"--run_dir={tmp_path / 'closed' / 'run'}", "--dry_run")


def test_a_dry_run_of_the_config_alone_looks_at_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_config(tmp_path))
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--config", str(config), "--dry_run=config"])
    pretrain.main()
    assert "# grid of 1 rank" in capsys.readouterr().out
    assert "no such file" in refused(monkeypatch, config, "--dry_run")
