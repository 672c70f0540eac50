"""Samples as rows: whole, with their own labels and weights, from files to batches."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm import LLM, ModelArgs
from llm.batch import IGNORE
from llm.data.batch import collate
from llm.data.contamination import contamination_notes
from llm.data.heldout import HeldOut
from llm.data.mixture import Mixture
from llm.data.packed import Packed
from llm.data.samples import PARTS
from llm.data.stream import Stream
from llm.errors import UserError
from tests.data.helpers import flip_byte, loader_of, make_source, random_texts
from tests.data.sample_helpers import asked_for, chat, opened, packed, random_rows, write_rows

T = 64
ROWS = random_rows(200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    write_rows(folder / "a.jsonl", ROWS)
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> Packed:
    return packed(str(folder / "a.jsonl"), asked_for(folder, T))


def parts_of(row: Any) -> list[tuple[bytes, bytes]]:
    """(tokens, labels) of the samples of a row."""
    ends = [*row.starts[1:].tolist(), len(row.tokens)]
    labels = row.targets["lm"].labels
    return [
        (row.tokens[a:b].tobytes(), labels[a:b].tobytes()) for a, b in zip(row.starts.tolist(), ends, strict=True)
    ]


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_has_every_sample_once_with_its_labels(rows: Packed, epoch: int) -> None:
    expected = []
    for row in ROWS:
        tokens, weights = np.frombuffer(row["text"].encode(), np.uint8).astype(np.int64), np.array(row["weights"])
        labels = np.where(weights[1:] > 0, tokens[1:], IGNORE)
        expected.append((tokens[:-1].tobytes(), labels.tobytes()))
    found = [part for k in range(rows.n_rows) for part in parts_of(rows.read(k, epoch))]
    assert sorted(found) == sorted(expected)


def test_which_samples_share_a_row_changes_with_the_epoch_and_rows_do_not_grow_in_number(rows: Packed) -> None:
    first, second = (
        {tuple(items) for k in range(rows.n_rows) if len(items := rows.items(k, epoch).tolist()) > 1}
        for epoch in (0, 1)
    )
    assert len(first & second) < 0.25 * len(first)
    used = sum(len(rows.read(k, 1).tokens) for k in range(rows.n_rows))
    assert rows.fill == used / (rows.n_rows * T) > 0.9


def test_the_origin_of_a_position_is_its_samples_file_and_row(folder: Path, rows: Packed) -> None:
    for k in range(0, rows.n_rows, 7):
        row = rows.read(k, 3)
        for position, token in enumerate(row.tokens.tolist()):
            place = rows.origin(k, 3, position)
            assert place.origin.file == str(folder / "a.jsonl") and place.origin.row == place.document + 1
            assert ord(ROWS[place.document]["text"][place.offset]) == token
            assert place.length == len(ROWS[place.document]["text"])


def test_weights_are_kept_in_1024ths_and_stand_beside_the_labels(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": "abcde", "weights": [1, 0.5, 0, 1e-9, 2.3]}, {"text": "xyz"}])
    rows = packed(str(tmp_path / "a.jsonl"), asked_for(tmp_path, 8))
    row = rows.read(0, 0)
    assert row.targets["lm"].labels.tolist() == [98, IGNORE, 100, 101, 121, 122]
    weights = row.targets["lm"].weights
    assert weights is not None
    assert (weights * PARTS).tolist() == [512, 0, 1, round(2.3 * 1024), 1024, 1024]
    batch = collate([row, None], 8)
    assert batch.targets["lm"].weights is not None
    assert batch.targets["lm"].weights[0, :6].tolist() == weights.tolist()
    assert batch.inputs.cu_seqlens.tolist() == [0, 4, 6, 8, 16]
    assert batch.valid is not None and batch.valid.sum() == 6


def test_a_sample_is_blind_to_its_neighbours(rows: Packed) -> None:
    model = LLM(ModelArgs(vocab_size=260, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, ffn_hidden=32, max_seq_len=T))
    row = next(row for row in (rows.read(k, 0) for k in range(rows.n_rows)) if len(row.starts) > 2)
    batch = collate([row], T)
    changed = batch.inputs.tokens.clone()
    first, end = row.starts[1:3].tolist()
    changed[0, first:end] = (changed[0, first:end] + 1) % 256
    with torch.no_grad():
        before = model(batch.inputs).logits
        after = model(type(batch.inputs)(changed, cu_seqlens=batch.inputs.cu_seqlens)).logits
    others = torch.ones(T, dtype=torch.bool)
    others[first:end] = False
    assert torch.equal(before[0, others], after[0, others]) and not torch.equal(before, after)


@pytest.mark.parametrize("how", ["error", "drop", "cut"])
def test_what_is_longer_than_a_row_is_refused_left_out_or_cut_at_a_turn_by_file_and_row(
    tmp_path: Path, how: str
) -> None:
    data = [{"text": "abc"}, {"text": "x" * 9, "turns": [4, 6, 8]}, {"text": "y" * 10, "turns": [9]}, {"text": "z" * 8}]
    path = write_rows(tmp_path / "a.jsonl", data)
    asked = asked_for(tmp_path, 7, chat=chat(max_length=how))  # 8 tokens fit
    if how == "error":
        with pytest.raises(UserError, match=r"2 of 4 samples are longer than train.seq_len \+ 1 = 8 tokens: .*row 2 "):
            packed(path, asked)
        return
    rows = packed(path, asked)
    texts = sorted(bytes(row.tokens.astype(np.uint8)) for row in (rows.read(k, 0) for k in range(rows.n_rows)))
    notes = "\n".join(rows.notes())
    assert f"{path}, row 3 (10 tokens)" in notes
    (listed,) = (tmp_path / "cache").glob("*/longer_than_7_*.jsonl")
    assert [(json.loads(line)["row"], json.loads(line)["kept"]) for line in listed.read_text().splitlines()] == [
        (2, 8 if how == "cut" else 0), (3, 0),
    ]  # fmt: skip
    if how == "drop":
        assert texts == [b"ab", b"z" * 7] and "2 samples left out" in notes
    else:
        assert texts == [b"ab", b"x" * 7, b"z" * 7] and f"{path}, row 2 (9 tokens, 8 kept)" in notes


def test_pairs_lie_side_by_side_and_are_numbered(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"one": "abc", "other": "de"}, {"one": "fg", "other": "hijk"}])
    rows = packed(path, asked_for(tmp_path, 8), kind="byte_pairs")
    row = rows.read(0, 0)
    assert rows.n_rows == 1 and bytes(row.tokens.astype(np.uint8)) == b"abdfhij"
    assert row.values["pair"].tolist() == [1, 1, -1, 2, -2, -2, -2]
    assert row.starts.tolist() == [0, 2, 3, 4] and row.targets["dpo"].labels[0] == ord("b")
    rows.with_numbers("reference", np.array([10, 20, 30, 40], dtype=np.float32))
    assert rows.read(0, 0).values["reference"].tolist() == [10, 0, 20, 30, 40, 0, 0]
    batch = collate([None, row], 8, targets=rows.targets, values=("pair",))
    assert batch.values["pair"][1].tolist() == [1, 1, -1, 2, -2, -2, -2, 0] and not batch.values["pair"][0].any()


def test_a_share_is_held_out_by_content_wherever_it_lies(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", ROWS)
    other = write_rows(tmp_path / "b" / "b.jsonl", [{"id": 1, **row} for row in reversed(ROWS)])
    sides = [opened(given, asked_for(tmp_path, T), valid=0.2) for given in (path, other)]
    texts = []
    for found in sides:
        of_role = {}
        for role, source in found.items():
            read = [source.rows.read(k, 0) for k in range(source.rows.n_rows)]
            of_role[role] = sorted(part for row in read for part in parts_of(row))
        texts.append(of_role)
    assert texts[0] == texts[1]
    assert 20 < len(texts[0]["data.valid"]) < 60 and len(texts[0]["data.valid"] + texts[0]["data.train"]) == len(ROWS)
    assert contamination_notes([sides[0]["data.train"]], [sides[1]["data.valid"]]) == []
    whole = [opened(given, asked_for(tmp_path, T))["data.train"] for given in (path, other)]
    (note,) = contamination_notes([sides[0]["data.train"]], whole[1:])
    assert "different documents are trained on too" in note
    with pytest.raises(UserError, match="all its documents are trained on too"):
        contamination_notes(whole[:1], whole[1:])


def test_mixed_with_text_the_global_order_holds_on_any_ranks_and_resumes(tmp_path: Path, rows: Packed) -> None:
    stream = Stream(make_source(tmp_path / "text", random_texts(60)), T)
    mixture = Mixture([("chats", rows, 1.0), ("text", stream, 1.0)], T, seed=0, fill=257)

    def tokens(ranks: int, micro: int, first: int = 0) -> torch.Tensor:
        steps = []
        for rank in range(ranks):
            with loader_of(mixture, 12, micro, rank, ranks, start_row=first) as loader:
                batches = [loader.next().micro_batches for _ in range(6)]
                steps.append(torch.stack([torch.stack([m.inputs.tokens for m in step]) for step in batches]))
        return torch.stack(steps, 2).reshape(-1, T)

    whole = tokens(1, 12)
    assert torch.equal(tokens(3, 2), whole) and torch.equal(tokens(2, 3, first=24)[:48], whole[24:])
    sources, numbers, epochs = mixture.locate(np.arange(4 * mixture.n_rows))
    assert set(epochs[sources == 0].tolist()) > {0, 1}
    for source in (0, 1):
        once = np.bincount(numbers[(sources == source) & (epochs == 1)], minlength=mixture.rows_of[source])
        assert (once == 1).all()


def test_held_out_rows_are_in_one_order_over_kinds_and_layouts(tmp_path: Path, rows: Packed) -> None:
    stream = Stream(make_source(tmp_path / "text", random_texts(60)), T, to_the_end=True)
    held_out = HeldOut([rows, stream], T, 30)
    assert held_out.total == rows.n_rows + stream.n_rows
    (whole,) = held_out.batches(30, 0, 1)
    cut = [list(held_out.batches(5, rank, 2)) for rank in range(2)]
    together = torch.cat([batch.inputs.tokens for step in zip(*cut, strict=True) for batch in step])
    assert torch.equal(together, whole.inputs.tokens)
    assert HeldOut([stream, rows], T, 30).fingerprint == held_out.fingerprint


def test_the_state_of_a_run_knows_all_that_the_order_is_made_of(folder: Path, rows: Packed, tmp_path: Path) -> None:
    state = Mixture([("a", rows, 1.0)], T, seed=0).state(consumed=5)
    Mixture([("a", packed(str(folder / "a.jsonl"), asked_for(folder, T)), 1.0)], T, seed=0).check_state(state)
    other = packed(str(folder / "a.jsonl"), asked_for(folder, T, packing="none"))
    assert other.n_rows == len(ROWS)
    for changed in (other, packed(write_rows(tmp_path / "a.jsonl", ROWS[1:]), asked_for(tmp_path, T))):
        with pytest.raises(UserError, match=r"data\.sources\.a\.fingerprint"):
            Mixture([("a", changed, 1.0)], T, seed=0).check_state(state)


def test_samples_are_made_once_whatever_the_length_of_rows(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", ROWS)
    for seq_len, seed in ((T, 0), (2 * T, 3)):
        packed(path, asked_for(tmp_path, seq_len, seed=seed, packing="none"))
    (only,) = (tmp_path / "cache").iterdir()
    assert sorted(file.name for file in only.rglob("*") if file.is_file()) == ["00000.arrow", "manifest.json"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"words": "x"}, r"a\.jsonl, line 2: has no column 'text'; it has 'words'"),
        ([1], r"a\.jsonl, line 2: is a list, where an object with columns must be"),
        ({"text": ""}, r"a\.jsonl, line 2: has no tokens"),
        ({"text": "\ud800"}, r"a\.jsonl, line 2: a text of it has a lone surrogate"),
    ],
)
def test_a_row_that_is_no_sample_is_named_by_file_and_row(tmp_path: Path, row: Any, message: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "abc"}, row])
    with pytest.raises(UserError, match=message):
        packed(path, asked_for(tmp_path))
    assert not list((tmp_path / "cache").glob("*")), "whole or not at all"


def test_a_file_without_a_token_to_train_on_is_refused_and_a_row_without_one_counted(tmp_path: Path) -> None:
    none = {"text": "abc", "weights": [1, 0, 0]}  # the first token is never a target
    write_rows(tmp_path / "in" / "a.jsonl", [{"text": "abc"}, none])
    found = opened(str(tmp_path / "in"), asked_for(tmp_path))["data.train"]
    assert any("2 of 6 tokens are trained on (33.3%); 1 row without any" in note for note in found.notes)
    write_rows(tmp_path / "in" / "b.jsonl", [none, none])
    with pytest.raises(UserError, match=r"b\.jsonl: no token to train on in its 2 rows"):
        opened(str(tmp_path / "in"), asked_for(tmp_path))


@pytest.mark.parametrize("column", ["tokens", "weights", "turn_ends"])
def test_a_damaged_shard_is_named(tmp_path: Path, column: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "abcdefgh" * 4, "weights": [3] * 32, "turns": [7, 77]}])
    rows = packed(path, asked_for(tmp_path))
    (shard,) = rows.source.path.glob("shards/*.arrow")
    what = {
        "tokens": np.frombuffer(b"abcdefgh", np.uint8).astype(np.uint16).tobytes(),
        "weights": np.full(8, 3 * PARTS, np.uint16).tobytes(),
        "turn_ends": np.array([7, 77], np.int32).tobytes(),
    }
    flip_byte(shard, shard.read_bytes().index(what[column]))
    with pytest.raises(UserError, match=r"damaged shard .*00000\.arrow"):
        packed(path, asked_for(tmp_path)).read(0, 0)


def test_keys_of_other_kinds_and_files_without_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"a\.txt: is no file of rows; kind byte_samples is read from .jsonl"):
        opened(str(tmp_path / "a.txt"), asked_for(tmp_path))
    native = make_source(tmp_path / "native", ["text"])
    with pytest.raises(UserError, match="native: are token shards, which hold text"):
        opened(str(native.path), asked_for(tmp_path))
    path = write_rows(tmp_path / "a.jsonl", ROWS[:3])
    with pytest.raises(UserError, match=r"data\.packing=concat: not for rows of kind byte_samples; possible is best_"):
        opened(path, asked_for(tmp_path, packing="concat"))
    with pytest.raises(UserError, match=r"data\.train\.kind=chats: no such kind of data; known are .*byte_pairs"):
        opened(path, asked_for(tmp_path), kind="chats")
