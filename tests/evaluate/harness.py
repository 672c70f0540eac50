"""Run in the environment of lm-eval (.venv-eval): lm-eval's tasks on its own HFLM, on LatticeLM, and by a plain loop.

.venv-eval/bin/python -m tests.evaluate.harness FOLDER

FOLDER/asked.json says what: {"model", "include_path", "limit", "chat", "runs": [{"name", "as", "tasks", "options"}]}.
The answers of a run lie in FOLDER/NAME.json: {"results": {task: {metric: value}}, "samples": {task: [{"args", "resps",
"notes"}]}, "counts"}; notes, of the plain loop alone, say of each request whether it was `cut` or is `joint`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # read by imports
os.environ["HF_HOME"] = str(Path(sys.argv[1]) / "cache")

import lm_eval
import torch
import transformers
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

torch.set_num_threads(1)


class Plain(LM):
    """One request at a time, by the conventions of llm/evaluate/encode.py, with nothing of it."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.context = self.model.config.max_position_embeddings
        bos = self.tokenizer.bos_token_id
        self.bos = self.tokenizer.eos_token_id if bos is None else bos
        self.notes: dict[tuple[str, int, int], str] = {}

    def ids(self, text: str) -> tuple[list[int], list[int]]:
        """What begins a text, and its ids after that."""
        found = self.tokenizer(text)["input_ids"]
        return ([self.bos], found[1:]) if found[:1] == [self.bos] else ([], found)

    @torch.no_grad()
    def score(self, context: list[int], target: list[int]) -> tuple[float, bool]:
        assert context and target and len(context) + len(target) <= self.context + 1
        row = torch.tensor([(context + target)[:-1]])
        logits = self.model(row, logits_to_keep=len(target)).logits[0].double()
        wanted = torch.tensor(target)
        found = logits.log_softmax(-1)[torch.arange(len(target)), wanted].sum()
        return float(found), bool((logits.argmax(-1) == wanted).all())

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        answers = []
        for request in requests:
            context, continuation = request.args
            blanks = len(context) - len(context.rstrip())
            begin, whole = self.ids(context + continuation)
            _, before = self.ids(context[: len(context) - blanks]) if context.strip() else ([], [])
            shared = 0
            while shared < min(len(before), len(whole) - 1) and whole[shared] == before[shared]:
                shared += 1
            target = whole[shared:]
            begin = begin or ([] if shared else [self.bos])
            room = self.context + 1 - len(target) - len(begin)
            kept = whole[:shared]
            note = "joint" if shared < len(before) else "cut" if len(kept) > room else ""
            self.notes[request.task_name, request.doc_id, request.idx] = note
            answers.append(self.score(begin + kept[max(0, len(kept) - room) :], target))
        return answers

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        sums = []
        for (text,) in (request.args for request in requests):
            _, ids = self.ids(text)
            row, total = [self.bos, *ids], 0.0  # each token after as many before it as lm-eval's windows give
            for start in range(0, len(ids), self.context):
                end = min(len(ids), start + self.context)
                first = max(0, end - self.context)
                total += self.score(row[first : start + 1], ids[start:end])[0]
            sums.append(total)
        return sums

    @torch.no_grad()
    def generate_until(self, requests: list[Any]) -> list[str]:
        texts = []
        for request in requests:
            context, settings = request.args
            begin, rest = self.ids(context)
            room = self.context - settings["max_gen_toks"] - len(begin)
            ids = begin + rest[max(0, len(rest) - room) :]
            self.notes[request.task_name, request.doc_id, request.idx] = "cut" if len(rest) > room else ""
            made: list[int] = []
            before = self.tokenizer.decode(ids, skip_special_tokens=True)
            text = ""
            while len(made) < settings["max_gen_toks"]:
                token = int(self.model(torch.tensor([ids + made]), logits_to_keep=1).logits[0, -1].argmax())
                if token == self.tokenizer.eos_token_id:
                    break
                made.append(token)
                text = self.tokenizer.decode(ids + made, skip_special_tokens=True)[len(before) :]
                if any(stop in text for stop in settings["until"]):
                    break
            texts.append(text[: min([len(text), *(text.find(stop) for stop in settings["until"] if stop in text)])])
        return texts


def opened(kind: str, model: str, options: dict[str, Any]) -> LM:
    if kind == "hflm":
        return HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=8, **options)
    if kind == "lattice":
        from llm.evaluate.lm_eval import LatticeLM

        return LatticeLM(model, dtype="fp32", threads=1, **options)
    return Plain(model)


def main(folder: Path) -> None:
    asked = json.loads((folder / "asked.json").read_text())
    for run in asked["runs"]:
        model = opened(run["as"], asked["model"], run.get("options", {}))
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=run["tasks"],
            task_manager=TaskManager(include_path=asked["include_path"], include_defaults=False),
            limit=asked.get("limit"),
            num_fewshot=asked.get("num_fewshot"),
            apply_chat_template=asked.get("chat", False),
            fewshot_as_multiturn=asked.get("chat", False),
            bootstrap_iters=0,
        )
        if found is None:  # another rank has it
            continue
        notes = getattr(model, "notes", {})
        samples = {
            task: [
                {
                    "args": sample["arguments"],
                    "resps": [answers[0] for answers in sample["resps"]],
                    "notes": [notes.get((task, sample["doc_id"], i), "") for i in range(len(sample["resps"]))],
                }
                for sample in sorted(rows, key=lambda sample: sample["doc_id"])
            ]
            for task, rows in found["samples"].items()
        }
        out = {"results": found["results"], "samples": samples, "counts": dict(getattr(model, "counts", {}))}
        (folder / f"{run['name']}.json").write_text(json.dumps(out, default=str))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
