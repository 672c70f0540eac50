"""Ask a model questions of your own, offline: a task is a YAML file over local rows.

    .venv/bin/python examples/train_in_30_lines.py runs/examples/zen
    .venv/bin/python examples/evaluate.py runs/examples/zen/run [FOLDER]

The model is any path that `LLM.from_pretrained` reads. Each choice is scored by its likelihood behind the prompt;
FOLDER (default: runs/examples/evaluation) gets results.json, report.html and a line for each question. Other kinds of
tasks and metrics: docs/evaluation_tasks.md; the same from the shell: launch/evaluate.py. Behind the evaluation's own
table it prints, of the model that knows the Zen of Python by heart:

    zen: 4 of 4 right, acc 1.00
"""

import json
import sys
from pathlib import Path

from llm.runs import evaluate

QUESTIONS = [
    ("Beautiful is better than", ["ugly", "old", "fast"]),
    ("Simple is better than", ["good", "complex", "nothing"]),
    ("Flat is better than", ["sharp", "round", "nested"]),
    ("Readability", ["counts", "hurts", "waits"]),
]
RIGHT = [0, 1, 2, 0]
TASK = """\
name: zen
kind: multiple_choice
data: {path: questions.jsonl}
prompt: "{{ question }}"
choices: "{{ choices }}"
gold: "{{ gold }}"
metrics: [acc]
"""


def main(model: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"question": q, "choices": c, "gold": g} for (q, c), g in zip(QUESTIONS, RIGHT, strict=True)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "zen.yaml").write_text(TASK)
    found = evaluate(model, folder / "zen.yaml", folder / "results")["zen"]
    print(f"zen: {round(found['acc'] * found['n'])} of {found['n']} right, acc {found['acc']:.2f}")


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("usage: evaluate.py MODEL [FOLDER]")
    main(Path(sys.argv[1]), Path(sys.argv[2] if sys.argv[2:] else "runs/examples/evaluation"))
