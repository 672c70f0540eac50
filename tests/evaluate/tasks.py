"""Tasks written into a folder, for tests."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from llm.evaluate.encode import Encoder
from llm.evaluate.requests import Answer, Continued, Score, Scored
from llm.evaluate.tasks import Document, EvalTask, TaskOptions, open_task
from llm.tokenizers.simple import ByteTokenizer

TOKENIZER = ByteTokenizer()
BOS = TOKENIZER.bos_id
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def ids(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


def made(folder: Path, rows: Sequence[Any], options: TaskOptions | None = None, **keys: Any) -> EvalTask:
    """A task over these rows; a key of None is left out."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {"name": "t", "data": {"path": "rows.jsonl"}, **keys}
    (folder / "t.yaml").write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return open_task(str(folder / "t.yaml"), options)


def documents(task: EvalTask, context: int = 256) -> list[Document]:
    return task.documents(Encoder(TOKENIZER, context))


def text_of(target: Sequence[int]) -> str:
    return TOKENIZER.decode(target)


def result(task: EvalTask, answers: Sequence[Sequence[Answer]], context: int = 256) -> dict[str, Any]:
    """The task's result where the model answers so."""
    found = documents(task, context)
    return task.result(found, [task.measure(one, said) for one, said in zip(found, answers, strict=True)])


def scored(*logprobs: float, greedy: bool = False) -> list[Answer]:
    return [Scored(value, greedy) for value in logprobs]


def said(*texts: str) -> list[Answer]:
    return [Continued(text, 3, "stop") for text in texts]


def contexts(document: Document) -> list[str]:
    """What stands before each scored text, after BOS."""
    return [text_of(request.context) for request in document.requests if isinstance(request, Score)]


def targets(document: Document) -> list[str]:
    return [text_of(request.target) for request in document.requests if isinstance(request, Score)]
