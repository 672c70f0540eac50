"""A prompt in a foreign folder gets the ids of transformers' AutoTokenizer, whatever the folder's files say."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import normalizers, processors

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import transformers

from llm.data.source import TokenSource
from llm.errors import UserError
from llm.pretrained import tokenizer_of
from llm.tokenizer import TokenizerConfig, load_tokenizer
from llm.tokenizers.check import EDGES, check_texts, compare
from llm.tokenizers.folder import FolderTokenizer, foreign_tokenizer, notes_of
from tests.shared import needs_shared
from tests.tokenizers.helpers import CODE, FILES, made_hf, sentencepiece_model
from tools.shard import shard

NAMES = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ADDED = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
TEXTS = [*EDGES, *list(check_texts(150, NAMES))[len(EDGES) :]]
FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}


def write(folder: Path, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / f"{name}.model").write_bytes(content)
        elif content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def decoder_entries(first: int, names: tuple[str, ...]) -> dict[str, Any]:
    return {str(first + i): {"content": name, **ADDED} for i, name in enumerate(names)}


def equal(folder: Path, texts: list[str] = TEXTS) -> FolderTokenizer:
    """The folder's tokenizer, after comparing it with AutoTokenizer's."""
    ours = foreign_tokenizer(folder)[0]
    differences = compare(ours, transformers.AutoTokenizer.from_pretrained(folder), texts)
    assert not differences, "\n".join(map(str, differences[:5]))
    assert isinstance(ours, FolderTokenizer)
    return ours


def begins(document: dict[str, Any], name: str, **around: str) -> dict[str, Any]:
    library = Library.from_str(json.dumps(document))
    library.post_processor = processors.TemplateProcessing(
        single=around["single"], pair="$A $B", special_tokens=[(name, library.token_to_id(name))]
    )
    return json.loads(library.to_str())


def changed(**parts: Any) -> dict[str, Any]:
    return {**made_hf(NAMES), **parts}


NFC = {"type": "NFC"}
QWEN = {
    "add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
    "tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder_entries(0, NAMES),
}  # fmt: skip
BEGUN = begins(made_hf(NAMES), "<|endoftext|>", single="<|endoftext|> $A")
JSON_FOLDERS = {
    "qwen2": ("qwen2", QWEN, changed(normalizer=NFC), ()),
    "qwen2 of a folder without settings": ("qwen2", None, changed(), ()),
    "qwen2 that names Llama's class": ("qwen2", LLAMA | {"eos_token": "<|im_end|>"}, changed(), ()),
    "qwen3 that names none": ("qwen3", FAST, changed(), ()),
    "a begin mark in the post_processor": ("llama", FAST | {"bos_token": "<|endoftext|>"}, BEGUN, (0,)),
    "add_bos_token does not add it to a tokenizer.json": (
        "llama", LLAMA | {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}, changed(), (),
    ),
    "gpt_neox ignores its post_processor": (
        "gpt_neox", {"tokenizer_class": "GPTNeoXTokenizer", "add_bos_token": True}, BEGUN, (),
    ),
    "gpt2 with a space before the text": (
        "gpt2", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, changed(), (),
    ),
    "olmo2": ("olmo2", {"tokenizer_class": "GPT2Tokenizer", "pad_token": "<|pad|>"}, changed(), ()),
    "a normalizer that changes text": ("llama", FAST, changed(normalizer={"type": "Lowercase"}), ()),
    "control tokens split": ("llama", FAST | {"split_special_tokens": True}, changed(), ()),
    "clean_up_tokenization_spaces": ("llama", FAST | {"clean_up_tokenization_spaces": True}, changed(), ()),
    "additional special tokens": (
        "llama", FAST | {"additional_special_tokens": ["<|new|>", "a new"], "pad_token": "[PAD]"}, changed(), (),
    ),
    "a cut at three tokens": (
        "llama", FAST,
        changed(truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}), (),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", JSON_FOLDERS)
def test_a_folder_with_tokenizer_json_gives_autotokenizers_ids(name: str, tmp_path: Path) -> None:
    model_type, settings, document, begin = JSON_FOLDERS[name]
    folder = write(
        tmp_path,
        config={"model_type": model_type, "vocab_size": 500},
        tokenizer_config=settings,
        tokenizer=document,
    )
    tokenizer = equal(folder)
    assert tokenizer.begin_ids == begin
    for text in (*NAMES, "a<|im_end|>b"):  # in a document they are text
        assert not set(tokenizer.encode(text)) & {0, 1, 2}


SENTENCEPIECE_FOLDERS = {
    "llama": ("llama", LLAMA),
    "llama as version 4 began it": ("llama", LLAMA | {"legacy": True}),
    "llama with both marks": ("llama", LLAMA | {"add_eos_token": True}),
    "llama without the space before a text": ("llama", LLAMA | {"add_prefix_space": False, "add_bos_token": False}),
    "mistral": ("mistral", LLAMA),
    "gemma's class": ("gemma2", {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "bos_token": "<s>"}),
}


@pytest.mark.parametrize("name", SENTENCEPIECE_FOLDERS)
@pytest.mark.parametrize("added", [False, True])
def test_a_folder_with_tokenizer_model_gives_autotokenizers_ids(name: str, added: bool, tmp_path: Path) -> None:
    model_type, settings = SENTENCEPIECE_FOLDERS[name]
    n = 400
    more = {"added_tokens_decoder": decoder_entries(n, NAMES[1:]), "eos_token": "<|im_end|>"} if added else {}
    folder = write(
        tmp_path,
        config={"model_type": model_type, "vocab_size": n + 10, "eos_token_id": 2},
        tokenizer_config=settings | more,
        tokenizer=sentencepiece_model(n, prefix=True),
    )
    tokenizer = equal(folder)
    if added:
        assert tokenizer.eos_id == n + 1 and tokenizer.end_ids == (n + 1, 2)
        assert tokenizer.decode([n, *tokenizer.encode("ab"), n + 1, n + 9]) == "ab"
        assert n not in tokenizer.encode("a<|im_start|>b") and n in tokenizer.prompt_ids("a<|im_start|>b")


def test_added_tokens_of_older_files_are_read(tmp_path: Path) -> None:
    n = 400
    folder = write(
        tmp_path,
        config={"model_type": "llama", "vocab_size": n + 3, "eos_token_id": 2},
        tokenizer_config=LLAMA | {"eos_token": "<|im_end|>"},
        special_tokens_map={"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": ["<|im_start|>"]},
        added_tokens={"<|im_start|>": n, "<|im_end|>": n + 1, "a tab": n + 2},
        tokenizer=sentencepiece_model(n, prefix=True),
    )
    tokenizer = equal(folder)
    assert tokenizer.eos_id == n + 1
    assert n + 2 in tokenizer.encode("that is a table")  # no control token, so it is how text is written
    assert tokenizer.decode(tokenizer.encode("that is a table")) == "that is a table"


@needs_shared
@pytest.mark.parametrize(
    "file", ["gpt2", *(pytest.param(name, marks=pytest.mark.full) for name in ("llama2", "llama3"))]
)
def test_real_vocabularies_give_autotokenizers_ids(file: str, tmp_path: Path) -> None:
    model_type = {"llama2": "llama", "llama3": "llama", "gpt2": "gpt2"}[file]
    entries = decoder_entries(128_000, ("<|begin_of_text|>", "<|end_of_text|>"))
    settings = {
        "llama2": LLAMA,
        "llama3": FAST | {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "add_bos_token": True,
                          "added_tokens_decoder": entries},
        "gpt2": {"tokenizer_class": "GPT2Tokenizer"},
    }  # fmt: skip
    folder = write(tmp_path, config={"model_type": model_type}, tokenizer_config=settings[file])
    for found in (FILES / file).iterdir():
        (folder / found.name).write_bytes(found.read_bytes())
    equal(folder, [*check_texts(400, NAMES), CODE[0][:5000]])


def test_an_end_of_turn_never_begins_a_text_and_every_end_is_known(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        config={"model_type": "qwen2", "vocab_size": 500, "eos_token_id": 2},
        generation_config={"eos_token_id": [2, 0], "bos_token_id": None},
        tokenizer_config=QWEN,
        tokenizer=changed(normalizer=NFC),
    )
    tokenizer = equal(folder)
    assert (tokenizer.begin_ids, tokenizer.eos_id, tokenizer.end_ids) == ((), 2, (2, 0))
    assert tokenizer.bos_id == 0 and tokenizer.prompt_ids("") == [0]


@pytest.mark.parametrize("spelled", ["<|endoftext|>", {"content": "<|endoftext|>", "special": True}, None])
def test_marks_are_names_mappings_or_null(spelled: Any, tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        config={"model_type": "llama", "vocab_size": 500, "bos_token_id": 77, "eos_token_id": [2, 777]},
        tokenizer_config=FAST | {"bos_token": spelled, "eos_token": {"content": "<|im_end|>"}},
        tokenizer=changed(),
    )
    tokenizer = foreign_tokenizer(folder)[0]
    assert tokenizer.end_ids == (2,) and tokenizer.begin_ids == ()
    assert any("777" in note for note in tokenizer.notes)  # type: ignore[attr-defined]


def test_a_tokenizer_json_wins_over_a_tokenizer_model_that_disagrees(tmp_path: Path) -> None:
    document = json.loads(json.dumps(made_llama_json(sentencepiece_model(400, prefix=True))))
    folder = write(tmp_path, config={"model_type": "llama", "vocab_size": 400}, tokenizer_config=LLAMA)
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(400, prefix=True))
    agreeing = equal(folder)
    assert agreeing.kind == "sentencepiece"
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(390, prefix=True, code=1))
    tokenizer = equal(folder)
    assert tokenizer.kind == "hf"
    assert tokenizer.encode("Once upon") == agreeing.encode("Once upon")


def made_llama_json(model: bytes) -> dict[str, Any]:
    from llm.tokenizers.sentencepiece_model import read_sentencepiece
    from llm.tokenizers.tokenizer_json import document_of, merges_of

    vocab = {text: number for number, (text, _, _) in enumerate(read_sentencepiece(model).pieces)}
    library = Library.from_str(json.dumps(made_hf(())))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    document = document_of(library)
    document["model"] |= {"vocab": vocab, "merges": merges_of(vocab), "byte_fallback": True, "unk_token": "<unk>"}
    added = [{"id": i, "content": name, **ADDED} for i, name in enumerate(("<unk>", "<s>", "</s>"))]
    return {**document, "pre_tokenizer": None, "decoder": None, "added_tokens": added}


def test_what_is_saved_in_a_run_opens_as_the_same_tokenizer(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "a",
        config={"model_type": "qwen2", "vocab_size": 500, "hidden_size": 4},
        generation_config={"eos_token_id": [2, 0]},
        tokenizer_config=QWEN,
        tokenizer=changed(normalizer=NFC),
    )
    first, config = foreign_tokenizer(folder)
    assert load_tokenizer(config.model_copy(update={"path": str(folder)})).fingerprint == first.fingerprint
    (tmp_path / "run").mkdir()
    again = load_tokenizer(first.save(tmp_path / "run"), base=tmp_path / "run")
    for key in ("fingerprint", "begin_ids", "end_ids", "bos_id", "eos_id", "vocab_size"):
        assert getattr(again, key) == getattr(first, key)
    assert [again.prompt_ids(text) for text in TEXTS] == [first.prompt_ids(text) for text in TEXTS]


def test_a_folder_with_a_begin_mark_keeps_the_fingerprint_of_its_file(tmp_path: Path) -> None:
    """So that shards and caches made before folders were read whole stay valid."""
    folder = write(
        tmp_path,
        config={"model_type": "llama"},
        tokenizer_config=FAST | {"bos_token": "<|endoftext|>"},
        tokenizer=BEGUN,
    )
    given = TokenizerConfig(kind="hf", path="tokenizer.json", bos="<|endoftext|>", eos="<|im_end|>")
    assert foreign_tokenizer(folder)[0].fingerprint == load_tokenizer(given, base=folder).fingerprint
    without = write(tmp_path, tokenizer=changed())
    assert foreign_tokenizer(without)[0].fingerprint != load_tokenizer(given, base=folder).fingerprint


def test_a_folder_that_changes_text_is_refused_where_that_was_not_allowed(tmp_path: Path) -> None:
    folder = write(tmp_path, config={"model_type": "qwen2"}, tokenizer_config=QWEN, tokenizer=changed(normalizer=NFC))
    with pytest.raises(UserError, match="normalizer NFC can change"):
        load_tokenizer(TokenizerConfig(kind="hf", path=str(folder)))
    load_tokenizer(TokenizerConfig(kind="hf", path=str(folder), lossy=True))


def test_what_a_folder_leaves_open_or_says_twice_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reported: list[str] = []
    spm = sentencepiece_model(400, prefix=True)
    bare = write(tmp_path / "a", config={"model_type": "llama", "vocab_size": 400}, tokenizer=spm)
    tokenizer = tokenizer_of(bare, reported.append)
    assert tokenizer.begin_ids == (1,) and tokenizer.prompt_ids("Once")[0] == 1
    assert "no tokenizer_config.json" in reported.pop()
    settings = write(bare, tokenizer_config={"tokenizer_class": "LlamaTokenizer", "add_eos_token": True})
    assert tokenizer_of(settings, reported.append).prompt_ids("Once")[-1] == 2
    assert any("no add_bos_token" in line for line in reported) and any(
        "end mark after every prompt" in line for line in reported
    )


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer_config", b"{", "tokenizer_config.json: damaged: not JSON"),
        ("tokenizer_config", b'{"added_tokens_decoder": [1]}', "tokenizer's files make no sense"),
        ("generation_config", b"[]", "generation_config.json: damaged: not a JSON object"),
        ("tokenizer", b'{"model": 3}', "tokenizer.json: not a tokenizer.json, or damaged"),
    ],
)
def test_a_damaged_file_is_named(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    folder = write(tmp_path, config={"model_type": "llama"}, tokenizer_config=FAST, tokenizer=changed())
    (folder / f"{name}.json").write_bytes(content)
    with pytest.raises(UserError, match=reason):
        foreign_tokenizer(folder)


def test_a_vocabulary_of_characters_is_read_from_its_tokenizer_json_alone(tmp_path: Path) -> None:
    """As newer Llama 2 and Mistral folders come, without a tokenizer.model."""
    document = made_llama_json(sentencepiece_model(400, prefix=True))
    settings = LLAMA | {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = equal(write(tmp_path, config={"model_type": "llama"}, tokenizer_config=settings, tokenizer=document))
    assert (tokenizer.kind, tokenizer.lossy) == ("hf", True)
    assert (
        tokenizer.decode(tokenizer.encode("Once upon\n a caf\u00e9 \U0001f600")) == "Once upon\n a caf\u00e9 \U0001f600"
    )
    assert not set(tokenizer.encode("a<s>b</s>")) & {1, 2}


def test_training_documents_begin_as_prompts_do(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "a", config={"model_type": "qwen2"}, tokenizer_config=QWEN, tokenizer=changed(normalizer=NFC)
    )
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("Once <|im_end|>")
    (tmp_path / "text" / "b.txt").write_text("def")
    shard([str(tmp_path / "text")], str(tmp_path / "out"), str(folder), kind="hf", lossy=True)
    tokenizer = foreign_tokenizer(folder)[0]
    source = TokenSource.open(tmp_path / "out")
    assert source.tokenizer_fingerprint == tokenizer.fingerprint
    documents = [[*tokenizer.encode(text), 2] for text in ("Once <|im_end|>", "def")]
    assert source.row(0, source.n_tokens - 1).tokens.tolist() == [*documents[0], *documents[1]]
    assert documents[1][:-1] == tokenizer.prompt_ids("def")


def test_a_class_that_is_not_known_is_named(tmp_path: Path) -> None:
    settings = FAST | {"tokenizer_class": "CodeLlamaTokenizer"}
    folder = write(tmp_path, config={"model_type": "llama"}, tokenizer_config=settings, tokenizer=changed())
    assert any("CodeLlamaTokenizer" in line for line in notes_of(foreign_tokenizer(folder)[0]))
