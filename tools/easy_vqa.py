"""Questions about pictures for a first multimodal fine-tuning: easy-VQA made into rows, and its answers scored.

`python tools/easy_vqa.py prepare --data DIR` writes what configs/finetune/easy_vqa.yaml reads. The data is the user's:
easy-VQA (Victor Zhou, 2019: 64 x 64 pictures of one shape, 13 answers), as its repository has it
(PART/questions.json and PART/images/ID.png, or data/PART) or in tables (PART_questions.json and PART_images.parquet
with `image_id` and `image`), PART being train and test. Training rows are of two kinds: a picture with all questions
about it as turns, and a picture with one question: all those for a shape or a colour, and every third of the others.
In a conversation the answers give each other away, and eight of ten are yes or no: with such rows alone a small model
learned colours and stayed blind to shapes. A test row is one question. `score` counts the answers that
launch/generate.py wrote.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pyarrow as pa
import pyarrow.parquet as pq

from llm.atomic import new_directory
from llm.cli import run_cli
from llm.data.split import Split, text_digest
from llm.errors import UserError
from llm.paths import PathText
from llm.tokenizer import train_sentencepiece

HELD_OUT = 0.05
"""Share of the training pictures."""
VOCABULARY = 400
"""Of the tokenizer: 256 bytes, marks, and room for every word of the questions."""
SHAPES = ("circle", "rectangle", "triangle")
Question = tuple[str, str]
"""What is asked, and its answer."""


def prepare(data: PathText, output: PathText = "runs/data/easy_vqa") -> None:
    """Write train.jsonl, train_single.jsonl, valid.jsonl, test.jsonl, the pictures and a tokenizer into a new folder;
    and test_permuted.jsonl, the same questions about the next picture, which a model that looks must answer worse.

    data: the folder of easy-VQA
    output: the folder to make
    """
    source, folder = Path(data), Path(output)
    if not source.is_dir():
        raise UserError(f"--data={data}: no such folder")
    if folder.exists():
        raise UserError(f"--output={output}: exists; remove it or name another folder")
    asked = {part: questions(source, part) for part in ("train", "test")}
    side = Split(HELD_OUT, "valid")
    held_out = {n: asks for n, asks in asked["train"].items() if side.keeps(text_digest(f"train {n}".encode()))}
    trained = {n: asks for n, asks in asked["train"].items() if n not in held_out}
    parts = {
        "train": [conversation(n, asks) for n, asks in trained.items()],
        "train_single": [conversation(n, [one]) for n, asks in trained.items() for one in alone(asks)],
        "valid": [conversation(n, asks) for n, asks in held_out.items()],
        "test": list(single(asked["test"], 0)),
        "test_permuted": list(single(asked["test"], 1)),
    }
    asks = [f"User: {question}\nAssistant: {answer}\n" for part in asked["train"].values() for question, answer in part]
    model = train_sentencepiece(asks, VOCABULARY)
    try:
        with new_directory(folder) as new:
            for part in asked:
                (new / part).mkdir()
                for number, content in pictures(source, part, asked[part]):
                    (new / file_of(part, number)).write_bytes(content)
            for name, rows in parts.items():
                (new / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            (new / "tokenizer.model").write_bytes(model)
    except FileExistsError:
        raise UserError(f"--output={output}: exists; remove it or name another folder") from None
    for name, rows in parts.items():
        print(f"{folder / name}.jsonl: {len(rows):,} rows")


def questions(source: Path, part: str) -> dict[int, list[Question]]:
    """Those of each picture, in the order of the file. UserError naming the file that is missing or malformed."""
    candidates = [source / f"{part}_questions.json", *(source / sub / part / "questions.json" for sub in ("", "data"))]
    file = next((path for path in candidates if path.is_file()), None)
    if file is None:
        raise UserError(f"--data={source}: has neither {part}_questions.json nor {part}/questions.json")
    found: dict[int, list[Question]] = {}
    try:
        for row, (question, answer, number) in enumerate(json.loads(file.read_text(encoding="utf-8")), 1):
            if not (isinstance(question, str) and isinstance(answer, str) and isinstance(number, int)):
                raise UserError(f"{file}, row {row}: expected [question, answer, number of the picture]")
            found.setdefault(number, []).append((question, answer))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: not a JSON list of [question, answer, number of the picture] ({error})") from None
    return dict(sorted(found.items()))


def pictures(source: Path, part: str, wanted: dict[int, Any]) -> Iterator[tuple[int, bytes]]:
    """The files of pictures as they are, by number. UserError naming one that is missing."""
    table = source / f"{part}_images.parquet"
    missing = dict.fromkeys(wanted)
    if table.is_file():
        rows: pa.Table = pq.read_table(table, columns=["image_id", "image"])
        for row in rows.to_pylist():
            content = row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]
            if row["image_id"] in missing:
                del missing[row["image_id"]]
                yield row["image_id"], content
        if missing:
            raise UserError(f"{table}: has no picture {next(iter(missing))}, which a question is about")
        return
    for number in wanted:
        files = [source / sub / part / "images" / f"{number}.png" for sub in ("", "data")]
        file = next((path for path in files if path.is_file()), None)
        if file is None:
            raise UserError(f"{files[0]}: no such file, and {table.name} is not there either")
        yield number, file.read_bytes()


def file_of(part: str, number: int) -> str:
    """Where a picture lies in the folder."""
    return f"{part}/{number}.png"


def conversation(number: int, asked: list[Question]) -> dict[str, Any]:
    """A training row: the picture stands before the first question."""
    messages = []
    for i, (question, answer) in enumerate(asked):
        messages.append({"role": "user", "content": question if i else f"<image>{question}"})
        messages.append({"role": "assistant", "content": answer})
    return {"images": [file_of("train", number)], "messages": messages}


def alone(asked: list[Question]) -> list[Question]:
    """Which of a picture's questions are also asked alone: those for a shape or a colour, and every third other."""
    others = [question for question in asked if kind_of(question[1]) == "yes/no"]
    return [question for question in asked if kind_of(question[1]) != "yes/no"] + others[::3]


def single(asked: dict[int, list[Question]], shift: int) -> Iterator[dict[str, Any]]:
    """Test rows, each question alone, about the picture that stands `shift` places further on."""
    numbers = list(asked)
    for i, number in enumerate(numbers):
        shown = numbers[(i + shift) % len(numbers)]
        for question, answer in asked[number]:
            messages = [{"role": "user", "content": f"<image>{question}"}]
            yield {"images": [file_of("test", shown)], "messages": messages, "answer": answer}


def score(answers: PathText) -> None:
    """Print how many answers are right, in all and by what was asked for.

    answers: the --output of launch/generate.py for test.jsonl
    """
    file = Path(answers)
    if not file.is_file():
        raise UserError(f"--answers={answers}: no such file")
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        if not {"answer", "completion"} <= row.keys():
            raise UserError(f"{file}, row {number}: has no `answer` and `completion`")
        for kind in ("all", kind_of(row["answer"])):
            asked[kind] += 1
            right[kind] += row["completion"].strip() == row["answer"]
    for kind, count in asked.items():
        print(f"{kind:8}  {right[kind]:6,} of {count:6,}  {100 * right[kind] / count:5.1f} %")


def kind_of(answer: str) -> str:
    """What a question is about, by its answer."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in SHAPES else "colour"


if __name__ == "__main__":
    run_cli(prepare, prepare=prepare, score=score)
