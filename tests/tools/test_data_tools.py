"""The data tools as commands: what they write, and that a failure is one line, a non-zero exit and nothing
half-made.
"""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llm.data.source import TokenSource
from llm.errors import UserError
from llm.tokenizer import TokenizerConfig, load_tokenizer
from tests.data.helpers import flip_byte
from tools.baselines import WittenBell, baselines, gzip_bits_per_byte, xz_bits_per_byte
from tools.shard import check, shard
from tools.stdlib_corpus import collect, is_held_out, write_corpus
from tools.train_tokenizer import train

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["def f(x):\n    return x + 1\n" * 40, "class A:\n    def g(self):\n        pass\n" * 40]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def run_tool(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_text_becomes_a_tokenizer_and_shards_that_decode_to_it(jsonl: Path, tmp_path: Path) -> None:
    model, output = tmp_path / "t.model", tmp_path / "source"
    train([str(jsonl)], str(model), vocab_size=300)
    shard([str(jsonl)], str(output), tokenizer=str(model))
    check(str(output))
    source = TokenSource.open(output, verify=True)
    tokenizer = load_tokenizer(TokenizerConfig(kind="sentencepiece", path=str(model)))
    row = source.row(0, source.n_tokens - 1)
    assert tokenizer.decode(row.tokens) == "".join(TEXTS)
    assert (source.n_docs, source.n_bytes) == (2, sum(map(len, TEXTS)))


def test_threads_do_not_change_the_shards(jsonl: Path, tmp_path: Path) -> None:
    train([str(jsonl)], str(tmp_path / "t.model"), vocab_size=300)
    fingerprints = set()
    for threads in (1, 2):
        output = tmp_path / f"source{threads}"
        shard([str(jsonl)], str(output), tokenizer=str(tmp_path / "t.model"), threads=threads)
        fingerprints.add(TokenSource.open(output).fingerprint)
    assert len(fingerprints) == 1


def test_a_characters_tokenizer_has_all_characters_of_its_text(jsonl: Path, tmp_path: Path) -> None:
    train([str(jsonl)], str(tmp_path / "t.json"), kind="characters")
    tokenizer = load_tokenizer(TokenizerConfig(kind="characters", path=str(tmp_path / "t.json")))
    assert tokenizer.vocab_size == len(set("".join(TEXTS))) + 2


def test_a_tool_runs_as_a_file_and_as_a_module(jsonl: Path, tmp_path: Path) -> None:
    output = tmp_path / "source"
    done = run_tool("tools/shard.py", f"--input={jsonl}", f"--output={output}", "--kind=bytes")
    assert done.returncode == 0, done.stderr
    flip_byte(output / "shards" / "00000.arrow", 900)
    failed = run_tool("-m", "tools.shard", "check", str(output))
    assert failed.returncode == 2
    assert "00000.arrow" in failed.stderr.splitlines()[-1]
    assert "Traceback" not in failed.stderr


def test_bad_text_is_one_line_and_nothing_half_made(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{oops\n')
    failed = run_tool("tools/shard.py", f"--input={tmp_path}/bad.jsonl", f"--output={tmp_path}/source", "--kind=bytes")
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith(f"error: --input={tmp_path}/bad.jsonl, line 2: not JSON")
    assert "Traceback" not in failed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_tokenizer_that_is_there_stays_unless_it_is_to_be_replaced(jsonl: Path, tmp_path: Path) -> None:
    output = tmp_path / "t.json"
    train([str(jsonl)], str(output), kind="characters")
    before = output.read_bytes()
    (tmp_path / "other.txt").write_text("xyz")
    with pytest.raises(UserError, match="--output=.*exists already; .* or give --overwrite"):
        train([str(tmp_path / "other.txt")], str(output), kind="characters")
    assert output.read_bytes() == before
    train([str(tmp_path / "other.txt")], str(output), kind="characters", overwrite=True)
    assert output.read_bytes() != before


def test_a_tokenizer_is_not_written_over_its_text_or_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("xyz")
    with pytest.raises(UserError, match="--output=.*is a file of --input"):
        train([str(tmp_path / "a.txt")], str(tmp_path / "a.txt"), kind="characters", overwrite=True)
    with pytest.raises(UserError, match="Not a directory; --output="):
        train([str(tmp_path / "a.txt")], str(tmp_path / "a.txt" / "t.json"), kind="characters")
    assert (tmp_path / "a.txt").read_text() == "xyz"


def test_a_tokenizer_that_cannot_be_trained_leaves_no_file(jsonl: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocab_size=50000"):
        train([str(jsonl)], str(tmp_path / "t.model"), vocab_size=50_000)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="--input=.*empty.jsonl is empty, so there is nothing to train a tokenizer on"):
        train([str(tmp_path / "empty.jsonl")], str(tmp_path / "t.model"), vocab_size=300)
    assert not (tmp_path / "t.model").exists()


def test_an_existing_output_is_kept(jsonl: Path, tmp_path: Path) -> None:
    shard([str(jsonl)], str(tmp_path / "source"), kind="bytes")
    with pytest.raises(UserError, match="exists already"):
        shard([str(jsonl)], str(tmp_path / "source"), kind="bytes")


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small standard library with everything that must be left out."""
    root = tmp_path / "lib"
    files = {f"m{i}.py": f"x = {i}\r\n".encode() for i in range(200)}
    files |= {
        "a_copy.py": b"x = 7\r\n",  # sorted before m7.py, so m7.py is the copy
        "empty.py": b"",
        "latin.py": b"# caf\xe9\n",
        "test/test_a.py": b"1\n",
        "pkg/test/b.py": b"2\n",
        "encodings/cp.py": b"3\n",
        "site-packages/c.py": b"4\n",
        "pkg/__pycache__/d.py": b"5\n",
        "notes.txt": b"6\n",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def test_the_corpus_leaves_out_tests_tables_copies_and_broken_text(library: Path) -> None:
    corpus = collect(library)
    names = [name for name, _ in corpus.train + corpus.valid]
    assert sorted(names) == sorted(["a_copy.py", *(f"m{i}.py" for i in range(200) if i != 7)])
    assert corpus.left_out == {"duplicate": 1, "empty": 1, "not UTF-8": 1}
    assert all(text.endswith("\r\n") for _, text in corpus.train)


def test_the_split_depends_on_the_path_alone(library: Path) -> None:
    corpus = collect(library)
    assert corpus.valid and all(is_held_out(name) for name, _ in corpus.valid)
    assert not any(is_held_out(name) for name, _ in corpus.train)
    assert [is_held_out(name) for name in ("argparse.py", "dataclasses.py", "email/message.py")] == [False, True, False]


def test_the_corpus_of_this_python_is_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "corpus"
    write_corpus(str(output))
    written = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    assert set(written) == {"train.jsonl", "valid.jsonl"}
    rows = [json.loads(line) for line in (output / "valid.jsonl").read_text().splitlines()]
    n_bytes = sum(len(row["text"].encode()) for row in rows)
    assert f"valid: {len(rows)} files, {n_bytes} bytes" in capsys.readouterr().out
    write_corpus(str(output))
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == written
    (output / "valid.jsonl").write_text("changed")
    with pytest.raises(UserError, match="holds something else"):
        write_corpus(str(output))


def slow_witten_bell(train: list[bytes], valid: list[bytes], context: int) -> float:
    """The same model by its formula, one byte at a time, from dictionaries."""
    followers: dict[bytes, Counter[int]] = {}
    for document in train:
        for i, byte in enumerate(document):
            for length in range(min(i, context) + 1):
                followers.setdefault(document[i - length : i], Counter())[byte] += 1
    bits = 0.0
    for document in valid:
        for i, byte in enumerate(document):
            probability = 1 / 256
            for length in range(min(i, context) + 1):
                seen = followers.get(document[i - length : i])
                if seen:
                    probability = (seen[byte] + len(seen) * probability) / (seen.total() + len(seen))
            bits -= math.log2(probability)
    return bits / sum(map(len, valid))


@pytest.mark.parametrize("context", [0, 1, 3, 7])
def test_the_n_gram_model_is_witten_bells(context: int) -> None:
    draw = np.random.default_rng(0)
    train, valid = (
        [draw.choice(list(b"abc\xff\x00"), size=size).astype(np.uint8).tobytes() for size in (200, 0, 1, 300)]
        for _ in range(2)
    )
    valid.append(b"letters never seen")
    # float64 sums of about 500 logarithms in another order
    assert WittenBell(train, context).bits_per_byte(valid) == pytest.approx(
        slow_witten_bell(train, valid, context), rel=1e-12
    )


def test_compressors_see_each_document_alone() -> None:
    document = np.random.default_rng(0).bytes(1000)
    for bits_per_byte in (gzip_bits_per_byte, xz_bits_per_byte):
        alone = bits_per_byte([document])
        assert 8.0 < alone < 8.7  # noise does not shrink; headers of some 20 to 70 bytes
        assert bits_per_byte([document, document]) == alone


def test_baselines_are_printed_and_kept_when_asked(
    jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baselines(str(jsonl), str(jsonl), contexts=(1, 3), output=str(tmp_path / "b.json"))
    results = json.loads((tmp_path / "b.json").read_text())
    assert list(results) == ["gzip -9", "xz -9", "1 bytes of context", "3 bytes of context"]
    printed = "".join(f"{name}: {value:.4f} bits per byte\n" for name, value in results.items())
    assert capsys.readouterr().out == printed
