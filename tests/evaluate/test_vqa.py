"""Questions about images: what is asked, what is refused, and what answers are worth."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from llm import LLM
from llm.args.vision import VisionArgs
from llm.datatypes import TransformerInput
from llm.errors import UserError
from llm.evaluate.encode import Encoder
from llm.evaluate.requests import Continue
from llm.evaluate.runner import Runner
from llm.evaluate.tasks import Document, EvalTask, TaskOptions
from llm.generation.pictures import Pictures
from llm.tokenizers.chat import ChatTemplate
from llm.tokenizers.extended import ExtendedTokenizer
from llm.tokenizers.simple import ByteTokenizer
from tests.evaluate.replicas import pictures_of, replica_of
from tests.evaluate.tasks import TEMPLATE, made, said
from tests.model.models import llama4
from tests.vision.pictures import picture
from vision.opening import LIMITS
from vision.preprocess import image_text, image_tiles
from vision.tokens import NAMES, ImageTokens

TOKENIZER = ExtendedTokenizer(ByteTokenizer(), list(NAMES.values()))
VISION = VisionArgs(
    image_size=8, patch_size=2, dim=16, n_layers=1, n_heads=2, output_dim=16, max_tiles=4,
    patch_token_id=ImageTokens.of(TOKENIZER).patch,
)  # fmt: skip
PICTURES = Pictures(VISION, "model", LIMITS)
VQA: dict[str, Any] = {"kind": "vqa", "prompt": "{{ q }}", "gold": "{{ a }}", "max_new_tokens": 4}
ROWS = [{"q": "what?", "a": "red", "images": ["a.png"]}, {"q": "blue?", "a": "no", "images": "a.png"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    picture(8, 16, 0).save(tmp_path / "a.png")
    return tmp_path


def asked(task: EvalTask, context: int = 256, chat: ChatTemplate | None = None) -> list[Document]:
    return task.documents(Encoder(TOKENIZER, context), chat, PICTURES)


def slots(number: int = 0) -> list[int]:
    return list(image_text(image_tiles(picture(8, 16, number), VISION)[1], VISION, TOKENIZER))


def test_an_image_stands_before_the_question_or_where_it_is_said(folder: Path) -> None:
    rows = [ROWS[0], ROWS[0] | {"q": "see <image> so"}]
    first, second = (document.requests[0] for document in asked(made(folder, rows, **VQA)))
    assert isinstance(first, Continue) and isinstance(second, Continue)
    assert list(first.prompt) == [TOKENIZER.bos_id, *slots(), *b"what?"]
    assert list(second.prompt) == [TOKENIZER.bos_id, *b"see ", *slots(), *b" so"]
    assert [picture.name for picture in first.pictures] == ["image 'a.png'"]


def test_with_a_chat_template_the_question_is_a_turn(folder: Path) -> None:
    template = ChatTemplate(TEMPLATE, "t.jinja", TOKENIZER)
    request = asked(made(folder, ROWS[:1], **VQA), chat=template)[0].requests[0]
    assert isinstance(request, Continue)
    assert list(request.prompt) == [*b"user: ", *slots(), *b"what?", TOKENIZER.eos_id, *b"assistant:"]


def test_images_are_looked_for_in_image_root_and_may_be_bytes(folder: Path) -> None:
    (folder / "rows").mkdir()
    task = made(folder / "rows", ROWS, TaskOptions(image_root=folder), **VQA)
    rows = [{"q": "what?", "a": "red", "images": {"bytes": (folder / "a.png").read_bytes(), "path": None}}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    of_bytes = made(folder, [], data={"path": "rows.parquet"}, **VQA)
    assert asked(task)[0].requests[0].prompt == asked(of_bytes)[0].requests[0].prompt  # type: ignore[union-attr]
    assert asked(of_bytes)[0].doc["images"]["bytes"].endswith(" bytes>")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (["b.png"], "image 'b.png'"),
        ([], "images: has none, and no question is asked blind"),
        (None, "images: null where a path or an image's bytes must be"),
        (["../a.png"], "image '../a.png'"),
        (["t.yaml"], "image 't.yaml'"),
    ],
)
def test_an_image_that_is_not_there_or_damaged_is_named_with_its_row(folder: Path, images: Any, message: str) -> None:
    with pytest.raises(UserError) as found:
        asked(made(folder, [ROWS[0], ROWS[0] | {"images": images}], **VQA))
    assert "rows.jsonl row 2: " in str(found.value) and message.removeprefix("image ") in str(found.value)
    assert "\n" not in str(found.value)


def test_a_model_without_vision_and_a_prompt_without_room_are_refused(folder: Path) -> None:
    task = made(folder, ROWS, **VQA)
    with pytest.raises(UserError, match="row 1: .* for a model with vision"):
        task.documents(Encoder(TOKENIZER, 256), None, Pictures(None, "model", LIMITS))
    with pytest.raises(UserError, match="row 1: its 2. tokens and 4 new ones do not fit .* is not cut"):
        asked(task, context=20)


def test_answers_are_compared_with_what_people_said(folder: Path) -> None:
    rows = [ROWS[0] | {"a": ["red"] * 2 + ["dark red"]}, ROWS[1], ROWS[1] | {"a": "yes"}, ROWS[1] | {"a": "yes"}]
    task = made(folder, rows, metrics=["vqa_acc", "exact", "yes_no_f1"], **VQA)
    documents = asked(task)
    answers = [said("Red."), said("yes"), said("Yes, it is"), said("green")]
    measures = [task.measure(document, answer) for document, answer in zip(documents, answers, strict=True)]
    found = task.result(documents, measures)
    assert found["vqa_acc"] == pytest.approx((2 / 3 + 0 + 0 + 0) / 4)
    assert found["exact"] == 0.25
    assert found["yes_no_f1"] == pytest.approx(2 / (2 + 1 + 1))  # one yes found, one false, one missed
    assert (found["n_yes_no"], found["neither"]) == (3, 1)
    assert found["prompt_tokens"] == sum(len(d.requests[0].prompt) for d in documents) / 4  # type: ignore[union-attr]
    assert task.sample(documents[0], answers[0], measures[0])["images"] == ["a.png"]


def test_a_model_answers_what_it_sees(folder: Path) -> None:
    model = llama4(0, vocab_size=TOKENIZER.vocab_size, max_seq_len=128, tie_embeddings=False, vision=VISION)
    assert isinstance(model, LLM)
    (document,) = asked(made(folder, ROWS[:1], **VQA))
    runner = Runner(replica_of(model), TOKENIZER, 1024, TOKENIZER.end_ids, pictures_of(model))
    ((_, answer),) = [pair for batch in runner.answers(document.requests, frozenset()) for pair in batch]
    prompt = document.requests[0].prompt  # type: ignore[union-attr]
    tiles, _ = image_tiles(picture(8, 16, 0), VISION)
    new: list[int] = []

    for _ in range(4):
        with torch.no_grad():
            logits = model(TransformerInput(torch.tensor([[*prompt, *new]]), images=tiles)).logits
        new.append(int(logits[0, -1, : TOKENIZER.vocab_size].argmax()))
        if new[-1] in TOKENIZER.end_ids:
            break
    assert answer.tokens == len(new)  # type: ignore[union-attr]
    assert answer.text == TOKENIZER.decode(new)  # type: ignore[union-attr]
