"""Sequences to reverse and to sort: right targets, held-out ones never trained on, exact answers counted by length."""

import json
from pathlib import Path
from typing import Any

import pytest

from tools import sequences


def rows(folder: Path, part: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", ["reverse", "sort"])
def test_targets_are_right_and_no_held_out_sequence_is_trained_on(tmp_path: Path, task: Any) -> None:
    folder = tmp_path / "data"
    sequences.prepare(task, str(folder), 2000)
    parts = {part: rows(folder, part) for part in ("train", "valid", "longer")}
    for row in [row for part in parts.values() for row in part]:
        right = row["prompt"][::-1] if task == "reverse" else "".join(sorted(row["prompt"]))
        assert row["target"] == right and set(right) <= set(sequences.ALPHABET)
    trained, held = ({row["prompt"] for row in parts[part]} for part in ("train", "valid"))
    assert not trained & held and len(trained) + len(held) == 2000
    assert {len(prompt) for prompt in trained} == set(range(8, 21))
    assert 0.01 < len(held) / 2000 < 0.03
    assert {len(row["prompt"]) for row in parts["longer"]} == {21, 22, 23, 24}


def test_a_score_counts_exact_answers_by_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers come from a stand-in for launch/generate.py that says nothing about sequences of 9 letters."""
    folder = tmp_path / "data"
    sequences.prepare("reverse", str(folder), 600)

    def answer(script: str, *words: str) -> None:
        given = dict(word.removeprefix("--").split("=") for word in words)
        asked = [json.loads(line) for line in Path(given["prompts"]).read_text().splitlines()]
        answers = (row | {"completion": row["target"] * (len(row["prompt"]) != 9)} for row in asked)
        Path(given["output"]).write_text("".join(json.dumps(row) + "\n" for row in answers))

    monkeypatch.setattr(sequences, "_call", answer)
    found = sequences.score(str(tmp_path), str(folder))
    lengths = [len(row["prompt"]) for row in rows(folder, "valid")]
    assert found == 1 - lengths.count(9) / len(lengths)
    said = capsys.readouterr().out
    assert "longer than any that was trained on: 100.00% of 200 answers are exact" in said
    assert f"  9 letters: 0.00% of {lengths.count(9)}" in said
