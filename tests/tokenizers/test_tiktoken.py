"""A rank file of tiktoken gives the ids of tiktoken itself, and a damaged one is named."""

import base64
import itertools
import random
import re
from pathlib import Path

import pytest
import tiktoken

from llm.errors import UserError
from llm.tokenizer import TokenizerConfig, load_tokenizer
from llm.tokenizers import tiktoken as tiktoken_files
from llm.tokenizers.tiktoken import VARIANTS, TiktokenTokenizer, encodable
from tests.shared import SHARED, needs_shared
from tests.tokenizers.helpers import BYTES, CODE, FILES, PATTERNS, RANKS, TEXTS, from_shared, rank_file


@pytest.fixture(scope="module", params=["llama3", "llama4"])
def llama(request: pytest.FixtureRequest) -> TiktokenTokenizer:
    found = from_shared("tiktoken", f"{request.param}/tokenizer.model")
    assert isinstance(found, TiktokenTokenizer)
    return found


@needs_shared
@pytest.mark.parametrize(("text", "ids"), [("hello world", [15339, 1917]), ("Hello", [9906]), ("12345", [4513, 1774])])
def test_llama_3_ids_are_the_known_ones(text: str, ids: list[int]) -> None:
    assert from_shared("tiktoken", "llama3/tokenizer.model").encode(text) == ids


def test_llama_ids_are_those_of_tiktoken_itself(llama: TiktokenTokenizer) -> None:
    lines = (FILES / llama.variant / "tokenizer.model").read_bytes().split(b"\n")[:-1]
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split(b" ") for line in lines)}
    reference = tiktoken.Encoding(
        "reference", pat_str=PATTERNS[llama.variant], mergeable_ranks=ranks, special_tokens=llama.special_tokens
    )
    assert (llama.bos_id, llama.vocab_size) == (len(ranks), reference.max_token_value + 1)
    stories = (SHARED / "data/text/tinystories_sample.txt").read_bytes()[:300_000].decode(errors="ignore")
    for text in [*TEXTS, stories, " " * 25_000 + "x" * 25_000]:
        assert llama.encode(text) == reference.encode(text, disallowed_special=())


def test_llama_3s_special_tokens_have_their_ids() -> None:
    special = VARIANTS["llama3"].special
    assert len(special) == len(set(special)) == 256
    known = {
        "<|begin_of_text|>": 128000,
        "<|end_of_text|>": 128001,
        "<|reserved_special_token_0|>": 128002,
        "<|reserved_special_token_1|>": 128003,
        "<|finetune_right_pad_id|>": 128004,
        "<|step_id|>": 128005,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eom_id|>": 128008,
        "<|eot_id|>": 128009,
        "<|python_tag|>": 128010,
        "<|image|>": 128011,
        "<|reserved_special_token_2|>": 128012,
        "<|reserved_special_token_245|>": 128255,
    }
    assert {token: 128000 + special.index(token) for token in known} == known


def test_llama_4s_special_tokens_have_their_ids() -> None:
    special = VARIANTS["llama4"].special
    assert len(special) == len(set(special)) == 2048
    known = {
        "<|begin_of_text|>": 200000,
        "<|end_of_text|>": 200001,
        "<|fim_prefix|>": 200002,
        "<|fim_middle|>": 200003,
        "<|fim_suffix|>": 200004,
        "<|header_start|>": 200005,
        "<|header_end|>": 200006,
        "<|eom|>": 200007,
        "<|eot|>": 200008,
        "<|step|>": 200009,
        "<|text_post_train_reserved_special_token_0|>": 200010,
        "<|text_post_train_reserved_special_token_5|>": 200015,
        "<|python_start|>": 200016,
        "<|python_end|>": 200017,
        "<|finetune_right_pad|>": 200018,
        "<|text_post_train_reserved_special_token_8|>": 200019,
        "<|text_post_train_reserved_special_token_68|>": 200079,
        "<|image_start|>": 200080,
        "<|image_end|>": 200081,
        "<|vision_reserved_special_token_0|>": 200082,
        "<|tile_x_separator|>": 200084,
        "<|tile_y_separator|>": 200085,
        "<|vision_reserved_special_token_2|>": 200086,
        "<|image|>": 200090,
        "<|vision_reserved_special_token_6|>": 200091,
        "<|patch|>": 200092,
        "<|vision_reserved_special_token_7|>": 200093,
        "<|vision_reserved_special_token_1047|>": 201133,
        "<|reasoning_reserved_special_token_0|>": 201134,
        "<|reasoning_thinking_start|>": 201142,
        "<|reasoning_thinking_end|>": 201143,
        "<|reserved_special_token_0|>": 201144,
        "<|reserved_special_token_903|>": 202047,
    }
    assert {token: 200000 + special.index(token) for token in known} == known


@pytest.mark.parametrize(("size", "run"), [(400_000, 25_000), (20, 3), (7, 1)])
def test_long_texts_are_cut_where_llama_cuts_them(monkeypatch: pytest.MonkeyPatch, size: int, run: int) -> None:
    monkeypatch.setattr(tiktoken_files, "MAX_CHARACTERS", size)
    monkeypatch.setattr(tiktoken_files, "MAX_RUN", run)
    pattern = tiktoken_files.LONG_RUN.pattern.replace("25001", str(run + 1))
    monkeypatch.setattr(tiktoken_files, "LONG_RUN", re.compile(pattern))
    draw = random.Random(0)
    for _ in range(200 if size < 100 else 2):
        parts = [draw.choice(" \t\x1c\x85\u200bab\u00e9") * draw.choice([1, 2, size // 3]) for _ in range(12)]
        text = "".join(parts)
        assert list(encodable(text)) == slowly_cut(text, size, run)


def slowly_cut(text: str, size: int, run: int) -> list[str]:
    """Every `size` characters, and in these parts after every `run` of blanks or of others, a cut."""
    found = []
    for part in (text[start : start + size] for start in range(0, len(text), size)):
        piece = ""
        for _, same in itertools.groupby(part, str.isspace):
            for index, character in enumerate(same):
                if index and index % run == 0:
                    found.append(piece)
                    piece = ""
                piece += character
        found.append(piece)
    return found


def test_nearly_every_text_is_one_piece() -> None:
    assert list(encodable("")) == []
    for text in [*CODE, "x" * 25_000 + " " * 25_000, "word " * 80_000]:
        assert list(encodable(text)) == [text]


def test_the_variant_changes_the_fingerprint() -> None:
    assert TiktokenTokenizer(RANKS, "llama3").fingerprint != TiktokenTokenizer(RANKS, "llama4").fingerprint


def test_ranks_that_tell_no_variant_need_one() -> None:
    with pytest.raises(UserError, match=r"r\.model: its 265 ranks .*tokenizer\.variant .*llama3 \(128000 ranks\)"):
        TiktokenTokenizer(RANKS, name="r.model")


def test_a_variant_with_the_ranks_of_the_other_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    row = VARIANTS["llama4"]
    monkeypatch.setitem(VARIANTS, "llama4", type(row)(row.pattern, 265, row.special, row.ends))
    assert TiktokenTokenizer(RANKS).variant == "llama4"
    with pytest.raises(UserError, match="variant=llama3, but its 265 ranks are those of llama4"):
        TiktokenTokenizer(RANKS, "llama3")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "byte 0x00 has no rank"),
        (b"\x00\xff\n", "line 1 is not a token in base64"),
        (RANKS[:-2], "damaged"),
        (RANKS[:-6], "line 265 is not a token"),
        (RANKS[:-1] + b"x\n", "line 265 is not a token"),
        (RANKS + b"IQ== 265\n", "line 266 repeats an earlier token"),
        (RANKS + b"ISEh 264\n", "are not 0 to 265, each once"),
        (rank_file([*BYTES[1:], b"ab"]), "byte 0x00 has no rank"),
        (b'{"model": {}}', "not a tiktoken rank file"),
    ],
)
def test_a_damaged_rank_file_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "t.model").write_bytes(content)
    with pytest.raises(UserError, match=rf"t\.model: .*{reason}"):
        load_tokenizer(TokenizerConfig(kind="tiktoken", path="t.model", variant="llama3"), base=tmp_path)


@needs_shared
def test_a_published_file_cut_off_at_a_line_end_is_named(tmp_path: Path) -> None:
    lines = (FILES / "llama3/tokenizer.model").read_bytes().splitlines(keepends=True)
    (tmp_path / "t.model").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(UserError, match=r"t\.model: its 127999 ranks do not show .*cut off"):
        load_tokenizer(TokenizerConfig(kind="tiktoken", path="t.model"), base=tmp_path)
