"""verify --with transformers: equal on every family and kind of tokenizer, and every difference is found."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm import LLM, ModelArgs
from llm.tokenizer import ByteTokenizer
from tests.foreign.folders import LLAMA, refused, save, tensors_of
from tests.foreign.models import CONFIGS, TABLE, reference
from tests.tokenizers.test_export import KINDS
from tools import convert

save_file = pytest.importorskip("safetensors.torch").save_file
EQUAL = "equal in transformers, within 1e-05 of the largest logit"
QUICK = ("llama", "mixtral", "gpt_neox", "bytes", "sentencepiece", "hf")
"""Families, by their first config, and kinds of tokenizers; the others are for longer runs."""
FIRST = {family: (family, next(iter(configs))) for family, configs in CONFIGS.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of ours with its tokenizer, and its export."""
    parent = tmp_path_factory.mktemp("models")
    made = {name: parent / name for name in ("ours", "theirs")}
    save(made["ours"])
    convert.main(["export", str(made["ours"]), str(made["theirs"])])
    return made


def verify(*words: Any) -> None:
    convert.main(["verify", *(str(word) for word in words), "--with=transformers"])


def differs(capsys: pytest.CaptureFixture[str], *words: Any) -> list[str]:
    """What a verification that ends with 1 says is different."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        verify(*words)
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert EQUAL not in said
    return [line.removeprefix("different: ") for line in said.splitlines() if line.startswith("different: ")]


@pytest.mark.parametrize(
    "entry",
    [
        entry if entry[0] in QUICK and entry == FIRST[entry[0]] else pytest.param(entry, marks=pytest.mark.full)
        for entry in TABLE
    ],
    ids=": ".join,
)
def test_every_family_is_equal_in_transformers(entry, tmp_path, capsys):
    model = reference(*entry)
    model.save_pretrained(tmp_path / "a")
    tolerance = 1e-4 if entry[0].startswith("gemma") else 1e-5  # as in test_families.py
    verify(tmp_path / "a", f"--tolerance={tolerance}", "--tokens=128")
    said = capsys.readouterr().out
    assert "equal in transformers" in said and "no tokenizer on either side" in said


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.full) for kind in KINDS]
)
def test_the_export_of_a_model_with_each_kind_of_tokenizer_is_equal(kind, tmp_path, capsys):
    tokenizer = KINDS[kind](tmp_path / "source")
    args = ModelArgs.model_validate(LLAMA | {"dim": 16, "vocab_size": tokenizer.vocab_size, "ffn_hidden": 16})
    LLM(args).save_pretrained(tmp_path / "a", tokenizer=tokenizer)
    if kind == "unigram":  # scores that tie fall either way, which an export says and this command must find
        assert differs(capsys, tmp_path / "a", "--tokens=64")[0].startswith("the ids of ")
        return
    (tmp_path / "text").write_text("a line\nfor i in range(10):\n\n")
    refusing = ("characters", "unigram of few characters", "smiles", "smiles of BERT's names")
    text = [] if kind in refusing else [f"--text={tmp_path / 'text'}"]
    verify(tmp_path / "a", "--tokens=64", *text)
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == EQUAL and "greedy texts              4 of 4 equal" in said
    assert ("1004 of 1004" if text else "1000 of 1000") in said


def test_a_model_is_compared_with_a_folder_that_is_given_too(folders, capsys):
    verify(folders["ours"], folders["theirs"])
    verify(folders["theirs"], folders["ours"])
    verify(folders["theirs"])
    assert capsys.readouterr().out.count(EQUAL) == 3


def edited(name: str, **keys: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))

    return change


def scaled(folder: Path) -> None:
    tensors = tensors_of(folder)
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.001
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def nan(folder: Path) -> None:
    tensors = tensors_of(folder)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def headless(folder: Path) -> None:
    tensors = tensors_of(folder)
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without_begin(folder: Path) -> None:
    edited("tokenizer.json", post_processor=None)(folder)
    edited("tokenizer_config.json", add_bos_token=False)(folder)


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights": (scaled, "logits: by "),
    "a weight that is not finite": (nan, "logits: by nan"),
    "eps of the norms": (edited("config.json", rms_norm_eps=1e-2), "logits: by "),
    "no head": (headless, "transformers finds 1 missing keys: lm_head.weight"),
    "no begin mark": (without_begin, "the ids of "),
    "no tokenizer": (
        lambda folder: [(folder / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")] and None,
        "the tokenizer: there is none there",
    ),
    "a tokenizer that is none": (
        lambda folder: (folder / "tokenizer.json").write_text("{}") and None, "AutoTokenizer cannot read the tokenizer"
    ),
    "another end": (edited("generation_config.json", eos_token_id=5), "what ends a generation: ids (257,) here, (5,)"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), FAULTS.values(), ids=FAULTS)
def test_what_is_different_is_found_and_ends_with_1(change, said, folders, tmp_path, capsys):
    folder = Path(shutil.copytree(folders["theirs"], tmp_path / "b"))
    change(folder)
    found = differs(capsys, folders["ours"], folder, "--tokens=64")
    assert any(line.startswith(said) for line in found), found


def test_settings_of_a_generation_are_left_out_and_said(folders, tmp_path, capsys):
    folder = Path(shutil.copytree(folders["theirs"], tmp_path / "b"))
    edited("generation_config.json", repetition_penalty=1.3, do_sample=True, temperature=0.7)(folder)
    verify(folders["ours"], folder, "--tokens=64")
    said = capsys.readouterr().out
    assert EQUAL in said and "note: generation_config.json sets repetition_penalty, which greedy text" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{ours}", "--with=vllm"], "--with=vllm: possible is transformers"),
        (["{ours}"], "missing --b: the other model; or --with=transformers"),
        (["{ours}", "{ours}", "--with=transformers"], "holds no config.json, so transformers cannot read it"),
        (["{ours}", "{none}", "--with=transformers"], "holds no config.json, so transformers cannot read it"),
        (["{none}", "--with=transformers"], "none"),
        (["{ours}", "--with=transformers", "--text={none}"], "none"),
    ],
)
def test_bad_input_is_one_line_and_ends_with_2(words, message, folders, tmp_path, capsys):
    places = {"ours": folders["ours"], "none": tmp_path / "none"}
    assert message in refused(capsys, "verify", *(word.format(**places) for word in words))


def test_without_the_library_one_line_says_what_to_install(folders, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    line = refused(capsys, "verify", folders["theirs"], "--with=transformers")
    assert "--with=transformers needs the package transformers: pip install transformers" in line


def test_the_bytes_of_the_example_end_where_the_test_of_ends_says():
    assert ByteTokenizer().end_ids == (257,)
