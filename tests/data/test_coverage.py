"""Which rows were read how often, counted again one by one through the mixture and the documents."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llm.data.build import build_source
from llm.data.coverage import Coverage, Stretch, rows_asked
from llm.data.documents import read_documents
from llm.data.mixture import CYCLE, Mixture
from llm.data.source import TokenSource
from llm.data.stream import Stream
from llm.errors import UserError
from llm.tokenizer import ByteTokenizer
from tests.data.helpers import flip_byte, mixture_of, random_texts, token_source
from tests.data.sample_helpers import asked_for, chat, packed, random_rows, write_rows

T, SEED = 16, 3
NAMES = ("zebra", "ant", "moth")  # not in the order of the alphabet, in which a manifest keeps them


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """Three sources: text files, of several shards; one JSONL; two JSONL files."""
    folder = tmp_path_factory.mktemp("text")
    for i, text in enumerate(random_texts(30, seed=1)):
        (folder / "zebra").mkdir(exist_ok=True)
        (folder / "zebra" / f"{i:02d}.txt").write_text(text)
    for path, n in (("ant/one.jsonl", 40), ("moth/one.jsonl", 5), ("moth/two.jsonl", 60)):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text("".join(f'{{"text": {text!r}}}\n'.replace("'", '"') for text in random_texts(n, n)))
    weights = dict(zip(NAMES, (2.0, 1.0, 5.0), strict=True))
    return mixture_of([(name, sharded(folder, name), weights[name]) for name in NAMES], T, SEED)


def sharded(folder: Path, name: str) -> TokenSource:
    documents = read_documents(folder / name)
    return build_source(documents, ByteTokenizer(), folder / f"{name}.shards", total_bytes=0, shard_bytes=1000)


def state_at(mixture: Mixture, consumed: int) -> dict:
    """As it comes back from a checkpoint's manifest, whose keys are sorted."""
    state = mixture.state(consumed)
    state["data"]["sources"] = dict(sorted(state["data"]["sources"].items()))
    return state


@pytest.mark.parametrize("consumed", [0, 1, 100, CYCLE - 1, CYCLE, 2 * CYCLE + 17])
def test_rows_are_counted_as_the_mixture_deals_them(mixture: Mixture, consumed: int) -> None:
    source, row, _ = mixture.locate(np.arange(consumed))
    asked = rows_asked(state_at(mixture, consumed), NAMES)
    assert list(asked.values()) == [int((source == number).sum()) for number in range(3)]
    for number, name in enumerate(NAMES):
        coverage = Coverage(name, Stream(token_source(mixture, number), T), SEED, asked[name])
        times = np.bincount(row[source == number], minlength=mixture.rows_of[number])
        assert np.array_equal(coverage.passes + coverage.again, times)
        assert coverage.times() == Counter(times.tolist())


@pytest.mark.parametrize("number", range(3))
def test_every_document_lies_in_one_stretch_with_the_rows_that_hold_its_tokens(mixture: Mixture, number: int) -> None:
    source = token_source(mixture, number)
    coverage = Coverage(NAMES[number], Stream(token_source(mixture, number), T), SEED, asked=source.n_rows(T) + 7)
    found = list(coverage.stretches())
    held: dict[tuple[str, str], set[int]] = {}
    documents: dict[tuple[str, str], set[int]] = {}
    bounds = np.cumsum([entry.documents for entry in source.manifest.shards])
    for position in range(source.n_tokens):
        document, _ = source.document_at(position)
        shard = source.manifest.shards[int(np.searchsorted(bounds, document, side="right"))].name
        key = (shard, source.origin(document).file)
        documents.setdefault(key, set()).add(document)
        if position // T < source.n_rows(T):
            held.setdefault(key, set()).add(position // T)
    assert [(s.shard, s.file) for s in found] == list(documents)
    assert len({s.shard for s in found}) == len(source.manifest.shards) > 1
    for stretch in found:
        rows = sorted(held.get((stretch.shard, stretch.file), ()))
        assert stretch.documents == len(documents[stretch.shard, stretch.file])
        assert stretch.rows == ((rows[0], rows[-1]) if rows else None)
        assert stretch.times == Counter(int(1 + coverage.again[row]) for row in rows)
        assert stretch.lines == lines_of(source, documents[stretch.shard, stretch.file])


def lines_of(source: TokenSource, documents: set[int]) -> tuple[int, int] | None:
    rows = [row for number in documents if (row := source.origin(number).row) is not None]
    return (min(rows), max(rows)) if rows else None


def test_what_lies_behind_the_last_whole_row_is_in_no_row(tmp_path: Path) -> None:
    for name, length in (("a", T * 4), ("b", 3)):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.txt").write_text("x" * (length - 2))  # and its two marks
    source = build_source(read_documents(tmp_path / "in"), ByteTokenizer(), tmp_path / "out", total_bytes=0)
    first, last = Coverage("a", Stream(source, T), SEED, asked=4).stretches()
    assert first.rows == (0, 3) and first.times == {1: 4}
    assert isinstance(last, Stretch) and last.rows is None and last.times == {}


def test_samples_are_counted_as_the_rows_that_hold_them_are_read(tmp_path: Path) -> None:
    write_rows(tmp_path / "in" / "a.jsonl", random_rows(30, longest=T))
    write_rows(tmp_path / "in" / "b.jsonl", [*random_rows(20, 1, T), {"text": "x" * (T + 2)}])
    rows = packed(str(tmp_path / "in"), asked_for(tmp_path, T, seed=SEED, chat=chat(max_length="drop")))
    mixture = Mixture([("chats", rows, 1.0)], T, SEED)
    asked = rows.n_rows + 9
    read: Counter[int] = Counter()
    for _, k, epoch in zip(*(numbers.tolist() for numbers in mixture.locate(np.arange(asked))), strict=True):
        read.update(rows.items(k, epoch).tolist())
    first, second = Coverage("chats", rows, SEED, asked).stretches()
    assert (first.file, first.lines, first.documents) == (str(tmp_path / "in" / "a.jsonl"), (1, 30), 30)
    assert (second.lines, second.documents, second.rows) == ((1, 21), 21, None)
    assert first.times == Counter(read[item] for item in range(30))
    assert second.times == Counter(read[item] for item in range(30, 51)) and second.times[0] == 1


def test_another_order_or_other_sources_are_not_guessed_at(mixture: Mixture) -> None:
    state = state_at(mixture, 5)
    with pytest.raises(UserError, match="order of rows is version 2"):
        rows_asked(state | {"order_version": 2}, NAMES)
    with pytest.raises(UserError, match="those of the config ant, moth"):
        rows_asked(state, ["ant", "moth"])


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 100)
    build_source(read_documents(tmp_path / "a.txt"), ByteTokenizer(), tmp_path / "out", total_bytes=0)
    shard = tmp_path / "out" / "shards" / "00000.arrow"
    flip_byte(shard, shard.read_bytes().index(b"\x78\x00\x78\x00") + 8)
    with pytest.raises(UserError, match="00000.arrow"):
        list(Coverage("a", Stream(TokenSource.open(tmp_path / "out"), T), SEED, 1).stretches())
