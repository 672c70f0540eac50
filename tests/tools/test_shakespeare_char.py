"""The character benchmark: its data are the text and nothing else, and its configs keep to the published size."""

from pathlib import Path

import pytest

from llm.data.text import open_data, prepare_data
from llm.errors import UserError
from llm.model import LLM
from llm.tokenizer import TokenizerConfig, load_tokenizer
from llm.train.config import load_config
from tests.shared import SHARED, needs_shared
from tools.shakespeare_char import prepare, split

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ("configs/pretrain/shakespeare_char.yaml", "configs/pretrain/shakespeare_char_muon.yaml")
TEXT = "First Citizen:\r\nÀ présent, speak.\n\n" * 11 + "\u2581 the end"
CHARACTERS_OF_TINYSHAKESPEARE = 65


def prepared(tmp_path: Path, content: str = TEXT) -> Path:
    (tmp_path / "text").write_bytes(content.encode())
    prepare(str(tmp_path / "text"), str(tmp_path / "made"))
    return tmp_path / "made"


@pytest.mark.parametrize("length", [2, 9, 10, 11, 19, 20, 1000, 1001])
def test_the_first_nine_tenths_train_and_the_rest_is_held_out(length: int) -> None:
    text = "".join(chr(0x3B1 + i % 24) for i in range(length))
    train, valid = split(text)
    assert train + valid == text
    assert 10 * len(train) <= 9 * length < 10 * (len(train) + 1)


def test_a_run_reads_each_part_as_one_unchanged_document(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    tokenizer = load_tokenizer(TokenizerConfig(kind="characters", path=str(folder / "tokenizer.json")))
    assert tokenizer.vocab_size == len(set(TEXT)) + 2
    parts = []
    for name in ("train.txt", "valid.txt"):
        prepare_data(str(folder / name), tokenizer, tmp_path / "cache")
        ((_, source, _),) = open_data(str(folder / name), tokenizer, tmp_path / "cache")
        tokens = source.row(0, source.n_tokens - 1).tokens
        assert source.n_docs == 1
        assert (tokens[0], tokens[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        parts.append(tokenizer.decode(tokens[1:-1]))
    assert tuple(parts) == split(TEXT)


def test_the_same_again_changes_nothing_and_another_text_is_refused(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert set(before) == {"train.txt", "valid.txt", "tokenizer.json"}
    prepared(tmp_path)
    with pytest.raises(UserError, match=r"--output=.*holds something else"):
        prepared(tmp_path, TEXT + "!")
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("content", "message"), [(b"x", "1 characters are too few"), (b"good\xff", "not UTF-8 at byte 4"), (None, "read")]
)
def test_a_text_that_cannot_be_split_is_named_and_leaves_nothing(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(UserError, match=f"--text={text}: .*{message}"):
        prepare(str(text), str(tmp_path / "made"))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("path", CONFIGS)
def test_a_config_keeps_to_the_published_size_and_budget(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    train = config.train
    assert (train.steps, train.global_batch_size, train.seq_len, train.precision) == (2000, 12, 64, "fp32")
    assert config.eval.rows is None
    args = config.model.model_copy(
        update={"vocab_size": CHARACTERS_OF_TINYSHAKESPEARE + len(("begin", "end"))}
    )
    assert sum(parameter.numel() for parameter in LLM(args, device="meta").parameters()) <= 850_000


@needs_shared
def test_tinyshakespeare_gives_the_published_split(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    prepare(str(SHARED / "data" / "text" / "tinyshakespeare.txt"), str(folder))
    sizes = [len((folder / name).read_bytes().decode()) for name in ("train.txt", "valid.txt")]
    assert sizes == [1_003_854, 111_540]  # what nanoGPT's prepare.py prints
    tokenizer = load_tokenizer(TokenizerConfig(kind="characters", path=str(folder / "tokenizer.json")))
    assert tokenizer.vocab_size == CHARACTERS_OF_TINYSHAKESPEARE + 2
