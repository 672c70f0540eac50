"""The prompts of a run's samples, with images."""

from pathlib import Path

import pytest
import torch

from llm import LLM
from llm.errors import UserError
from llm.tasks import task_named
from llm.tokenizer import load_tokenizer
from llm.tokenizers.chat import ChatTemplate
from llm.train.config import RunConfig, validate
from llm.train.preflight import ALONE
from llm.train.prompts import encode_prompts
from tests.distributed.harness import tiny_config
from tests.vision.pictures import picture
from vision.preprocess import image_text
from vision.tiles import cut
from vision.tokens import NAMES

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def config(folder: Path, images: object, prompts: list[str], vision: bool = True, **data: int) -> RunConfig:
    tower = {"image_size": 8, "patch_size": 2, "dim": 16, "n_layers": 1, "n_heads": 2, "output_dim": 16}
    raw = tiny_config(
        folder,
        data=data,
        model={"vision": tower, "vocab_size": 264} if vision else {},
        tokenizer={"kind": "bytes", "added_tokens": list(NAMES.values())},
        eval={"prompts": prompts, "images": images, "sample_interval": 5},
    )
    return validate(raw, "config")


def test_the_images_of_a_prompt_stand_in_it_and_their_tiles_beside_it(tmp_path: Path) -> None:
    picture(8, 16).save(tmp_path / "a.png")
    picture(5, 5, 1).save(tmp_path / "b.png")
    a, b = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    made = config(tmp_path, [[], a, [b, b]], ["x", "what?", "<image>y<image>", "z"])
    tokenizer = load_tokenizer(made.tokenizer)
    found = encode_prompts(made, tokenizer, ALONE)
    vision = made.model.vision
    assert vision is not None
    wide, of_wide = cut(picture(8, 16), vision)
    small, of_small = cut(picture(5, 5, 1), vision)
    first, second = (image_text(grid, vision, tokenizer) for grid in (of_wide, of_small))
    begin = list(tokenizer.begin_ids)
    assert found.ids == [
        [*begin, *b"x"], [*begin, *first, *b"what?"], [*begin, *second, *b"y", *second], [*begin, *b"z"]
    ]  # fmt: skip
    assert found.images[0] is None and found.images[3] is None
    assert torch.equal(found.images[1], torch.from_numpy(wide))
    assert torch.equal(found.images[2], torch.from_numpy(small).repeat(2, 1, 1, 1))
    slot = tokenizer.control_tokens[NAMES["patch"]]
    model = LLM(made.model.model_copy(update={"vision": vision.model_copy(update={"patch_token_id": slot})}))
    texts = task_named("lm").sample(
        model, tokenizer, found.ids, images=found.images, most_tokens=3, context=128, temperature=0.0, seed=0
    )
    assert len(texts) == 4


def test_in_a_run_on_conversations_the_images_are_the_users(tmp_path: Path) -> None:
    picture(5, 5).save(tmp_path / "a.png")
    made = config(tmp_path, str(tmp_path / "a.png"), ["what?"])
    tokenizer = load_tokenizer(made.tokenizer)
    assert made.model.vision is not None
    found = encode_prompts(made, tokenizer, ALONE, ChatTemplate(TEMPLATE, "t", tokenizer))
    shown = image_text((1, 1), made.model.vision, tokenizer)
    end = tokenizer.control_tokens["</s>"]
    assert found.ids == [[*b"user: ", *shown, *b"what?", end, *b"assistant: "]]


def test_what_is_wrong_with_an_image_is_named_by_its_key(tmp_path: Path) -> None:
    picture(5, 5).save(tmp_path / "a.png")
    there, missing = str(tmp_path / "a.png"), str(tmp_path / "no.png")
    with pytest.raises(UserError, match="has 5 x 5 pixels, more than max_pixels=24"):
        few = config(tmp_path, [there], ["a"], max_pixels=24)
        encode_prompts(few, load_tokenizer(few.tokenizer), ALONE)
    for images, prompt, vision, line in (
        ([there], "<image><image>", True, "eval.prompts: has 2 placeholders for 1 image"),
        ([missing], "a", True, f"eval.images.0: {missing} does not exist"),
        ([there], "a", False, f"eval.images.0: {there} is for a model with vision; the model reads text only"),
    ):
        made = config(tmp_path, images, [prompt], vision)
        with pytest.raises(UserError) as refused:
            encode_prompts(made, load_tokenizer(made.tokenizer), ALONE)
        assert str(refused.value).startswith(line)
