"""Chats made from stories ask for a story's own sentences, and which are held out does not depend on their order."""

import json
from pathlib import Path

import pytest

from llm.errors import UserError
from tools.stories_chats import cut_story, prepare

MARK = "<|endoftext|>"
STORIES = [f"Tale {i} begins. " + " ".join(f"Step {n} of {i}." for n in range(8)) for i in range(60)]


def made(tmp_path: Path, stories: list[str], name: str = "made") -> dict[str, list[dict[str, list[dict[str, str]]]]]:
    text = tmp_path / f"{name}.txt"
    text.write_text(MARK.join(stories))
    prepare(str(text), str(tmp_path / name))
    files = sorted((tmp_path / name).iterdir())
    return {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in files}


def test_a_conversation_goes_on_with_the_sentences_of_its_story(tmp_path: Path) -> None:
    rows = made(tmp_path, STORIES)
    chats = rows["chats_train"] + rows["chats_valid"]
    assert len(chats) == len(STORIES) and rows["chats_valid"]
    for row in chats:
        first, answer, _, more = (turn["content"] for turn in row["messages"])
        story = next(story for story in STORIES if first.endswith(story.split(" begins.")[0] + " begins."))
        assert story.split("begins. ")[1].startswith(f"{answer} {more}")


def test_a_pair_prefers_the_answer_of_its_own_story(tmp_path: Path) -> None:
    rows = made(tmp_path, STORIES)
    for chat, pair in zip(rows["chats_train"], rows["pairs_train"], strict=True):
        assert pair["prompt"] + pair["chosen"] == chat["messages"][:2]
        assert pair["rejected"] != pair["chosen"]


def test_the_order_of_the_stories_does_not_matter(tmp_path: Path) -> None:
    assert made(tmp_path, STORIES) == made(tmp_path, STORIES[::-1], "other")


def test_a_story_that_is_too_short_is_left_out_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path, [*STORIES, "Too short. The end."])
    assert "1 of 61 stories are shorter than 7 sentences" in capsys.readouterr().out
    assert cut_story("One. Two. Three.", 1) == ("One.", "Two.", "Three.")
    with pytest.raises(UserError, match="too few"):
        made(tmp_path, STORIES[:1], "few")
