"""tools/captions.py: a caption lies on one side only, and its loss is that of its own row alone."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from llm import LLM, ModelArgs
from llm.datatypes import TransformerInput
from llm.errors import UserError
from tools.captions import caption_nll, prepare

VISION = {
    "image_size": 8, "patch_size": 2, "dim": 16, "n_layers": 1, "n_heads": 2, "output_dim": 16, "patch_token_id": 3
}  # fmt: skip
ARGS = ModelArgs.model_validate(
    {"dim": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 40, "ffn_hidden": 32, "vision": VISION}
)


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 255 - level, 0)).save(file, "PNG")
    return file.getvalue()


def table(file: Path, captions: list[str]) -> Path:
    rows = [{"picture": {"bytes": png(i), "path": None}, "name": caption} for i, caption in enumerate(captions)]
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def test_no_caption_lies_on_both_sides_and_none_is_lost(tmp_path: Path) -> None:
    captions = [f"thing {i % 40}" for i in range(60)]
    data = table(tmp_path / "pictures.parquet", captions)
    prepare(str(data), str(tmp_path / "rows"), image="picture", text="name", held_out=0.3)
    sides = [pq.read_table(tmp_path / "rows" / f"{name}.parquet").to_pylist() for name in ("train", "valid")]
    texts = [[row["text"] for row in side] for side in sides]
    assert not set(texts[0]) & set(texts[1])
    assert sorted(texts[0] + texts[1]) == sorted(captions)
    assert {row["image"] for side in sides for row in side} == {png(i) for i in range(60)}


@torch.no_grad()
def test_a_captions_loss_is_that_of_its_row_alone_and_of_its_caption_only() -> None:
    """1e-5: float32 sums over rows of another length."""
    model, draw = LLM(ARGS, seed=1), np.random.default_rng(0)
    slots = [3] * ARGS.vision.tokens_per_tile  # type: ignore[union-attr]
    sequences = [([1, *slots], [7, 9, 2]), ([1, *slots, 3, *slots[1:]], [8, 2]), ([1, *slots], [5, 6, 7, 8, 2])]
    tiles = [draw.integers(0, 256, (n, 3, 8, 8), dtype=np.uint8) for n in (1, 2, 1)]
    together = caption_nll(model, sequences, tiles)
    for (before, caption), own, found in zip(sequences, tiles, together, strict=True):
        ids = torch.tensor([[*before, *caption]])
        logits = model(TransformerInput(ids[:, :-1], images=torch.from_numpy(own))).logits
        assert logits is not None
        nll = -logits[0].log_softmax(-1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        assert abs(float(nll[-len(caption) :].sum()) - found) < 1e-5
    assert (caption_nll(model, sequences[:1], tiles[2:]) != together[0]).all(), "the picture matters"


@pytest.mark.parametrize(
    ("text", "image", "said"),
    [
        ("caption", "picture", "no column 'caption'; it has picture, name"),
        ("name", "name", "row 1: expected a picture"),
    ],
)
def test_a_wrong_column_is_named(text: str, image: str, said: str, tmp_path: Path) -> None:
    data = table(tmp_path / "pictures.parquet", ["a", "b"])
    with pytest.raises(UserError, match=said):
        prepare(str(data), str(tmp_path / "rows"), image=image, text=text)
    assert not (tmp_path / "rows").exists()
