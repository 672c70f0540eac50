"""A journal keeps answers through kills, and those of one evaluation alone."""

import json
from pathlib import Path

import pytest

from llm.errors import DamagedFile, UserError
from llm.evaluate.journal import Journal
from llm.evaluate.requests import Answer, Continued, Scored

IDENTITY = {"the model": "a" * 32, "--dtype": "float32", "its tokenizer": "b" * 32, "the task arc": "c" * 32}
ANSWERS: dict[str, Answer] = {
    "k0": Scored(-0.1 - 2**-53, True),
    "k1": Continued("two\nlines \u2028 and é", 7, "stop"),
    "k2": Scored(-12345.678901234567, False),
}


def opened(folder: Path, **changes: str) -> Journal:
    journal = Journal(folder)
    identity = IDENTITY | changes
    journal.open(identity, "files", identity["the model"])
    return journal


def filled(folder: Path) -> Path:
    """A journal of ANSWERS in one file, which is returned."""
    journal = opened(folder)
    journal.append(journal.next_number(), list(ANSWERS.items())[:2])
    journal.append(0, list(ANSWERS.items())[2:])
    journal.close()
    return folder / "journal" / "000.jsonl"


def test_answers_come_back_to_the_last_bit(tmp_path):
    filled(tmp_path)
    assert Journal(tmp_path).read() == ANSWERS


def test_after_a_cut_at_any_byte_only_whole_lines_are_there_and_the_file_ends_with_one(tmp_path):
    file = filled(tmp_path)
    content = file.read_bytes()
    for cut in range(len(content)):
        file.write_bytes(content[:cut])
        whole = content[:cut].count(b"\n")
        assert list(Journal(tmp_path).read()) == list(ANSWERS)[:whole]
        assert file.read_bytes() == b"".join(content.splitlines(keepends=True)[:whole])


def test_a_process_that_starts_later_writes_a_file_of_its_own(tmp_path):
    filled(tmp_path)
    journal = opened(tmp_path)
    assert journal.next_number() == 1
    journal.append(2, [("k3", Scored(-1.0, False))])
    journal.close()
    assert Journal(tmp_path).read() == ANSWERS | {"k3": Scored(-1.0, False)} and Journal(tmp_path).next_number() == 3


def test_a_file_that_another_process_has_made_is_never_written(tmp_path):
    file = filled(tmp_path)
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"000\.jsonl: cannot be written \(File exists\)"):
        opened(tmp_path).append(0, [("k3", Scored(-1.0, False))])
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("the model", "d" * 32, "the model changed"),
        ("--dtype", "bfloat16", "--dtype is bfloat16, was float32"),
        ("its tokenizer", "d" * 32, "its tokenizer changed"),
        ("the task arc", "d" * 32, "the task arc changed"),
    ],
)
def test_another_identity_is_refused_by_name_and_changes_nothing(tmp_path, name, value, said):
    filled(tmp_path)
    before = (tmp_path / "journal" / "identity.json").read_bytes()
    with pytest.raises(UserError, match=f"holds answers of another evaluation \\({said}\\); give another folder"):
        opened(tmp_path, **{name: value})
    assert (tmp_path / "journal" / "identity.json").read_bytes() == before


def test_another_task_is_added_and_one_left_out_is_still_known(tmp_path):
    opened(tmp_path, **{"the task piqa": "e" * 32})
    opened(tmp_path)
    with pytest.raises(UserError, match="the task piqa changed"):
        opened(tmp_path, **{"the task piqa": "f" * 32})


def test_files_that_were_met_name_their_model(tmp_path):
    opened(tmp_path)
    Journal(tmp_path).open(IDENTITY, "other files", IDENTITY["the model"])
    assert Journal(tmp_path).models() == {"files": "a" * 32, "other files": "a" * 32}


def test_answers_without_an_identity_are_of_nobody(tmp_path):
    filled(tmp_path)
    (tmp_path / "journal" / "identity.json").unlink()
    with pytest.raises(UserError, match=r"identity\.json: is missing"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "line",
    [b"{}\n", b"[]\n", b"\xff\n", b'{"key": "k", "answer": {"logprob": -1.0}}\n', b'{"key": "k", "answer": 3}\n'],
)
def test_a_whole_line_that_is_no_answer_is_named(tmp_path, line):
    file = filled(tmp_path)
    file.write_bytes(file.read_bytes() + line)
    with pytest.raises(DamagedFile, match=r"000\.jsonl line 4: damaged"):
        Journal(tmp_path).read()


def test_two_answers_to_one_request_are_refused(tmp_path):
    file = filled(tmp_path)
    row = json.dumps({"key": "k0", "answer": {"logprob": -2.0, "greedy": True}})
    file.write_bytes(file.read_bytes() + row.encode() + b"\n")
    with pytest.raises(DamagedFile, match=r"000\.jsonl line 4: damaged: the request has another answer"):
        Journal(tmp_path).read()
