"""What our tasks ask is, to the letter, what lm-eval's of the same rows do: with examples, a description and turns."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llm.evaluate.encode import Encoder
from llm.evaluate.requests import Score
from llm.evaluate.tasks import Document
from llm.tokenizers.chat import ChatTemplate
from tests.evaluate.suites import DATA, SUITES
from tests.evaluate.tasks import TEMPLATE, TOKENIZER, made
from tests.shared import ROOT, needs_shared

HARNESS = ROOT / ".venv-eval" / "bin" / "python"
DOCUMENTS, EXAMPLES = 20, 10
ASKED = [name for name in SUITES if name != "wikitext"]
WAYS = [(k, text, chat) for k, text in ((0, ""), (3, ""), (2, "Do this.\n\n")) for chat in (False, True)]


def written(folder: Path, name: str, rows: list[str]) -> str:
    (folder / name).write_text("".join(row + "\n" for row in rows))
    return str(folder / name)


def theirs(name: str, k: int, description: str, files: dict[str, str], chat: bool) -> dict[str, Any]:
    """The task in lm-eval's words."""
    suite = dict(SUITES[name].theirs)
    if chat and suite["output_type"] == "loglikelihood":  # its blank is the target's own; what a turn says has none
        suite["doc_to_target"] = suite["doc_to_target"].lstrip()
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "fewshot_split": "train",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": k,
        "description": description,
        **suite,
    }


def text(document: Document, request: Any) -> str:
    ids = (*request.context, *request.target) if isinstance(request, Score) else request.prompt
    return TOKENIZER.decode(ids)


@pytest.mark.full
@needs_shared
@pytest.mark.skipif(not HARNESS.is_file(), reason=".venv-eval is not there; make test-full makes it")
def test_contexts_and_continuations_are_those_of_lm_eval(tmp_path: Path) -> None:
    tasks = []
    for name in ASKED:
        rows = (DATA / SUITES[name].data).read_text().splitlines()
        files = {
            "test": written(tmp_path, f"{name}_test.jsonl", rows[:DOCUMENTS]),
            "train": written(tmp_path, f"{name}_train.jsonl", rows[-EXAMPLES:]),
        }
        tasks += [{"config": theirs(name, k, said, files, chat), "chat": chat} for k, said, chat in WAYS]
    (tmp_path / "asked.json").write_text(json.dumps({"template": TEMPLATE, "tasks": tasks}))
    command = [str(HARNESS), "-m", "tests.evaluate.contexts", str(tmp_path)]
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = iter(json.loads((tmp_path / "found.json").read_text()))
    template = ChatTemplate(TEMPLATE, "t.jinja", TOKENIZER)
    for name in ASKED:
        for k, description, chat in WAYS:
            keys = dict(SUITES[name].ours) | {"description": description}
            shots = {"k": k, "path": str(tmp_path / f"{name}_train.jsonl"), "draw": "first"}
            task = made(tmp_path, [], data={"path": f"{name}_test.jsonl"}, fewshot=shots, **keys)
            documents = task.documents(Encoder(TOKENIZER, 100_000), template if chat else None)
            expected = next(found)
            assert len(documents) == len(expected) == DOCUMENTS
            for document, requests in zip(documents, expected, strict=True):
                asked = [text(document, request) for request in document.requests]
                # marks are tokens here, which have no text
                assert asked == ["".join(texts).replace("</s>", "") for texts in requests], (name, k, chat)
