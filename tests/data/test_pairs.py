"""Pairs as rows: labels counted by hand, both sides packed, what does not fit or is empty refused by row."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from llm.batch import IGNORE
from llm.data.batch import collate
from llm.data.halved import Halved, halves
from llm.data.heldout import HeldOut
from llm.data.mixture import Mixture
from llm.data.pair_packing import PairPacking
from llm.data.pair_rows import PairRows, source_of
from llm.data.rows import Row
from llm.data.stream import Stream
from llm.errors import UserError
from llm.tokenizer import ByteTokenizer
from tests.data.helpers import make_source
from tests.data.sample_helpers import asked_for, opened, write_rows

BOS, EOS = ByteTokenizer.bos_id, ByteTokenizer.eos_id
T, S = 24, 16
DRAW = np.random.default_rng(0)
TEXTS = ["".join(DRAW.choice(list("abcdef"), size=int(n))) for n in DRAW.integers(1, 12, 200)]
ROWS = [{"source": text, "target": text[::-1] * 2} for text in TEXTS]


def pairs(folder: Path, rows: Any, **asked: Any) -> PairRows:
    path = write_rows(folder / "p.jsonl", rows)
    of_pairs = asked_for(folder, **{"seq_len": T, "source_len": S, **asked})
    found = opened(path, of_pairs, "pair")["data.train"].rows
    assert isinstance(found, PairRows)
    return found


def text(ids: Any) -> str:
    return bytes(number for number in ids.tolist() if number < BOS).decode()


def parts_of(row: Row) -> list[tuple[list[int], list[int], list[int]]]:
    """(source, inputs, labels) of each document."""
    bounds = [*row.starts.tolist(), len(row.tokens)]
    labels = row.targets["seq2seq"].labels
    return [
        (source_of(row, i).tolist(), row.tokens[start:end].tolist(), labels[start:end].tolist())
        for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False))
    ]


def test_a_pair_is_a_source_up_to_its_end_and_a_target_whose_labels_are_the_next_tokens(tmp_path: Path) -> None:
    rows = pairs(tmp_path, [{"source": "ab", "target": "xyz"}])
    (part,) = parts_of(rows.read(0, 0))
    assert part == ([BOS, 97, 98, EOS], [BOS, 120, 121, 122], [120, 121, 122, EOS])


def test_an_epoch_has_every_pair_once_its_sides_at_the_same_place(tmp_path: Path) -> None:
    rows = pairs(tmp_path, ROWS)
    for epoch in (0, 3):
        found = []
        for k in range(rows.n_rows):
            row = rows.read(k, epoch)
            assert row.source is not None and len(row.tokens) <= T and len(row.source.tokens) <= S
            for i, (start, (source, _, labels)) in enumerate(zip(row.starts.tolist(), parts_of(row), strict=True)):
                place = rows.origin(k, epoch, start)
                assert place.origin.row == place.document + 1 and place.offset == 0, i
                assert text(np.array(labels)) == ROWS[place.document]["target"]
                found.append(text(np.array(source)))
        assert sorted(found) == sorted(TEXTS)


def test_pairs_are_read_alike_from_csv_and_parquet_under_names_of_ones_own(tmp_path: Path) -> None:
    table = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(5)]
    with (tmp_path / "p.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(table)
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "p.parquet")
    columns = {"source": "question", "target": "answer"}
    of_kind = [
        opened(str(tmp_path / name), asked_for(tmp_path, T, source_len=S), "pair", columns=columns)["data.train"].rows
        for name in ("p.csv", "p.parquet")
    ]
    read = [[parts_of(rows.read(k, 0)) for k in range(rows.n_rows)] for rows in of_kind]
    assert read[0] == read[1] and sum(map(len, read[0])) == 5


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"source": "", "target": "x"}, "row 2: its source, source, is empty"),
        ({"source": "x", "target": ""}, "row 2: its target, target, is empty"),
        ({"source": "x", "target": None}, "row 2: its target, target, is null, not a text"),
        ({"source": "x"}, "row 2: has no column 'target' for its target"),
    ],
)
def test_a_row_without_a_side_is_refused_by_file_and_row(tmp_path: Path, row: Any, said: str) -> None:
    with pytest.raises(UserError) as refused:
        pairs(tmp_path, [{"source": "a", "target": "b"}, row])
    assert "p.jsonl" in str(refused.value) and said.replace("row 2", "line 2") in str(refused.value)


def test_a_pair_too_long_on_either_side_is_refused_left_out_or_cut(tmp_path: Path) -> None:
    rows = [{"source": "a", "target": "b"}, {"source": "c" * 15, "target": "d"}, {"source": "e", "target": "f" * 30}]
    with pytest.raises(UserError, match=r"2 of 3 pairs .*row 2 \(source 17, target 2 .*row 3 \(source 3, target 31"):
        pairs(tmp_path, rows)
    dropped = pairs(tmp_path, rows, pair_max_length="drop")
    assert [parts_of(dropped.read(k, 0)) for k in range(dropped.n_rows)] == [
        [([BOS, 97, EOS], [BOS, 98], [98, EOS])]
    ]
    cut = pairs(tmp_path, rows, pair_max_length="cut", packing="none")
    by_row = {cut.origin(k, 0, 0).document: parts_of(cut.read(k, 0))[0] for k in range(cut.n_rows)}
    assert by_row[1][0] == [BOS, *[99] * 15] and by_row[1][2] == [100, EOS]
    assert by_row[2] == ([BOS, 101, EOS], [BOS, *[102] * 23], [102] * 24)
    assert [(entry["row"], entry["tokens"]) for entry in cut.listed()] == [(2, 19), (3, 34)]


def test_a_source_is_held_out_with_all_of_its_targets(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", [{"source": a, "target": t} for a in TEXTS[:60] for t in ("x", "y")])
    both = opened(path, asked_for(tmp_path, T, source_len=S), "pair", valid=0.3)
    held, trained = (
        {tuple(source) for k in range(rows.n_rows) for source, *_ in parts_of(rows.read(k, 0))}
        for rows in (both["data.valid"].rows, both["data.train"].rows)
    )
    assert held and trained and not held & trained


def test_a_model_without_an_encoder_reads_no_pairs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a model without an encoder cannot read"):
        pairs(tmp_path, ROWS, source_len=None)


def test_packing_puts_pairs_where_both_sides_fit_and_few_rows_more_than_needed() -> None:
    lengths, sources = DRAW.integers(1, 60, 2000), DRAW.integers(1, 30, 2000)
    packing = PairPacking(lengths, sources, 128, 64)
    company = []
    for epoch in (0, 1):
        rows = packing.row_of_items(5, epoch)
        assert np.bincount(rows, lengths).max() <= 128 and np.bincount(rows, sources).max() <= 64
        assert len(np.unique(rows)) == packing.n_rows
        company.append({tuple(packing.items(k, 5, epoch)) for k in range(packing.n_rows)})
    assert len(company[0] & company[1]) < 0.25 * packing.n_rows
    least = max(lengths.sum() / 128, sources.sum() / 64)
    assert packing.n_rows < 1.05 * least, "two sides leave more room than one, whose rows are within 1 %"
    assert packing.fill == lengths.sum() / (packing.n_rows * 128)
    assert packing.source_fill == sources.sum() / (packing.n_rows * 64)
    alone = PairPacking(lengths, sources, 128, 64, together=False)
    assert alone.n_rows == 2000


def test_a_batch_has_both_sides_and_its_filling_is_padding(tmp_path: Path) -> None:
    rows = pairs(tmp_path, [{"source": "ab", "target": "xyz"}, {"source": "c", "target": "u"}])
    batch = collate([rows.read(0, 0), None], 8, fill=EOS, targets=("seq2seq",), source_len=10)
    inputs, source = batch.inputs, batch.inputs.source
    assert source is not None and inputs.cu_seqlens is not None and source.cu_seqlens is not None
    first, second = parts_of(rows.read(0, 0))
    assert inputs.tokens[0].tolist() == [*first[1], *second[1], EOS, EOS]
    assert source.tokens[0].tolist() == [*first[0], *second[0], *[EOS] * 3]
    assert isinstance(inputs.tokens_position, torch.Tensor) and isinstance(source.tokens_position, torch.Tensor)
    assert inputs.tokens_position.tolist() == [[0, 1, 2, 3, 0, 1, -1, -1], [-1] * 8]
    assert source.tokens_position.tolist() == [[0, 1, 2, 3, 0, 1, 2, -1, -1, -1], [-1] * 10]
    assert batch.targets["seq2seq"].labels[0].tolist() == [*first[2], *second[2], IGNORE, IGNORE]
    alone = batch.span(4, 6).inputs
    assert alone.tokens.tolist() == [second[1]] and alone.source is not None
    assert alone.source.tokens.tolist() == [second[0]]


def test_rows_and_validations_of_another_source_len_are_known_apart(tmp_path: Path) -> None:
    rows = pairs(tmp_path, ROWS)
    short, long = (Mixture([("p", rows, 1.0)], T, 0, EOS, source_len) for source_len in (S, 2 * S))
    assert list(long.changes(short.state(0))) == ["data.source_len"]
    held = {HeldOut([rows], T, None, EOS, source_len=source_len).fingerprint for source_len in (S, 2 * S)}
    assert len(held) == 2


def test_a_text_is_cut_in_half_and_no_target_is_on_its_sources_side() -> None:
    assert [part.tolist() for part in halves(np.arange(7))] == [[0, 1, 2], [3, 4, 5, 6]]
    assert [part.tolist() for part in halves(np.arange(1))] == [[0], []]


def test_halves_of_a_texts_documents_fit_their_rows_and_make_up_the_text(tmp_path: Path) -> None:
    documents = [("a" * int(n)).encode().decode() for n in DRAW.integers(0, 9, 60)]
    whole = Stream(make_source(tmp_path / "source", documents, ByteTokenizer()), 16)
    rows = Halved(whole, BOS, EOS)
    for k in range(rows.n_rows):
        row, inner = rows.read(k, 0), whole.read(k, 0)
        assert row.source is not None and len(row.tokens) <= 16 and len(row.source.tokens) <= 16
        ends = [*inner.starts[1:].tolist(), 16]
        for start, end, (source, inputs, labels) in zip(inner.starts.tolist(), ends, parts_of(row), strict=True):
            last = inner.targets["lm"].labels[end - 1]
            of_text = [*inner.tokens[start:end].tolist(), *[int(last)] * int(last >= 0)]
            target = [label for label in labels if label >= 0]
            assert inputs == [BOS, *target[:-1]]
            ended = len(of_text) > 2
            assert source[: len(source) - ended] + target == of_text and (not ended or source[-1] == EOS)
            assert len(target) == len(of_text) - max(1, len(of_text) // 2)
        at = len(row.tokens) - 1
        assert rows.origin(k, 0, at).document == whole.origin(k, 0, 15).document
