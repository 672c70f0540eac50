"""Run in the environment of lm-eval (.venv-eval): the texts that lm-eval asks a model about.

.venv-eval/bin/python -m tests.evaluate.contexts FOLDER

FOLDER/asked.json: {"template": Jinja, "tasks": [{"config": of lm-eval, "chat": bool}]}. FOLDER/found.json: for each
task the requests of each document, as [context, continuation] or [context].
"""

import json
import sys
from pathlib import Path
from typing import Any

import jinja2
from lm_eval.api.task import ConfigurableTask


def main(folder: Path) -> None:
    asked = json.loads((folder / "asked.json").read_text())
    template = jinja2.Template(asked["template"])

    def rendered(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return template.render(messages=messages, add_generation_prompt=add_generation_prompt)

    found = []
    for one in asked["tasks"]:
        task, chat = ConfigurableTask(config=one["config"]), one["chat"]
        task.build_all_requests(
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            chat_template=rendered if chat else None,
            tokenizer_name="chat" if chat else "",
        )
        documents: dict[int, list[Any]] = {}
        for instance in task.instances:
            texts = [argument for argument in instance.args if isinstance(argument, str)]
            documents.setdefault(instance.doc_id, []).append(texts)
        found.append([documents[i] for i in range(len(documents))])
    (folder / "found.json").write_text(json.dumps(found))


main(Path(sys.argv[1]))
