"""Tokenizers read from others' files: a rank file of tiktoken and a tokenizer.json give the ids of their own libraries,
give back every text, and never read a special token out of a text.
"""

import base64
import copy
import itertools
import json
import random
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llm import tokenizer_tiktoken
from llm.data.source import TokenSource
from llm.errors import UserError
from llm.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer
from llm.tokenizer_hf import HFTokenizer
from llm.tokenizer_tiktoken import VARIANTS, TiktokenTokenizer, pieces
from tests.shared import SHARED, needs_shared
from tests.test_tokenizer import CODE, NASTY
from tools.shard import shard

FILES = SHARED / "data/tokenizers"
SPELLED = [  # texts that spell special tokens
    "<|endoftext|>",
    "a<|endoftext|>b <|eot_id|><|eot|> <|image|><|patch|>",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|end_of_text|>",
    "<bos>text<eos> <mask>",
]
TEXTS = [*NASTY, *SPELLED, *(code[:5000] for code in CODE), "12345 don't DON'T camelCase HTTPServer ///\n//\r\n  x\n\n"]

# The patterns in one piece, as tiktoken takes them.
PATTERNS = {
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "llama4": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


def rank_file(tokens: list[bytes]) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


BYTES = [bytes([byte]) for byte in range(256)]
RANKS = rank_file([*BYTES, b"he", b"ll", b"hell", b"hello", b" w", b"  ", b"\n\n", b"<|", b"|>"])


def made_hf(special: tuple[str, ...] = ("<|endoftext|>",)) -> dict[str, Any]:
    """A small byte-level BPE as the content of a tokenizer.json."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    tokenizer.train_from_iterator(CODE[:1], trainer)
    return json.loads(tokenizer.to_str())


@pytest.fixture(scope="module")
def small_hf() -> dict[str, Any]:
    return made_hf()


def opened(document: dict[str, Any], bos: str | None = None, eos: str | None = None) -> HFTokenizer:
    return HFTokenizer(json.dumps(document).encode(), bos, eos, "t.json")


def from_shared(kind: str, file: str) -> Tokenizer:
    if not (FILES / file).exists():
        pytest.skip(f"the folder ../shared with {file} is not beside this clone")
    return load_tokenizer(TokenizerConfig(kind=kind, path=str(FILES / file)))


@pytest.fixture(scope="module", params=["small ranks", "small json", "llama3", "llama4", "gpt2"])
def tokenizer(request: pytest.FixtureRequest, small_hf: dict[str, Any]) -> Tokenizer:
    if request.param == "small ranks":
        return TiktokenTokenizer(RANKS, "llama3")
    if request.param == "small json":
        return opened(small_hf)
    if request.param == "gpt2":
        return from_shared("hf", "gpt2/tokenizer.json")
    return from_shared("tiktoken", f"{request.param}/tokenizer.model")


@pytest.fixture(scope="module", params=["llama3", "llama4"])
def llama(request: pytest.FixtureRequest) -> TiktokenTokenizer:
    found = from_shared("tiktoken", f"{request.param}/tokenizer.model")
    assert isinstance(found, TiktokenTokenizer)
    return found


# What every kind promises.


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:20]))
def test_nasty_text_comes_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_unicode_comes_back_exactly(tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    for _ in range(300):
        top = draw.choice([0x80, 0x800, 0x3000, 0x110000])
        points = [draw.choice([draw.randrange(top), 0x120, 0x20, 0x0A]) for _ in range(draw.randrange(60))]
        text = "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("character", ["x", " ", "\n", "!", "\u3000", "\x1c", "\u4e9c"])
def test_a_run_too_long_for_the_library_comes_back_exactly(tokenizer: Tokenizer, character: str) -> None:
    text = "a" + character * 60_000 + "b"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_no_text_encodes_to_a_special_token(tokenizer: TiktokenTokenizer | HFTokenizer) -> None:
    spelled = [*TEXTS, *tokenizer.special_tokens, " ".join(tokenizer.special_tokens)]
    ids = {number for text in spelled for number in tokenizer.encode(text)}
    assert not ids & set(tokenizer.special_tokens.values())
    assert {tokenizer.bos_id, tokenizer.eos_id} <= set(tokenizer.special_tokens.values())


def test_special_tokens_decode_to_nothing(tokenizer: TiktokenTokenizer | HFTokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode(" a b"), *tokenizer.special_tokens.values(), tokenizer.eos_id]
    assert tokenizer.decode(ids) == " a b"


def test_the_bytes_of_ids_add_up_to_the_texts_bytes(tokenizer: TiktokenTokenizer | HFTokenizer) -> None:
    bytes_of = tokenizer.token_bytes()
    assert bytes_of.shape == (tokenizer.vocab_size,) and bytes_of.dtype == np.int64
    for text in TEXTS:
        assert bytes_of[tokenizer.encode(text)].sum() == len(text.encode())
    assert not bytes_of[list(tokenizer.special_tokens.values())].any()


def test_a_character_cut_in_the_middle_keeps_its_bytes(tokenizer: Tokenizer) -> None:
    for number, length in enumerate(tokenizer.token_bytes()[:300].tolist()):
        assert len(tokenizer.decode_bytes([number])) == length
    ids = tokenizer.encode("\U0001fae8")  # rare enough to have several tokens everywhere
    assert len(ids) > 1
    assert b"".join(tokenizer.decode_bytes([number]) for number in ids).decode() == "\U0001fae8"
    assert tokenizer.decode(ids[:1]) == "\ufffd"


@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_encodes_like_its_texts(tokenizer: Tokenizer, threads: int) -> None:
    for ids, text in zip(tokenizer.encode_batch(TEXTS, threads), TEXTS, strict=True):
        assert ids.dtype == np.uint32
        assert ids.tolist() == tokenizer.encode(text)


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode(text)
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode_batch(["a", text], threads=2)


def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer) -> None:
    for ids in ([-1], [0, tokenizer.vocab_size]):
        with pytest.raises(ValueError, match="not all within"):
            tokenizer.decode(ids)


def test_saved_and_loaded_it_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = TokenizerConfig.model_validate_json(tokenizer.save(tmp_path).model_dump_json())
    again = load_tokenizer(config, base=tmp_path)
    assert (again.kind, again.fingerprint) == (tokenizer.kind, tokenizer.fingerprint)
    assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert again.encode(CODE[0][:2000]) == tokenizer.encode(CODE[0][:2000])


@pytest.mark.parametrize("kind", ["tiktoken", "hf"])
def test_text_is_sharded_with_it_and_comes_back(kind: str, tmp_path: Path, small_hf: dict[str, Any]) -> None:
    (tmp_path / "a.txt").write_text("hello  <|endoftext|>\n")
    (tmp_path / "t").write_bytes(RANKS if kind == "tiktoken" else json.dumps(small_hf).encode())
    given = {"variant": "llama4"} if kind == "tiktoken" else {"bos": "<|endoftext|>"}
    shard([str(tmp_path / "a.txt")], str(tmp_path / "out"), str(tmp_path / "t"), kind=kind, threads=2, **given)
    source = TokenSource.open(tmp_path / "out", verify=True)
    tokenizer = load_tokenizer(TokenizerConfig(kind=kind, path=str(tmp_path / "t"), **given))
    assert source.tokenizer_fingerprint == tokenizer.fingerprint
    tokens = source.row(0, source.n_tokens - 1).tokens
    assert tokenizer.decode(tokens) == "hello  <|endoftext|>\n"


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch, small_hf: dict[str, Any]) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a tokenizer asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert TiktokenTokenizer(RANKS, "llama3").encode("hello w")
    assert opened(small_hf).encode("hello w")


def test_the_libraries_are_imported_only_when_used() -> None:
    script = (  # llm without its __init__.py, which imports torch: only the tokenizer is looked at
        "import sys, types; llm = sys.modules['llm'] = types.ModuleType('llm'); llm.__path__ = ['llm']; "
        "import llm.tokenizer; print({'tiktoken', 'tokenizers'} & set(sys.modules))"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


# tiktoken


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
    monkeypatch.setattr(tokenizer_tiktoken, "MAX_CHARACTERS", size)
    monkeypatch.setattr(tokenizer_tiktoken, "MAX_RUN", run)
    pattern = tokenizer_tiktoken.LONG_RUN.pattern.replace("25001", str(run + 1))
    monkeypatch.setattr(tokenizer_tiktoken, "LONG_RUN", re.compile(pattern))
    draw = random.Random(0)
    for _ in range(200 if size < 100 else 2):
        parts = [draw.choice(" \t\x1c\x85\u200bab\u00e9") * draw.choice([1, 2, size // 3]) for _ in range(12)]
        text = "".join(parts)
        assert list(pieces(text)) == slowly_cut(text, size, run)


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
    assert list(pieces("")) == []
    for text in [*CODE, "x" * 25_000 + " " * 25_000, "word " * 80_000]:
        assert list(pieces(text)) == [text]


def test_the_variant_changes_the_fingerprint() -> None:
    assert TiktokenTokenizer(RANKS, "llama3").fingerprint != TiktokenTokenizer(RANKS, "llama4").fingerprint


def test_ranks_that_tell_no_variant_need_one() -> None:
    with pytest.raises(UserError, match=r"r\.model: its 265 ranks .*tokenizer\.variant .*llama3 \(128000 ranks\)"):
        TiktokenTokenizer(RANKS, name="r.model")


def test_a_variant_with_the_ranks_of_the_other_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    row = VARIANTS["llama4"]
    monkeypatch.setitem(VARIANTS, "llama4", type(row)(row.pattern, 265, row.special))
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
    with pytest.raises(UserError, match=r"t\.model: its 127999 ranks do not tell .*cut off"):
        load_tokenizer(TokenizerConfig(kind="tiktoken", path="t.model"), base=tmp_path)


# tokenizer.json


@needs_shared
def test_gpt_2_ids_are_those_of_tokenizers_itself() -> None:
    path = FILES / "gpt2/tokenizer.json"
    tokenizer = from_shared("hf", "gpt2/tokenizer.json")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (50257, 50256, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    reference = tokenizers.Tokenizer.from_file(str(path))
    for text in (*NASTY, CODE[0][:20_000]):  # these spell no special token of GPT-2
        ids = reference.encode(text).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=False)


def test_the_library_alone_would_read_special_tokens_out_of_text(small_hf: dict[str, Any]) -> None:
    marked = "a<|endoftext|>b"
    special = opened(small_hf).eos_id
    assert special in tokenizers.Tokenizer.from_str(json.dumps(small_hf)).encode(marked).ids
    assert special not in opened(small_hf).encode(marked)


@pytest.mark.parametrize(
    ("special", "given", "expected"),
    [
        (("<|endoftext|>",), (None, None), ("<|endoftext|>", "<|endoftext|>")),
        (("<s>", "</s>"), (None, None), ("<s>", "</s>")),
        (
            ("<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>"),
            (None, None),
            ("<|begin_of_text|>", "<|end_of_text|>"),
        ),
        (("<s>", "</s>", "<eos>"), (None, "<eos>"), ("<s>", "<eos>")),
        (("[A]", "[Z]"), ("[A]", "[Z]"), ("[A]", "[Z]")),
    ],
)
def test_the_tokens_around_documents_are_found_or_named(
    special: tuple[str, ...], given: tuple[str | None, str | None], expected: tuple[str, str], tmp_path: Path
) -> None:
    tokenizer = opened(made_hf(special), *given)
    assert tokenizer.special_tokens == {token: number for number, token in enumerate(special)}
    assert (tokenizer.bos, tokenizer.eos) == expected
    again = load_tokenizer(tokenizer.save(tmp_path), tmp_path)
    assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id) == tuple(map(special.index, expected))


@pytest.mark.parametrize(
    ("special", "given", "reason"),
    [
        ((), (None, None), r"set tokenizer\.eos .* none has a usual name"),
        (("</s>",), (None, None), r"set tokenizer\.bos .* none has a usual name: </s>"),
        (("<s>", "</s>", "<eos>"), (None, None), r"set tokenizer\.eos .* several .*\(</s>, <eos>\)"),
        (("<s>", "</s>"), ("<S>", None), r"tokenizer\.bos=<S> is not among its added tokens <s>, </s>"),
    ],
)
def test_tokens_around_documents_that_are_not_clear_must_be_named(
    special: tuple[str, ...], given: tuple[str | None, str | None], reason: str
) -> None:
    with pytest.raises(UserError, match=rf"t\.json: {reason}"):
        opened(made_hf(special), *given)


def added(content: str, number: int, **options: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    return {"id": number, "content": content, **plain, **options}


def test_the_end_mark_is_not_read_out_of_text_even_where_the_file_would(small_hf: dict[str, Any]) -> None:
    document = copy.deepcopy(small_hf)
    document["added_tokens"][0]["special"] = False
    tokenizer = opened(document)
    assert tokenizer.eos_id not in tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.decode([tokenizer.eos_id]) == ""


def test_an_added_token_for_blanks_is_part_of_the_text(small_hf: dict[str, Any]) -> None:
    document = copy.deepcopy(small_hf)
    document["added_tokens"].append(added(" " * 7, 400))
    tokenizer = opened(document)
    assert tokenizer.encode("a" + " " * 7).count(400) == 1
    assert tokenizer.token_bytes()[400] == 7
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_truncation_and_padding_in_the_file_do_nothing(small_hf: dict[str, Any]) -> None:
    cutting = tokenizers.Tokenizer.from_str(json.dumps(small_hf))
    cutting.enable_truncation(5)
    cutting.enable_padding(length=64)
    tokenizer = opened(json.loads(cutting.to_str()))
    for text in ("a", CODE[0]):
        assert tokenizer.encode(text) == opened(small_hf).encode(text)


def _set(*path_and_value: Any) -> Callable[[dict[str, Any]], None]:
    *path, key, value = path_and_value

    def change(document: dict[str, Any]) -> None:
        for step in path:
            document = document[step]
        document[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_set("normalizer", {"type": "NFC"}), "normalizer NFC can change"),
        (_set("normalizer", {"type": "Lowercase"}), "normalizer Lowercase can change"),
        (_set("normalizer", {"type": "Sequence", "normalizers": [{"type": "StripAccents"}]}), "StripAccents"),
        (_set("pre_tokenizer", "add_prefix_space", True), "puts a space before the text"),
        (_set("pre_tokenizer", None), "not ByteLevel"),
        (_set("pre_tokenizer", {"type": "Whitespace"}), "pre-tokenizer Whitespace can change or drop"),
        (
            _set(
                "pre_tokenizer",
                {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False},
                        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
                    ],
                },
            ),
            "pre-tokenizer Split drops what it splits at",
        ),
        (_set("model", "type", "WordPiece"), "model is WordPiece"),
        (_set("model", "dropout", 0.1), "dropout=0.1"),
        (_set("model", "end_of_word_suffix", "</w>"), "end_of_word_suffix=</w>"),
        (lambda document: document["model"]["vocab"].pop("\u0100"), "byte 0x00 .* is not in its vocabulary"),
        (lambda document: document["added_tokens"].append(added("<mask>", 400, lstrip=True)), "swallows the blanks"),
        (lambda document: document["added_tokens"].append(added("\u00e9", 200)), "the id of other bytes"),
    ],
)
def test_a_file_that_loses_text_is_refused_with_the_reason(
    small_hf: dict[str, Any], change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    document = copy.deepcopy(small_hf)
    change(document)
    with pytest.raises(UserError, match=rf"t\.json: the tokenizer changes text: .*{reason}"):
        opened(document)


def test_pre_tokenizers_that_only_split_are_taken(small_hf: dict[str, Any]) -> None:
    """Llama 3's tokenizer.json has this form."""
    split = {
        "type": "Split",
        "pattern": {"Regex": PATTERNS["llama3"]},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = opened({**small_hf, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}})
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"{}",
        b"[1]",
        b'{"model": 1}',
        b'{"kind": "characters", "characters": "ab"}',
        b'{"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}',
        b'{"model": {"vocab": {}}, "normalizer": "NFC"}',
    ],
)
def test_a_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(UserError, match=r"t\.json: not a tokenizer\.json, or damaged"):
        load_tokenizer(TokenizerConfig(kind="hf", path="t.json"), base=tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_set("model", "merges", [["q", "nothing"]]), "not a tokenizer.json, or damaged"),
        (_set("added_tokens", 0, "id", 7), "<|endoftext|>' has id 7, but the library gives it 0"),
        (_set("model", "vocab", "!", 5), "share an id"),
    ],
)
def test_a_json_that_contradicts_itself_is_named(
    small_hf: dict[str, Any], change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    document = copy.deepcopy(small_hf)
    change(document)
    with pytest.raises(UserError, match=rf"t\.json: .*{re.escape(reason)}"):
        opened(document)


# The config


def test_an_option_of_another_kind_is_refused() -> None:
    for kind, option in (
        ("sentencepiece", {"variant": "llama3"}),
        ("tiktoken", {"bos": "<s>"}),
        ("bytes", {"eos": "x"}),
    ):
        with pytest.raises(ValueError, match=rf"tokenizer\.{next(iter(option))}=.* leave it out"):
            TokenizerConfig(kind=kind, path=None if kind == "bytes" else "t", **option)


@pytest.mark.parametrize("kind", ["tiktoken", "hf"])
def test_a_missing_file_is_named_with_its_key(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.path=gone: cannot read .*\)$"):
        load_tokenizer(TokenizerConfig(kind=kind, path="gone"), base=tmp_path)
    with pytest.raises(ValueError, match=rf"tokenizer\.path is missing: kind {kind} needs a file"):
        TokenizerConfig(kind=kind)
