"""Prompts with images: where they stand, what they decide, and what is refused before any work."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from launch.generate import continue_prompt
from llm import LLM
from llm.args import VisionArgs
from llm.cli import run_cli
from llm.datatypes import TransformerInput
from llm.decoder import Cached
from llm.errors import UserError
from llm.generate import generate
from llm.generation.chat import Chat, Talk
from llm.generation.sampling import Sampling
from llm.generation.text import Continuer
from llm.tokenizer import ByteTokenizer
from llm.tokenizers.chat import ChatTemplate
from llm.tokenizers.extended import ExtendedTokenizer
from tests.model.models import llama4
from tests.vision.pictures import picture
from vision.preprocess import image_text, image_tiles
from vision.tokens import NAMES, ImageTokens

TOKENIZER = ExtendedTokenizer(ByteTokenizer(), list(NAMES.values()))
MARKS = ImageTokens.of(TOKENIZER)
VISION = VisionArgs(
    image_size=8, patch_size=2, dim=16, n_layers=1, n_heads=2, output_dim=16, patch_token_id=MARKS.patch, max_tiles=4
)
GREEDY = Sampling(0.0, None, None, 1.0, 0)
SEES = {"wide": (8, 16), "small": (5, 6), "high": (24, 8)}
"""Pictures by name: (height, width); wide and high have several tiles."""


@pytest.fixture(scope="module")
def model() -> LLM:
    made = llama4(0, vocab_size=TOKENIZER.vocab_size, max_seq_len=128, tie_embeddings=False, vision=VISION)
    made.tokenizer = TOKENIZER
    return made


@pytest.fixture(scope="module")
def folder(model: LLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vision") / "model"
    model.save_pretrained(path, TOKENIZER)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number, (name, size) in enumerate(SEES.items()):
        picture(*size, number).save(tmp_path / "images" / f"{name}.png")
    return tmp_path / "images"


def by_hand(model: LLM, parts: list[str | tuple[str, int]], steps: int) -> list[int]:
    """Greedy tokens by forwards of the whole text, without a cache: parts are texts, and (name, number) of pictures."""
    ids, tiles = list(TOKENIZER.begin_ids), []
    for part in parts:
        if isinstance(part, str):
            ids += TOKENIZER.encode_inside(part)
        else:
            found, grid = image_tiles(picture(*SEES[part[0]], part[1]), VISION)
            ids += image_text(grid, VISION, TOKENIZER)
            tiles.append(found)
    new: list[int] = []
    for _ in range(steps):
        inputs = TransformerInput(torch.tensor([ids + new]), images=torch.cat(tiles) if tiles else None)
        with torch.no_grad():
            new.append(int(model(inputs).logits[0, -1, : TOKENIZER.vocab_size].argmax()))
    return new


PROMPTS = {
    "a<image>b<image>": ["a", ("wide", 0), "b", ("small", 1)],
    "cd": [("wide", 0), ("small", 1), "cd"],
}


@pytest.mark.parametrize("text", PROMPTS)
def test_images_stand_where_the_prompt_says_image_or_before_it(model, images, text):
    continuer = Continuer(model, TOKENIZER, "m")
    pictures = continuer.pictures.under(images, ["wide.png", "small.png"])
    prompt = continuer.prompt(text, pictures=pictures)
    (done,) = continuer.complete([prompt], GREEDY, 4, stop=False)
    new = by_hand(model, PROMPTS[text], 4)
    assert done.text == TOKENIZER.decode(new) and done.n_tokens == 4


def test_rows_with_and_without_images_are_continued_side_by_side_as_alone(model, images):
    continuer = Continuer(model, TOKENIZER, "m")
    look = continuer.pictures.under
    prompts = [
        continuer.prompt("abc<image>", pictures=look(images, ["small.png"])),
        continuer.prompt("a long text without any image at all"),
        continuer.prompt("<image><image>z", pictures=look(images, ["high.png", "small.png"])),
    ]
    tiles = [continuer.pictures.tiles(prompt.pictures) for prompt in prompts]
    together = generate(model, [p.ids for p in prompts], max_new_tokens=5, images=tiles)
    alone = [generate(model, [p.ids], max_new_tokens=5, images=[t])[0] for p, t in zip(prompts, tiles, strict=True)]
    assert together == alone


def test_another_image_gives_another_text(model, images):
    """Else all of this could pass with tiles that nobody reads: at the first token already."""
    continuer = Continuer(model, TOKENIZER, "m")
    ids = continuer.prompt("<image>", pictures=continuer.pictures.under(images, ["small.png"])).ids
    logits = []
    for number in (1, 2):
        tiles, _ = image_tiles(picture(5, 6, number), VISION)
        cached = Cached(model)
        logits.append(cached.logits(np.array([ids]), np.arange(len(ids))[None], tiles))
    assert not torch.equal(*logits)


def test_an_image_that_changes_or_goes_before_its_prompt_is_continued_is_named_with_it(model, images):
    continuer = Continuer(model, TOKENIZER, "m")
    prompt = continuer.prompt("a", "the prompt in row 3", pictures=continuer.pictures.under(images, ["small.png"]))
    continuer = Continuer(model, TOKENIZER, "m")  # which has not kept the tiles
    picture(*SEES["wide"]).save(images / "small.png")
    with pytest.raises(UserError, match="the prompt in row 3: image 'small.png' has changed since"):
        continuer.complete([prompt], GREEDY, 2)
    (images / "small.png").unlink()
    continuer = Continuer(model, TOKENIZER, "m")
    with pytest.raises(UserError, match="the prompt in row 3: image 'small.png' does not exist"):
        continuer.complete([prompt], GREEDY, 2)


def test_generate_takes_paths_bytes_and_pictures_of_pillow_as_the_command_takes_files(model, images, tmp_path):
    text, settings = "a<image>b<image>", {"max_new_tokens": 4, "stop": False}
    wide, small = images / "wide.png", images / "small.png"
    expected = TOKENIZER.decode(by_hand(model, PROMPTS[text], 4))
    assert model.generate(text, images=[wide, str(small)], **settings) == expected
    with Image.open(small) as opened:
        assert model.generate(text, images=[wide.read_bytes(), opened], **settings) == expected
    upright = picture(*SEES["small"], 1)
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    assert model.generate(text, images=[wide, turned], **settings) == expected
    together = model.generate([text, "ab"], images=[[wide, small], []], **settings)
    assert together == [expected, model.generate("ab", **settings)]


def test_what_is_wrong_with_images_given_to_generate_is_said_with_the_prompt(model, images):
    small = images / "small.png"
    for given, error, line in (
        ([images / "no.png"], UserError, f"^prompt 1: image '{images}/no.png' does not exist"),
        ([small, small.read_bytes()[:40]], UserError, "^prompt 1: image 2 (is no picture|cannot be decoded)"),
        ([small, small], UserError, "^prompt 1: has 1 placeholder for 2 images"),
        ([Image.new("F", (2, 2))], UserError, "^prompt 1: image 1 has floats as pixels"),
        ([3], ValueError, "^prompt 1: image 1 has type int; give a path, bytes, or"),
        (str(small), ValueError, "^images: a str is no list of images"),
    ):
        with pytest.raises(error, match=line):
            model.generate("<image>", images=given)
    with pytest.raises(ValueError, match="^images has lists for 1 texts of 2"):
        model.generate(["a", "b"], images=[[small]])
    with pytest.raises(ValueError, match="^images of prompt 2: a PosixPath is no list"):
        model.generate(["a", "b"], images=[[], small])
    blind = llama4(0, vocab_size=TOKENIZER.vocab_size, tie_embeddings=False)
    blind.tokenizer = TOKENIZER
    with pytest.raises(UserError, match="^prompt 1: image .* is for a model with vision; this model reads text only"):
        blind.generate("a", images=[small])


def run(folder: Path, *words: str) -> None:
    run_cli(continue_prompt, [f"--model={folder}", "--max_new_tokens=4", "--threads=1", "--stop=false", *words])


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(folder, *words)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_command_takes_several_images_and_a_file_of_prompts_gives_the_same(model, folder, images, capsys):
    given = [f"--image={images / 'wide.png'}", f"--image={images / 'small.png'}"]
    run(folder, "--prompt=a<image>b<image>", *given)
    shown = capsys.readouterr().out
    assert shown == TOKENIZER.decode(by_hand(model, PROMPTS["a<image>b<image>"], 4)) + "\n"
    file, output = images.parent / "in.jsonl", images.parent / "out.jsonl"
    rows = [
        {"prompt": "a<image>b<image>", "images": ["images/wide.png", "images/small.png"]},
        {"prompt": "a<image>"},  # text: the row has no images
        {"prompt": "", "images": "images/high.png"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(folder, f"--prompts={file}", f"--output={output}")
    made = [json.loads(line) for line in output.read_text().splitlines()]
    assert made[0]["completion"] + "\n" == shown
    assert made[2]["completion"] == TOKENIZER.decode(by_hand(model, [("high", 2)], 4))
    assert [{key: row[key] for key in given} for row, given in zip(made, rows, strict=True)] == rows


def test_an_output_of_other_images_is_not_gone_on_with(folder, images, capsys):
    file, output = images / "in.jsonl", images / "out.jsonl"
    file.write_text(json.dumps({"prompt": "a", "images": ["small.png"]}) + "\n")
    run(folder, f"--prompts={file}", f"--output={output}")
    capsys.readouterr()
    picture(5, 6, 7).save(images / "small.png")
    assert "holds completions of other settings (the images changed)" in refused(
        capsys, folder, f"--prompts={file}", f"--output={output}"
    )


def test_what_is_wrong_with_images_is_one_line_before_any_work(folder, images, capsys):
    broken = images / "broken.png"
    broken.write_bytes((images / "wide.png").read_bytes()[:50])
    small = f"--image={images / 'small.png'}"
    for words, line in (
        ([f"--image={images / 'no.png'}"], f"error: --image={images / 'no.png'} does not exist"),
        ([f"--image={broken}"], f"error: --image={broken} cannot be decoded: "),
        ([small, "--max_pixels=29"], "has 6 x 5 pixels, more than max_pixels=29"),
        ([small, "--max_image_bytes=9"], "bytes, more than max_image_bytes=9"),
        ([small, "--prompt=<image><image>"], "error: --prompt: has 2 placeholders for 1 image"),
        ([small, small, "--prompt=<image>"], "error: --prompt: has 1 placeholder for 2 images"),
        (["--prompt=<|patch|>"], "error: --prompt spells <|patch|> itself"),
    ):
        more = [] if any(word.startswith("--prompt") for word in words) else ["--prompt=a"]
        assert line in refused(capsys, folder, *words, *more)
    file, output = images / "in.jsonl", images / "out.jsonl"
    names = ["small.png", "../wide.png", "no.png", "broken.png"]
    file.write_text("".join(json.dumps({"prompt": "a", "images": [name]}) + "\n" for name in names))
    line = refused(capsys, folder, f"--prompts={file}", f"--output={output}")
    assert "row 2: image '../wide.png' is outside image_root" in line
    assert "row 3: image 'no.png' does not exist" in line and "row 4: image 'broken.png' cannot be decoded" in line
    assert not output.exists()


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_conversation_is_about_the_images_of_its_first_message(model, folder, images, capsys, monkeypatch):
    (images / "t.jinja").write_text(TEMPLATE)
    words = ["--chat", f"--chat_template={images / 't.jinja'}", "--max_new_tokens=4"]
    given = f"--image={images / 'small.png'}"
    run_cli(continue_prompt, [f"--model={folder}", "--threads=1", *words, given, "--prompt=what?"])
    shown = capsys.readouterr().out
    file, output = images / "in.jsonl", images / "out.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": "<image>what?"}], "images": ["small.png"]},
        {"messages": [{"role": "user", "content": [{"type": "image", "path": "small.png"},
                                                   {"type": "text", "text": "what?"}]}]},
        {"prompt": "what?", "images": ["small.png"]},
        {"messages": [{"role": "user", "content": "<image>what?"}], "images": ["small.png", "wide.png"]},
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    run_cli(
        continue_prompt, [f"--model={folder}", "--threads=1", *words, f"--prompts={file}", f"--output={output}"]
    )
    made = [json.loads(line)["completion"] + "\n" for line in output.read_text().splitlines()]
    assert made == [shown] * 3
    capsys.readouterr()
    file.write_text(json.dumps(rows[3]) + "\n")
    with pytest.raises(SystemExit):
        run_cli(
            continue_prompt, [f"--model={folder}", "--threads=1", *words, f"--prompts={file}", f"--output={file}.out"]
        )
    assert "row 1: has 2 images in its columns, and 1 x <image>" in capsys.readouterr().err


def test_only_the_first_message_has_the_images_of_the_command_line(model, images):
    continuer = Continuer(model, TOKENIZER, "m")
    chat = Chat(ChatTemplate(TEMPLATE, "t", TOKENIZER), None)
    talk = Talk(continuer, chat, GREEDY, 2, continuer.pictures.under(images, ["small.png"]))
    talk.say("what?")
    talk.say("<image>?")
    assert talk.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "what?"}]
    assert talk.messages[2]["content"] == "<image>?"
