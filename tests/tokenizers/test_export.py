"""AutoTokenizer makes of an export the ids of the model's own tokenizer, of every kind, and the same texts of them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import transformers

from llm import LLM, ModelArgs
from llm.pretrained import tokenizer_of
from llm.tokenizer import (
    ByteTokenizer,
    CharacterTokenizer,
    SentencePieceTokenizer,
    SmilesTokenizer,
    Tokenizer,
    smiles_vocabulary,
    train_sentencepiece,
)
from llm.tokenizers.check import check_texts, compare
from llm.tokenizers.folder import foreign_tokenizer
from llm.tokenizers.tiktoken import TiktokenTokenizer
from tests.shared import needs_shared
from tests.tokenizers.helpers import CODE, RANKS, from_shared, made_hf, opened, sentencepiece_model
from tests.tokenizers.test_folder import FAST, LLAMA, NAMES, QWEN, changed, decoder_entries, write
from tools import convert

SMILES = ("CC(=O)Oc1ccccc1C(=O)O", "[Cl-].C[N+](C)(C)C/C=C/Br", "[unused1]", "C%12CC%12", "CZC", "[PAD]", "<bos>CC")
MOLECULES = smiles_vocabulary([("a row", text) for text in SMILES[:2]])
TEXTS = list(check_texts(1000, ("<|endoftext|>", "<|eot_id|>", "<|im_end|>", "<s>")))


def folder_tokenizer(folder: Path, kind: str) -> Tokenizer:
    files: dict[str, Any] = {
        "qwen": {"config": {"model_type": "qwen2"}, "tokenizer_config": QWEN, "tokenizer": changed()},
        "added tokens": {
            "config": {"model_type": "llama", "vocab_size": 402},
            "tokenizer_config": LLAMA
            | {"added_tokens_decoder": decoder_entries(400, NAMES[1:]), "eos_token": "<|im_end|>"},
            "tokenizer": sentencepiece_model(400, prefix=True),
        },
        "no begin mark said": {
            "config": {"model_type": "llama", "vocab_size": 400},
            "tokenizer_config": {"tokenizer_class": "LlamaTokenizer"},
            "tokenizer": sentencepiece_model(400, prefix=True),
        },
    }
    return foreign_tokenizer(write(folder, **files[kind]))[0]


KINDS = {
    "bytes": lambda _: ByteTokenizer(),
    "characters": lambda _: CharacterTokenizer("".join(sorted(set("".join(TEXTS[:200]) + CODE[0])))),
    "smiles": lambda _: SmilesTokenizer(MOLECULES),
    "smiles of BERT's names": lambda _: SmilesTokenizer(["[PAD]", "[unused1]", "[UNK]", "[CLS]", *MOLECULES[5:]]),
    "smiles with unknowns": lambda _: SmilesTokenizer(MOLECULES, lossy=True),
    "sentencepiece": lambda _: SentencePieceTokenizer(train_sentencepiece(CODE[:1], 500)),
    "sentencepiece with lines": lambda _: SentencePieceTokenizer(train_sentencepiece(CODE[:1], 500, boundaries="none")),
    "unigram": lambda _: SentencePieceTokenizer(train_sentencepiece(CODE[:1], 400, model_type="unigram")),
    "unigram of few characters": lambda _: SentencePieceTokenizer(
        train_sentencepiece(["abc ab cab " * 30], 264, model_type="unigram")
    ),
    "sentencepiece with a space before": lambda _: SentencePieceTokenizer(sentencepiece_model(400, prefix=True)),
    "tiktoken": lambda _: TiktokenTokenizer(RANKS, "llama3"),
    "tiktoken of llama4": lambda _: TiktokenTokenizer(RANKS, "llama4"),
    "hf": lambda _: opened(made_hf()),
    "hf with two marks": lambda _: opened(made_hf(("<s>", "</s>", "<|eot_id|>"))),
    "qwen": lambda folder: folder_tokenizer(folder, "qwen"),
    "added tokens": lambda folder: folder_tokenizer(folder, "added tokens"),
    "no begin mark said": lambda folder: folder_tokenizer(folder, "no begin mark said"),
}  # fmt: skip


def exported(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    sizes = dict(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, ffn_hidden=8)
    args = ModelArgs(**sizes, vocab_size=tokenizer.vocab_size, rope_interleaved=False)
    LLM(args).save_pretrained(tmp_path / "ours", tokenizer=tokenizer)
    convert.main(["export", str(tmp_path / "ours"), str(tmp_path / "theirs")])
    return tmp_path / "theirs"


@pytest.mark.parametrize("kind", KINDS)
def test_autotokenizer_gives_the_ids_of_the_run(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = KINDS[kind](tmp_path / "source")
    folder = exported(ours, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    differences = compare(ours, theirs, [*TEXTS, *SMILES])
    # SentencePiece adds the scores of a unigram model in float32, the library in float64, so ties fall either way
    ties = 10 if kind == "unigram" else 0
    assert len(differences) <= ties, f"{len(differences)}\n" + "\n".join(map(str, differences[:5]))
    said = capsys.readouterr().out
    assert ("unigram model" in said) == ("unigram" in kind)
    assert kind == "unigram" or "transformers will read" not in said
    assert theirs.bos_token_id in (ours.bos_id, None) and theirs.eos_token_id == ours.eos_id
    ends = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
    assert ends == (list(ours.end_ids) if len(ours.end_ids) > 1 else ours.eos_id)
    assert transformers.AutoConfig.from_pretrained(folder).eos_token_id == ends
    again = tokenizer_of(folder)  # and so do we, from the files that were written
    assert (again.begin_ids, again.end_ids) == (ours.begin_ids, ours.end_ids)
    if kind not in ("characters", "unigram", "smiles", "smiles of BERT's names"):
        assert [again.prompt_ids(text) for text in TEXTS[:300]] == [ours.prompt_ids(text) for text in TEXTS[:300]]


@needs_shared
@pytest.mark.full  # making the merges of 128,000 and 200,000 ranks takes 10 s and 20 s
@pytest.mark.parametrize("name", ["llama3", "llama4"])
def test_real_ranks_become_a_tokenizer_json(name: str, tmp_path: Path) -> None:
    ours = from_shared("tiktoken", f"{name}/tokenizer.model")
    theirs = transformers.AutoTokenizer.from_pretrained(exported(ours, tmp_path))
    differences = compare(ours, theirs, TEXTS)
    assert not differences, "\n".join(map(str, differences[:5]))


def test_the_files_of_an_imported_folder_come_back_unless_transformers_would_read_them_otherwise(
    tmp_path: Path,
) -> None:
    from llm.tokenizers.export import exported_as_it_came

    tokenizer = folder_tokenizer(tmp_path, "qwen")
    files = {"tokenizer.json": b"", "tokenizer_config.json": b""}
    assert exported_as_it_came(tokenizer, files, "qwen2")
    assert not exported_as_it_came(tokenizer, files, "llama")
    assert not exported_as_it_came(tokenizer, {"tokenizer.model": b""}, "qwen2")


def test_an_export_that_cannot_be_equal_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SentencePiece's cleaning of blanks is nothing that a tokenizer.json has."""
    tokenizer = SentencePieceTokenizer(sentencepiece_model(400, prefix=True, cleans=True), lossy=True)
    folder = exported(tokenizer, tmp_path)
    assert "transformers will read" in capsys.readouterr().out
    assert compare(tokenizer, transformers.AutoTokenizer.from_pretrained(folder), TEXTS)


def test_a_chat_template_is_kept(tmp_path: Path) -> None:
    tokenizer = foreign_tokenizer(
        write(
            tmp_path / "a",
            config={"model_type": "mistral"},
            tokenizer_config=FAST | {"chat_template": "{{ messages }}"},
            tokenizer=changed(),
        )
    )[0]
    settings = json.loads((exported(tokenizer, tmp_path) / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == "{{ messages }}" and settings["eos_token"] == "<|im_end|>"
