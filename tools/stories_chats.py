"""Conversations and preference pairs made from a file of stories, for first fine-tunings of small models.

`python tools/stories_chats.py prepare --text stories.txt` writes what configs/finetune/ reads. A conversation asks for
the next sentences of a story, twice; a pair prefers a story's own next sentences to another story's. The digest of its
text decides whether a story is held out, so the same stories in another order give the same files. The text is the
user's, as the stories of TinyStories (arXiv:2305.07759): one after the other, with <|endoftext|> between them.
"""

import json
import re
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from llm.atomic import new_directory
from llm.cli import run_cli
from llm.data.documents import read_documents
from llm.data.split import Split, text_digest
from llm.errors import UserError
from llm.paths import PathText

HELD_OUT = 0.05
"""Share of the stories."""
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])|\n+")
"""Between two sentences: not behind a closing quotation mark, whose sentence may go on."""
FIRST, NEXT = "Go on with this story: ", "What happens then?"
Message = dict[str, str]


def prepare(
    text: PathText, output: PathText = "runs/data/stories", separator: str = "<|endoftext|>", sentences: int = 3
) -> None:
    """Write chats_train.jsonl, chats_valid.jsonl, pairs_train.jsonl and pairs_valid.jsonl into a new folder.

    text: the file of stories, UTF-8
    output: the folder to make
    separator: what stands between two stories
    sentences: of each answer
    """
    if sentences < 1:
        raise UserError(f"--sentences={sentences} must be at least 1")
    documents = read_documents(text, key="--text", separator=separator)
    stories = {text_digest(document.text.encode()): document.text.strip() for document in documents}
    cut = {digest: cut_story(story, sentences) for digest, story in sorted(stories.items())}
    long_enough = {digest: parts for digest, parts in cut.items() if parts is not None}
    files: dict[str, list[dict[str, list[Message]]]] = {}
    for part in ("train", "valid"):
        side = Split(HELD_OUT, part)
        chosen = [parts for digest, parts in long_enough.items() if side.keeps(digest)]
        if len(chosen) < 2:
            raise UserError(f"--text={text}: {len(long_enough)} stories of {1 + 2 * sentences} sentences are too few")
        files[f"chats_{part}.jsonl"] = [conversation(*parts) for parts in chosen]
        files[f"pairs_{part}.jsonl"] = [
            pair(opening, answer, other)
            for (opening, answer, _), (_, other, _) in zip(chosen, chosen[1:] + chosen[:1], strict=True)
        ]
    try:
        with new_directory(Path(output)) as folder:
            for name, rows in files.items():
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                (folder / name).write_text("".join(lines), encoding="utf-8")
    except FileExistsError:
        raise UserError(f"--output={output}: exists; remove it or name another folder") from None
    for name, rows in files.items():
        print(f"{Path(output) / name}: {len(rows):,} rows")
    short = len(stories) - len(long_enough)
    print(f"{short:,} of {len(stories):,} stories are shorter than {1 + 2 * sentences} sentences and left out")


def cut_story(story: str, sentences: int) -> tuple[str, str, str] | None:
    """The first sentence of a story, the `sentences` after it, and as many more, each blank being one space; None where
    it is shorter.
    """
    found = [" ".join(sentence.split()) for sentence in SENTENCE_END.split(story) if sentence.strip()]
    if len(found) < 1 + 2 * sentences:
        return None
    return found[0], " ".join(found[1 : 1 + sentences]), " ".join(found[1 + sentences : 1 + 2 * sentences])


def conversation(opening: str, answer: str, more: str) -> dict[str, list[Message]]:
    """A row of kind chat."""
    return {
        "messages": [
            _turn("user", FIRST + opening),
            _turn("assistant", answer),
            _turn("user", NEXT),
            _turn("assistant", more),
        ]
    }


def pair(opening: str, answer: str, other: str) -> dict[str, list[Message]]:
    """A row of kind preference: `answer` before `other`."""
    return {
        "prompt": [_turn("user", FIRST + opening)],
        "chosen": [_turn("assistant", answer)],
        "rejected": [_turn("assistant", other)],
    }


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


if __name__ == "__main__":
    run_cli(prepare, prepare=prepare)
