"""Held-out text is never trained on: a share by the hash of each document, or files that lie among the others."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llm.data.contamination import contamination_notes
from llm.data.kinds import Asked
from llm.data.opening import open_rows, prepare_rows
from llm.data.source import TokenSource
from llm.data.sources import SourceSpec, check_data, sides
from llm.data.split import Split, text_digest
from llm.data.text import open_data, prepare_data
from llm.errors import UserError
from llm.tokenizer import ByteTokenizer, CharacterTokenizer, Tokenizer
from tests.data.helpers import make_source

TEXTS = [f"document number {i} " * (i % 5 + 1) for i in range(400)]
BYTES = ByteTokenizer()


def jsonl(path: Path, texts: Sequence[str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def opened(
    cache: Path, train: object, valid: object, tokenizer: Tokenizer = BYTES
) -> dict[str, list[tuple[str, TokenSource, float]]]:
    """What a run opens, as it does."""
    of_role = sides(train, valid)  # type: ignore[arg-type]
    for side in of_role.values():
        check_data(side, cache_dir=cache)
    for side in of_role.values():
        prepare_data(side, tokenizer, cache)
    return {role: open_data(side, tokenizer, cache) for role, side in of_role.items()}


def texts_of(sources: list[tuple[str, TokenSource, float]], tokenizer: Tokenizer = BYTES) -> list[str]:
    found = []
    for _, source, _ in sources:
        tokens = np.empty(source.n_tokens, np.int64)
        starts = [*source.read(0, tokens), source.n_tokens]
        found += [tokenizer.decode(tokens[a:b]) for a, b in zip(starts, starts[1:], strict=False)]
    return found


def test_a_share_is_held_out_and_not_trained_on(tmp_path: Path) -> None:
    data = opened(tmp_path / "cache", jsonl(tmp_path / "a.jsonl", TEXTS), 0.1)
    train, valid = texts_of(data["data.train"]), texts_of(data["data.valid"])
    assert sorted(train + valid) == sorted(TEXTS)
    assert 20 <= len(valid) <= 60  # 40 of 400, give or take three standard deviations of 6
    assert [name for name, _, _ in data["data.train"]] == [name for name, _, _ in data["data.valid"]] == ["a"]
    assert any(f"{len(valid)} documents of data.train=" in note for note in data["data.valid"][0][1].notes)
    assert any(f"{len(train)} documents to train on" in note for note in data["data.train"][0][1].notes)


def test_the_same_documents_are_held_out_whatever_files_order_and_tokenizer(tmp_path: Path) -> None:
    one = opened(tmp_path / "cache", jsonl(tmp_path / "a.jsonl", TEXTS), 0.1)
    shuffled = random.Random(1).sample(TEXTS, len(TEXTS))
    jsonl(tmp_path / "many" / "z.jsonl", shuffled[:300])
    jsonl(tmp_path / "many" / "b.ndjson", shuffled[300:])
    characters = CharacterTokenizer("".join(sorted(set("".join(TEXTS)))))
    other = opened(tmp_path / "cache", str(tmp_path / "many"), 0.1, characters)
    assert sorted(texts_of(other["data.valid"], characters)) == sorted(texts_of(one["data.valid"]))


def test_a_larger_share_holds_out_the_documents_of_a_smaller_one_too() -> None:
    digests = [text_digest(text.encode()) for text in TEXTS]
    kept = [{d for d in digests if Split(share, "valid").keeps(d)} for share in (0.05, 0.2, 0.9)]
    assert kept[0] < kept[1] < kept[2]
    assert all(Split(0.2, "train").keeps(d) != Split(0.2, "valid").keeps(d) for d in digests)


def test_shards_are_split_as_their_text_would_be_with_their_origins(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", TEXTS)
    from_text = opened(tmp_path / "cache", str(tmp_path / "a.jsonl"), 0.1)
    prepare_data(str(tmp_path / "a.jsonl"), BYTES, tmp_path / "whole")
    ((_, whole, _),) = open_data(str(tmp_path / "a.jsonl"), BYTES, tmp_path / "whole")
    from_shards = opened(tmp_path / "cache", str(whole.path), 0.1)
    for role in ("data.train", "data.valid"):
        (_, ours, _), (_, theirs, _) = from_shards[role][0], from_text[role][0]
        assert texts_of(from_shards[role]) == texts_of(from_text[role])
        assert [ours.origin(i) for i in range(ours.n_docs)] == [theirs.origin(i) for i in range(theirs.n_docs)]
        assert TokenSource.open(ours.path, verify=True).n_bytes == theirs.n_bytes


def test_a_share_of_a_mixture_is_held_out_of_each_source(tmp_path: Path) -> None:
    specs = [
        SourceSpec(path=jsonl(tmp_path / "a.jsonl", TEXTS[:200]), weight=3),
        SourceSpec(path=jsonl(tmp_path / "b.jsonl", TEXTS[200:])),
    ]
    data = opened(tmp_path / "cache", specs, 0.1)
    assert [name for name, _, _ in data["data.valid"]] == ["a", "b"]
    for i, (_, source, _) in enumerate(data["data.valid"]):
        assert set(texts_of([("", source, 1.0)])) < set(TEXTS[200 * i : 200 * i + 200])


@pytest.mark.parametrize(("share", "what"), [(1e-9, "none is held out"), (1 - 1e-9, "all are held out")])
def test_a_share_that_leaves_nothing_on_a_side_is_refused(tmp_path: Path, share: float, what: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS[:3])
    with pytest.raises(UserError, match=rf"data\.valid=.*of the documents of data\.train=.*a\.jsonl {what}"):
        opened(tmp_path / "cache", path, share)


def test_an_empty_file_is_not_refused_for_the_share(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(UserError, match=r"data\.train=.*a\.jsonl: has no documents"):
        opened(tmp_path / "cache", str(tmp_path / "a.jsonl"), 0.1)


def test_the_held_out_file_in_the_folder_is_left_out_and_said(tmp_path: Path) -> None:
    jsonl(tmp_path / "corp" / "a.jsonl", TEXTS[:300])
    valid = jsonl(tmp_path / "corp" / "held" / "valid.jsonl", TEXTS[300:])
    (tmp_path / "by_link.jsonl").symlink_to(valid)
    for given in (valid, str(tmp_path / "by_link.jsonl"), str(tmp_path / "corp" / "held")):
        data = opened(tmp_path / "cache", str(tmp_path / "corp"), given)
        assert texts_of(data["data.train"]) == TEXTS[:300] and texts_of(data["data.valid"]) == TEXTS[300:]
        assert "left out: held/valid.jsonl (held out, data.valid)" in data["data.train"][0][1].notes[0]


def test_the_same_text_on_both_sides_is_refused_before_any_work(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "corp" / "a.jsonl", TEXTS)
    for train, valid in ((path, path), (str(tmp_path / "corp"), path), (path, str(tmp_path / "corp"))):
        with pytest.raises(UserError, match=r"data\.train=.*: all its files are in data\.valid too"):
            opened(tmp_path / "cache", train, valid)
    native = make_source(tmp_path / "native", TEXTS)
    with pytest.raises(UserError, match=r"data\.train=.*native: is data\.valid too"):
        opened(tmp_path / "cache", str(native.path), str(native.path))
    assert not (tmp_path / "cache").exists()


def test_copies_are_found_by_their_documents(tmp_path: Path) -> None:
    train, copy = jsonl(tmp_path / "a.jsonl", TEXTS[:50]), jsonl(tmp_path / "copy.jsonl", TEXTS[:50][::-1])

    def notes(train: str, valid: str) -> list[str]:
        asked = Asked(ByteTokenizer(), tmp_path / "cache", seq_len=16, seed=0)
        found = []
        for side in sides(train, valid).values():
            prepare_rows(side, asked)
            found.append([source for _, source, _ in open_rows(side, asked)])
        return contamination_notes(*found)

    with pytest.raises(UserError, match=r"data\.valid=.*copy\.jsonl: all its documents are trained on too"):
        notes(train, copy)
    assert notes(train, jsonl(tmp_path / "other.jsonl", TEXTS[50:60])) == []
    (note,) = notes(train, jsonl(tmp_path / "some.jsonl", TEXTS[45:60]))
    assert "5 of its 15 different documents are trained on too" in note and "some.jsonl" in note
    # text that lies in shards cannot be left out of them
    with pytest.raises(UserError, match="all its documents are trained on too"):
        notes(str(make_source(tmp_path / "native", TEXTS).path), jsonl(tmp_path / "few.jsonl", TEXTS[3:5]))
