"""Rows with images: read, cut once, stored, packed and put side by side."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from llm import LLM, ModelArgs
from llm.data.batch import collate
from llm.data.images import ImageOptions
from llm.data.packed import Packed
from llm.data.rows import tiles_of
from llm.errors import UserError
from tests.data.image_helpers import (
    MARKS,
    ONE_TILE,
    SIDE,
    SLOTS,
    THREE_TILES,
    TOKENIZER,
    VISION,
    asked_with_vision,
    picture,
    put,
)
from tests.data.sample_helpers import asked_for, opened, write_rows
from vision.opening import ImageLimits, open_image
from vision.preprocess import image_text
from vision.tiles import cut

SIZES = (ONE_TILE, THREE_TILES, (SIDE, 2 * SIDE))


def asks(content: Any, answer: str = "yes", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], **more}


def mixed(folder: Path, n: int = 24) -> str:
    """Conversations with 0 to 3 images."""
    for i, size in enumerate(SIZES):
        put(folder / f"{i}.png", picture(size, i))
    draw = np.random.default_rng(1)
    rows = []
    for i in range(n):
        images = [f"{k}.png" for k in draw.integers(0, len(SIZES), i % 4)]
        rows.append(asks("".join(f"<image>{'q' * (i % 5)}" for _ in images) + f"what {i}", images=images))
    return write_rows(folder / "rows.jsonl", rows)


def rows_of(path: str, asked: Any, kind: str = "chat", columns: dict[str, str] | None = None) -> Packed:
    rows = opened(path, asked, kind, columns=columns)["data.train"].rows
    assert isinstance(rows, Packed)
    return rows


def refused(path: str, asked: Any, kind: str = "chat") -> str:
    with pytest.raises(UserError) as error:
        opened(path, asked, kind)
    assert "\n" not in str(error.value)
    return str(error.value)


def samples_of(rows: Packed, epoch: int = 0) -> list[tuple[bytes, bytes]]:
    """(tokens, tiles) of every sample that the rows of an epoch hold, sorted."""
    found = []
    for k in range(rows.n_rows):
        row, at = rows.read(k, epoch), 0
        for start, end in zip(row.starts, [*row.starts[1:], len(row.tokens)], strict=True):
            tokens = row.tokens[start:end]
            n = int((tokens == MARKS.patch).sum()) // SLOTS
            images = b"" if row.images is None else row.images[at : at + n].tobytes()
            found.append((tokens.tobytes(), images))
            at += n
    return sorted(found)


def test_every_row_of_every_epoch_has_slots_for_its_tiles_and_no_image_is_cut(tmp_path: Path) -> None:
    rows = rows_of(mixed(tmp_path), asked_with_vision(tmp_path))
    for epoch in range(3):
        for k in range(rows.n_rows):
            row = rows.read(k, epoch)
            n_tiles = 0 if row.images is None else len(row.images)
            assert int((row.tokens == MARKS.patch).sum()) == n_tiles * SLOTS == tiles_of(rows, k, epoch) * SLOTS
            counts = [int((row.tokens == mark).sum()) for mark in (MARKS.image_start, MARKS.image, MARKS.image_end)]
            assert counts[0] == counts[1] == counts[2]
    assert rows.n_rows < 24


def test_packed_and_unpacked_rows_hold_the_same_samples_with_the_same_tiles(tmp_path: Path) -> None:
    path = mixed(tmp_path)
    together = rows_of(path, asked_with_vision(tmp_path))
    alone = rows_of(path, asked_with_vision(tmp_path, packing="none"))
    assert samples_of(together) == samples_of(together, epoch=1) == samples_of(alone)


def test_packed_and_unpacked_rows_have_the_same_loss(tmp_path: Path) -> None:
    """1e-5 of the sum: float32 products over rows of other lengths."""
    path = mixed(tmp_path)
    tower = {"image_size": SIDE, "patch_size": 2, "dim": 16, "n_layers": 1, "n_heads": 2, "output_dim": 16}
    args = {"dim": 16, "n_layers": 2, "n_heads": 2, "ffn_hidden": 32, "vocab_size": TOKENIZER.vocab_size}
    model = LLM(ModelArgs.model_validate({**args, "vision": {**tower, "patch_token_id": MARKS.patch}}), seed=3)

    def loss(packing: str) -> float:
        rows = rows_of(path, asked_with_vision(tmp_path, packing=packing))
        batches = (collate([rows.read(k, 0)], 128) for k in range(rows.n_rows))
        with torch.no_grad():
            found = [model(batch.inputs, labels=batch.targets["lm"].labels).loss_sum for batch in batches]
        return float(sum(found))

    assert loss("none") == pytest.approx(loss("best_fit"), rel=1e-5)


def test_tiles_of_a_batch_are_those_of_its_images_in_the_order_of_the_slots(tmp_path: Path) -> None:
    rows = rows_of(mixed(tmp_path), asked_with_vision(tmp_path, seq_len=160))
    found = [rows.read(k, 0) for k in range(3)]
    batch = collate([found[0], None, found[1], found[2]], 160)
    assert batch.inputs.images is not None
    wanted = [row.images for row in found if row.images is not None]
    assert np.array_equal(batch.inputs.images.numpy(), np.concatenate(wanted))
    assert int((batch.inputs.tokens == MARKS.patch).sum()) == len(batch.inputs.images) * SLOTS
    text = write_rows(tmp_path / "text.jsonl", [asks("no picture, <image> is text")])
    assert collate([rows_of(text, asked_with_vision(tmp_path)).read(0, 0)], 128).inputs.images is None


def test_an_image_in_a_conversation_is_its_tokens_where_it_stands_and_trains_nowhere(tmp_path: Path) -> None:
    content = picture(THREE_TILES)
    put(tmp_path / "a.png", content)
    asked = asked_with_vision(tmp_path, chat=asked_with_vision(tmp_path).chat.model_copy(update={"train_on": "all"}))
    row = rows_of(write_rows(tmp_path / "r.jsonl", [asks("one <image>two", images=["a.png"])]), asked).read(0, 0)
    tiles, grid = cut(open_image(content), VISION)
    image = image_text(grid, VISION, TOKENIZER)
    start, end = (TOKENIZER.control_tokens[name] for name in ("<|im_start|>", "<|im_end|>"))
    said = [start, *b"user\none ", *image, *b"two", end, *b"\n", start, *b"assistant\nyes", end, *b"\n"]
    assert row.tokens.tolist() == said[:-1]
    labels = row.targets["lm"].labels
    inside = np.flatnonzero((row.tokens == MARKS.image_start) | (row.tokens == MARKS.image_end))
    assert (labels[inside[0] - 1 : inside[1]] < 0).all() and (labels[inside[1] : inside[1] + 2] >= 0).all()
    assert row.images is not None and np.array_equal(row.images, tiles)


def test_all_spellings_of_an_image_give_the_same_row(tmp_path: Path) -> None:
    content = picture()
    put(tmp_path / "a.png", content)
    text, answer = {"type": "text", "text": "who"}, {"role": "assistant", "content": "me"}
    address = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    turns = [{"from": "human", "value": "<image>who"}, {"from": "gpt", "value": "me"}]
    spelled = [
        {"image": "a.png", "conversations": turns},
        {"images": ["a.png"], "conversations": turns},
        asks("<image>who", "me", images=["a.png"]),
        asks("<image>who", "me", images=[{"bytes": None, "path": "a.png"}]),
        asks([{"type": "image"}, text], "me", images=["a.png"]),
        asks([{"type": "image", "path": "a.png"}, text], "me"),
        asks([{"type": "image", "image": "a.png"}, text], "me"),
        asks([{"type": "image_url", "value": "a.png"}, {"type": "text", "value": "who"}], "me"),
        asks([{"type": "image_url", "image_url": {"url": address}}, text], "me"),
        {"messages": [{"role": "user", "content": "<image>who"}, answer], "images": json.dumps(["a.png"])},
    ]
    rows = rows_of(write_rows(tmp_path / "r.jsonl", spelled), asked_with_vision(tmp_path, packing="none"))
    assert len(set(samples_of(rows))) == 1 and rows.n_rows == len(spelled)


@pytest.mark.parametrize("as_struct", [False, True])
def test_captions_are_read_from_bytes_in_parquet_and_train_their_text_and_end(tmp_path: Path, as_struct: bool) -> None:
    contents = [picture(size, i) for i, size in enumerate(SIZES)]
    images = [{"bytes": content, "path": None} for content in contents] if as_struct else contents
    pq.write_table(pa.table({"image": images, "name": ["cat", "dog", "a fish"]}), tmp_path / "r.parquet")
    asked = asked_with_vision(tmp_path, packing="none")
    rows = rows_of(str(tmp_path / "r.parquet"), asked, "image_text", {"text": "name"})
    assert rows.n_rows == 3
    for k in range(3):
        row = rows.read(k, 0)
        labels = row.targets["lm"].labels
        text = bytes(label for label in labels[labels >= 0][:-1].tolist()).decode()
        number = ["cat", "dog", "a fish"].index(text)
        tiles, grid = cut(open_image(contents[number]), VISION)
        image = image_text(grid, VISION, TOKENIZER)
        assert row.images is not None and np.array_equal(row.images, tiles)
        assert row.tokens.tolist() == [*TOKENIZER.begin_ids, *image, *text.encode()]
        assert labels[labels >= 0][-1] == TOKENIZER.eos_id


def test_what_somebody_typed_is_no_image(tmp_path: Path) -> None:
    put(tmp_path / "a.png", picture())
    typed = "<image> <|image|><|patch|><|image_start|>"
    rows = [asks(typed), asks([{"type": "text", "text": typed}, {"type": "image", "path": "a.png"}])]
    found = rows_of(write_rows(tmp_path / "r.jsonl", rows), asked_with_vision(tmp_path, packing="none"))
    counts = sorted(int((found.read(k, 0).tokens == MARKS.patch).sum()) for k in range(2))
    assert counts == [0, SLOTS]
    assert all(typed.encode() in bytes(found.read(k, 0).tokens[found.read(k, 0).tokens < 256].tolist()) for k in (0, 1))


def bad(tmp_path: Path) -> None:
    put(tmp_path / "data" / "a.png", picture())
    put(tmp_path / "data" / "cut.png", picture((20, 20))[:900])
    put(tmp_path / "data" / "text.png", b"no picture")
    put(tmp_path / "data" / "big.png", picture((40, 40)))
    put(tmp_path / "secret.png", picture())
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")


@pytest.mark.parametrize(
    "row, reason",
    [
        (asks("who", images=["a.png"]), "has 1 image in its columns, and 0 x <image>"),
        (asks("<image><image>who", images=["a.png"]), "has 1 image in its columns, and 2 x <image>"),
        (asks("<image>who", images=["no.png"]), "its image 1 (no.png) does not exist"),
        (asks("<image><image>who", images=["a.png", "cut.png"]), "its image 2 (cut.png) cannot be decoded"),
        (asks("<image>who", images=["text.png"]), "its image 1 (text.png) is no picture of a known format"),
        (asks("<image>who", images=["big.png"]), "its image 1 (big.png) has 40 x 40 pixels, more than max_pixels=1000"),
        (asks("<image>who", images=["../secret.png"]), "image '../secret.png' is outside image_root"),
        (asks("<image>who", images=["link.png"]), "image 'link.png' is outside image_root"),
        (asks("<image>who", images=["/etc/hostname"]), "image '/etc/hostname' is outside image_root"),
        (asks("<image>who", images=["https://x.org/a.png"]), "is an address; only files are read"),
        (asks("<image>who", images=[7]), "entry 1 of its images is neither a path nor bytes"),
    ],
)
def test_a_bad_image_is_refused_by_file_and_row(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    bad(tmp_path)
    path = write_rows(tmp_path / "data" / "r.jsonl", [asks("fine"), row])
    said = refused(path, asked_with_vision(tmp_path, images=ImageOptions(limits=ImageLimits(max_pixels=1000))))
    assert "r.jsonl, line 2: " in said and reason in said


def test_a_model_without_vision_refuses_images_by_file_and_row(tmp_path: Path) -> None:
    put(tmp_path / "a.png", picture())
    path = write_rows(tmp_path / "r.jsonl", [asks("fine"), asks("<image>who", images=["a.png"])])
    asked = asked_for(tmp_path, chat=asked_with_vision(tmp_path).chat)
    asked = type(asked)(**{**vars(asked), "tokenizer": TOKENIZER})
    said = refused(path, asked)
    assert "r.jsonl, line 2: has images, which a model without vision cannot read" in said


def test_rows_with_broken_images_are_dropped_on_request_and_counted(tmp_path: Path) -> None:
    bad(tmp_path)
    names = ["a.png", "no.png", "a.png", "cut.png"]
    path = write_rows(tmp_path / "data" / "r.jsonl", [asks(f"<image>{i}", images=[n]) for i, n in enumerate(names)])
    found = opened(path, asked_with_vision(tmp_path, images=ImageOptions(bad="drop"), packing="none"), "chat")
    assert found["data.train"].rows.n_rows == 2
    (line,) = [note for note in found["data.train"].notes if "left out for an image" in note]
    assert "2 rows left out" in line and "line 2: " in line and "line 4: " in line
    outside = write_rows(tmp_path / "data" / "s.jsonl", [asks("<image>", images=["../secret.png"])])
    assert "outside image_root" in refused(outside, asked_with_vision(tmp_path, images=ImageOptions(bad="drop")))


def test_paths_begin_at_the_image_root_or_else_beside_the_rows(tmp_path: Path) -> None:
    put(tmp_path / "pictures" / "a.png", picture())
    path = write_rows(tmp_path / "data" / "r.jsonl", [asks("<image>who", images=["a.png"])])
    assert "does not exist" in refused(path, asked_with_vision(tmp_path))
    root = ImageOptions(root=str(tmp_path / "pictures"))
    assert rows_of(path, asked_with_vision(tmp_path, images=root)).read(0, 0).images is not None
    nowhere = ImageOptions(root=str(tmp_path / "none"))
    said = refused(path, asked_with_vision(tmp_path, images=nowhere))
    assert f"data.image_root={tmp_path / 'none'}: no such folder" in said


def test_a_sample_cut_at_the_end_of_a_turn_keeps_the_images_before_it(tmp_path: Path) -> None:
    for i in range(2):
        put(tmp_path / f"{i}.png", picture(seed=i))
    turns = [*asks("<image>one")["messages"], *asks("<image>" + "two" * 30)["messages"]]
    path = write_rows(tmp_path / "r.jsonl", [{"messages": turns, "images": ["0.png", "1.png"]}])
    options = asked_with_vision(tmp_path).chat.model_copy(update={"max_length": "cut"})
    rows = rows_of(path, asked_with_vision(tmp_path, seq_len=64, chat=options))
    row = rows.read(0, 0)
    assert row.images is not None and len(row.images) == rows.tiles(0, 0) == 1
    assert int((row.tokens == MARKS.patch).sum()) == SLOTS


def test_held_out_conversations_are_the_same_wherever_their_pictures_lie(tmp_path: Path) -> None:
    kept = []
    for name in ("one", "other"):
        path = mixed(tmp_path / name, 40)
        found = opened(path, asked_with_vision(tmp_path / name, packing="none"), "chat", valid=0.3)
        kept.append([samples_of(found[role].rows) for role in ("data.train", "data.valid")])
    assert kept[0] == kept[1] and all(kept[0])


def test_other_pictures_are_other_data_and_the_same_ones_are_not(tmp_path: Path) -> None:
    prints = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        put(tmp_path / name / "a.png", picture(seed=seed))
        path = write_rows(tmp_path / name / "r.jsonl", [asks("<image>who", images=["a.png"])])
        prints.append(rows_of(path, asked_with_vision(tmp_path / name)).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_a_flipped_byte_in_the_tiles_is_found_when_its_sample_is_read(tmp_path: Path) -> None:
    path = mixed(tmp_path)
    rows = rows_of(path, asked_with_vision(tmp_path))
    (shard,) = [rows.source.shard_path(entry) for entry in rows.source.manifest.shards]
    content = bytearray(shard.read_bytes())
    tiles = next(image for k in range(rows.n_rows) if (image := rows.read(k, 0).images) is not None)[0].tobytes()
    content[content.index(tiles)] ^= 1
    shard.write_bytes(content)
    again = type(rows)(type(rows.source).open(rows.source.path), rows.seq_len, 0)
    with pytest.raises(UserError, match="damaged shard .* the tiles of sample"):
        for k in range(again.n_rows):
            again.read(k, 0)
