"""Command lines: every flag is settled before the job runs; what the user must mend is one last line."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TextIO

import pytest
from pydantic import BaseModel

from llm.cli import EXIT_UNREAD, Repeated, run_cli, split
from llm.errors import UserError
from llm.paths import PathText

Job = tuple[Callable[..., None], list[dict]]


@pytest.fixture
def job() -> Job:
    """A function with flags of all kinds, and the list of what it was called with."""
    calls: list[dict] = []

    def shout(
        word: str,
        times: int = 1,
        volume: float = 0.5,
        polite: bool = False,
        tags: tuple[str, ...] = (),
        numbers: list[int] | None = None,
        mood: Literal["good", "bad"] = "good",
    ) -> None:
        """Shout a word."""
        calls.append(dict(locals()))

    return shout, calls


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["--word=10"], {"word": "10"}),
        (["--word=1e5,2"], {"word": "1e5,2"}),
        (["--word", "None"], {"word": "None"}),
        (["hello", "--times", "-3"], {"word": "hello", "times": -3}),
        (["hello", "2"], {"word": "hello", "times": 2}),
        (["hello", "--volume=1e-4"], {"volume": 1e-4}),
        (["hello", "--polite"], {"polite": True}),
        (["--polite", "--word", "hello"], {"word": "hello", "polite": True}),
        (["hello", "--polite=false"], {"polite": False}),
        (["hello", "--polite=True"], {"polite": True}),
        (["hello", "--tags=a,b"], {"tags": ("a", "b")}),
        (["hello", "--numbers=1,2"], {"numbers": [1, 2]}),
        (["hello", "--numbers=None"], {"numbers": None}),
        (["hello", "--mood=bad"], {"mood": "bad"}),
        (["--word", ""], {"word": ""}),
        (["--word="], {"word": ""}),
        (["--word", "- a=b --c"], {"word": "- a=b --c"}),
    ],
    ids=" ".join,
)
def test_values_have_the_types_of_the_signature(job: Job, line: list[str], expected: dict) -> None:
    shout, calls = job
    run_cli(shout, argv=line)
    assert {name: calls[0][name] for name in expected} == expected
    assert all(type(calls[0][name]) is type(value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["hello", "--tmies=3"], "unknown flag --tmies; did you mean --times?"),
        (["hello", "--zzz"], "unknown flag --zzz; the flags are --word, --times"),
        (["hello", "--nopolite"], "unknown flag --nopolite; did you mean --polite?"),
        ([], "missing --word"),
        (["hello", "--times=two"], "--times=two: expected a whole number"),
        (["hello", "--times=1.5"], "--times=1.5: expected a whole number"),
        (["hello", "--volume=loud"], "--volume=loud: expected a number"),
        (["hello", "--polite=perhaps"], "--polite=perhaps: expected true or false"),
        (["hello", "--mood=so-so"], "--mood=so-so: possible are good, bad"),
        (["hello", "--times"], "--times has no value"),
        (["--word", "--polite"], "--word has no value"),
        (["hello", "--times=1", "--times=2"], "--times is given 2 times"),
        (["hello", "--word=bye"], "--word is given twice"),
        ([str(i) for i in range(8)], "'7' is one value too many"),
        (["hello", "--", "--interactive"], "a lone -- means nothing here"),
        (["hello", "-", "upper"], "a lone - means nothing here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_line_stops_before_the_job(
    job: Job, line: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shout, calls = job
    with pytest.raises(SystemExit) as stopped:
        run_cli(shout, argv=line)
    assert stopped.value.code == 2
    assert not calls
    assert last_line(capsys).startswith(f"error: {message}")


def test_a_flag_that_may_be_given_several_times_keeps_its_values_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def show(word: str, picture: Repeated = ()) -> None:
        calls.append((word, picture))

    run_cli(show, argv=["--picture", "a,b.png", "hello", "--picture=--c.png", "--picture", "a,b.png"])
    run_cli(show, argv=["hello"])
    run_cli(show, argv=["hello", "a.png"])
    assert calls == [("hello", ("a,b.png", "--c.png", "a,b.png")), ("hello", ()), ("hello", ("a.png",))]
    with pytest.raises(SystemExit):
        run_cli(show, argv=["hello", "--picture"])
    assert last_line(capsys).startswith("error: --picture has no value")


def test_help_prints_docstring_and_flags_and_runs_nothing(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    shout, calls = job
    run_cli(shout, argv=["hello", "--help"])
    text = capsys.readouterr().out
    assert not calls
    assert "Shout a word." in text and "--times: int (default 1)" in text and "--mood: good | bad" in text


def test_a_command_is_chosen_by_the_first_word(job: Job) -> None:
    shout, calls = job
    whispered = []

    def whisper(word: str) -> None:
        whispered.append(word)

    run_cli(shout, argv=["whisper", "--word=hush"], whisper=whisper)
    assert whispered == ["hush"] and not calls


class Settings(BaseModel):
    width: int


def missing_data() -> None:
    raise UserError("data.train=x: no such\nfile")


def wrong_setting() -> None:
    Settings.model_validate({"width": "wide"})


def missing_file() -> None:
    Path("/nonexistent/file").read_bytes()


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (missing_data, "data.train=x: no such file"),
        (wrong_setting, "width: Input should be a valid integer"),
        (missing_file, "/nonexistent/file: No such file or directory"),
    ],
)
def test_what_the_user_must_mend_is_one_last_line(
    work: Callable[[], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_cli(work, argv=[])
    assert stopped.value.code == 2
    assert last_line(capsys).startswith(f"error: {message}")


def test_a_bug_keeps_its_traceback() -> None:
    def buggy() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_cli(buggy, argv=[])


def test_dotted_flags_are_split_and_kept_as_text() -> None:
    assert split(["run", "--train.steps=200", "--optim.lr", "1e-4", "--dry_run"]) == (
        ["run"],
        {"train.steps": "200", "optim.lr": "1e-4", "dry_run": None},
    )


def unread_pipe(**options: int) -> TextIO:
    """A stream into a pipe that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w", **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("buffering", [-1, 1])
def test_help_that_nobody_reads_to_its_end_ends_without_a_word(
    buffering: int, job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", unread_pipe(buffering=buffering))
    with pytest.raises(SystemExit) as ended:
        run_cli(job[0], ["--help"])
    assert ended.value.code == EXIT_UNREAD and capsys.readouterr().err == ""
    sys.stdout.flush()  # as Python does at the end: what is left goes nowhere


def test_the_status_of_bad_input_holds_where_nobody_reads_the_message(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", unread_pipe())
    with pytest.raises(SystemExit) as ended:
        run_cli(job[0], ["--no_such_flag"])
    assert ended.value.code == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_output_that_a_full_disk_lost_is_an_error(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115 (closed with the test)
    with pytest.raises(SystemExit) as ended:
        run_cli(job[0], ["--help"])
    assert ended.value.code == 1
    assert last_line(capsys) == "error: standard output: No space left on device"


def test_a_broken_pipe_of_the_jobs_own_is_no_unread_output(job: Job) -> None:
    def talk() -> None:
        raise BrokenPipeError("a process of its own")

    with pytest.raises(BrokenPipeError):
        run_cli(talk, [])


def test_a_letter_that_the_screen_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def greet() -> None:
        print("gr\u00fc\u00dfe")

    out = tmp_path / "out.txt"
    with open(out, "w", encoding="ascii") as screen:
        monkeypatch.setattr(sys, "stdout", screen)
        run_cli(greet, [])
    assert out.read_bytes() == b"gr\\xfc\\xdfe\n"


def said(capsys: pytest.CaptureFixture[str], job: Job, *line: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        run_cli(job[0], list(line))
    assert stopped.value.code == 2 and not job[1]
    return last_line(capsys)


@pytest.mark.parametrize("word", ["--flag", "--flag=3", "-n 5", "-n", "--", "-", "--no such\nthing", "a=b", "[1, 2]"])
def test_a_value_may_look_like_a_flag(job: Job, word: str) -> None:
    function, calls = job
    run_cli(function, ["--word", word, "--times=2"])
    run_cli(function, [f"--word={word}", "--times", "2"])
    assert [(call["word"], call["times"]) for call in calls] == [(word, 2)] * 2


def test_a_flag_of_the_function_is_no_value(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert "error: --word has no value; one that looks like a flag is given as --word=VALUE" in said(
        capsys, job, "--word", "--times", "3"
    )


def test_the_first_unknown_flag_is_named(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, job, "--wrod", "--flag") == "error: unknown flag --wrod; did you mean --word?"


@pytest.mark.parametrize("line", [["--word", "caf\udce9"], ["--word=caf\udce9"]])
def test_bytes_that_are_no_utf_8_are_named(job: Job, line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, job, *line) == r"error: --word=caf\xe9: the byte 0xe9 is not UTF-8; give the text in UTF-8"


def test_utf_8_under_another_locale_is_said_to_be_just_that(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    word = "caf\u00e9".encode().decode("ascii", errors="surrogateescape")
    assert said(capsys, job, f"--word={word}") == (
        "error: --word=caf\u00e9: is UTF-8, but the locale here is not; put PYTHONUTF8=1 before the command"
    )


def test_the_name_of_a_file_may_be_any_bytes(job: Job, tmp_path: Path) -> None:
    file = tmp_path / "caf\udce9"
    file.touch()
    run_cli(job[0], ["--word", str(file)])
    assert job[1][0]["word"] == str(file)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["--times=1e3"], 1000),
        (["--times=1_000"], 1000),
        (["--times=99999999999999999999"], 99999999999999999999),
    ],
)
def test_a_whole_number_may_be_written_as_in_a_config(job: Job, line: list[str], expected: int) -> None:
    run_cli(job[0], ["hello", *line])
    assert job[1][0]["times"] == expected


@pytest.mark.parametrize("text", ["--times=1.5", "--times=nan", "--volume=nan", "--volume=1e400", "--times="])
def test_what_is_no_finite_number_is_refused(job: Job, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, job, "hello", text).startswith(f"error: {text}: expected a ")


def test_a_path_is_taken_from_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found: list[object] = []

    def take(inputs: list[PathText], output: PathText | None = None) -> None:
        found.extend((inputs, output))

    run_cli(take, ["--inputs=~/a,b", "--output=~/c"])
    assert found == [[str(tmp_path / "a"), "b"], str(tmp_path / "c")]


def test_a_flag_that_is_a_word_of_python_is_no_value_either(capsys: pytest.CaptureFixture[str]) -> None:
    def compare(b: str, with_: str | None = None) -> None:
        raise AssertionError

    with pytest.raises(SystemExit):
        run_cli(compare, ["--b", "--with=transformers"])
    assert last_line(capsys).startswith("error: --b has no value")
