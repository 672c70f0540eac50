"""The tokens of images in a run: added to its tokenizer on request, known to its model, shown as grids; and where a
loader goes on among rows with images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llm.batch import Batch, Counts
from llm.data.loader import TrainLoader
from llm.data.mixture import Mixture
from llm.errors import UserError
from llm.tokenizer import ByteTokenizer
from llm.tokenizers.extended import ExtendedTokenizer, with_tokens
from llm.train.chat import run_tokenizer
from llm.train.config import RunConfig
from llm.train.config.load import validate
from llm.train.settle import with_vocabulary
from llm.train.show import show_row
from tests.data.image_helpers import MARKS, THREE_TILES, TOKENIZER, asked_with_vision, picture, put
from tests.data.sample_helpers import opened, write_rows
from tests.distributed.harness import tiny_config
from vision.tokens import NAMES

VISION = {"image_size": 8, "patch_size": 2, "dim": 8, "n_layers": 1, "n_heads": 2, "output_dim": 8}


def config(folder: Path, slot: int = -1, add_tokens: bool = True) -> RunConfig:
    raw = tiny_config(folder, data={"train": [{"path": "r.jsonl", "kind": "image_text"}], "valid": None})
    raw["model"] |= {"vocab_size": -1, "vision": {**VISION, "patch_token_id": slot}}
    return validate({**raw, "tokenizer": {"kind": "bytes"}, "chat": {"add_tokens": add_tokens}}, "config")


def rows(folder: Path, n: int = 12) -> Any:
    """Packed conversations with a picture of three tiles in each second one."""
    put(folder / "a.png", picture(THREE_TILES))
    answer = {"role": "assistant", "content": "yes"}
    listed = []
    for i in range(n):
        asked = {"role": "user", "content": f"{'<image>' if i % 2 else ''}is it {i}?"}
        listed.append({"messages": [asked, answer], "images": ["a.png"] if i % 2 else []})
    path = write_rows(folder / "r.jsonl", listed)
    return opened(path, asked_with_vision(folder, packing="none"), "chat")["data.train"].rows


def test_the_tokens_of_images_are_added_on_request_and_the_model_learns_its_slot(tmp_path: Path) -> None:
    tokenizer, _ = run_tokenizer(config(tmp_path))
    assert set(NAMES.values()) <= tokenizer.control_tokens.keys()
    model = with_vocabulary(config(tmp_path), tokenizer).model
    assert model.vision is not None and model.vision.patch_token_id == tokenizer.control_tokens["<|patch|>"]
    assert model.vocab_size == tokenizer.vocab_size


def test_a_tokenizer_without_the_tokens_of_images_is_refused_with_what_adds_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the tokenizer has no <\|image_start\|>.*chat.add_tokens=true adds them"):
        run_tokenizer(config(tmp_path, add_tokens=False))


def test_another_slot_than_the_tokenizers_is_refused_with_both_numbers(tmp_path: Path) -> None:
    wrong = config(tmp_path, slot=7)
    with pytest.raises(UserError, match=rf"model.vision.patch_token_id=7: the tokenizer's .* is {MARKS.patch}; use -1"):
        with_vocabulary(wrong, TOKENIZER)


def test_tokens_that_are_added_later_follow_those_that_were_there_under_the_same_ids() -> None:
    """As one list of both: a checkpoint keeps only the list."""
    first = with_tokens(ByteTokenizer(), ["<|a|>"])
    both = with_tokens(first, ["<|b|>"])
    assert both.fingerprint == ExtendedTokenizer(ByteTokenizer(), ["<|a|>", "<|b|>"]).fingerprint
    assert both.control_tokens["<|a|>"] == first.control_tokens["<|a|>"] == both.control_tokens["<|b|>"] - 1


def test_an_image_is_shown_as_its_grid(tmp_path: Path) -> None:
    mixture = Mixture([("rows", rows(tmp_path), 1.0)], 128, seed=0)
    text = "\n".join(line for i in range(12) for line in show_row(mixture, i, TOKENIZER))
    assert "[image: 1 x 2 tiles and the whole, 12 slots]is it" in text and "<|patch|>" not in text


def test_a_loader_that_goes_on_reads_the_images_of_one_that_never_stopped(tmp_path: Path) -> None:
    mixture = Mixture([("rows", rows(tmp_path), 1.0)], 128, seed=0)

    def count(batches: Sequence[Batch]) -> Counts:
        return Counts(0, 0, {}, {})

    def steps(start: int, n: int) -> list[list[torch.Tensor | None]]:
        sizes: dict[str, Any] = {"seq_len": 128, "global_batch_size": 4, "micro_batch_size": 2}
        with TrainLoader(mixture, **sizes, dp_rank=0, dp_size=1, count=count, start_row=start) as loader:
            return [[batch.inputs.images for batch in loader.next().micro_batches] for _ in range(n)]

    whole, later = steps(0, 5), steps(8, 3)
    for one, other in zip((image for step in whole[2:] for image in step), (i for s in later for i in s), strict=True):
        assert (one is None and other is None) or (one is not None and other is not None and torch.equal(one, other))
    assert any(image is not None for step in later for image in step)
