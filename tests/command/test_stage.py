"""Setting up says one line a stage in a file, and one moving line on a terminal; what fails says why."""

import os
import pty
import subprocess

from tests.shared import ROOT

STAGE = ["sh", str(ROOT / "tools/stage.sh")]


def on_a_terminal(words: list[str], term: str) -> str:
    """All that is written to a terminal of that kind."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*STAGE, *words], stdout=theirs, stderr=theirs, env=os.environ | {"TERM": term})
    process.wait()
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # nobody has the other end any more
            break
        if not part:
            break
        written += part
    os.close(ours)
    return written.decode()


def test_a_stage_is_a_line_in_a_file() -> None:
    done = subprocess.run([*STAGE, "unpacking", "sh", "-c", "echo unasked"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "unpacking\n", "")


def test_a_stage_that_fails_says_why_and_keeps_its_status() -> None:
    done = subprocess.run([*STAGE, "unpacking", "sh", "-c", "echo no room; exit 3"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "unpacking\n", "no room\n")


def test_a_stage_moves_on_a_terminal_and_not_on_a_dumb_one() -> None:
    moving = on_a_terminal(["unpacking", "true"], "xterm")
    assert moving.startswith("\r\x1b[Kunpacking ... 0 s") and "\n" not in moving
    assert on_a_terminal(["all is there"], "xterm") == "\r\x1b[Kall is there\r\n"
    assert on_a_terminal(["unpacking", "true"], "dumb") == "unpacking\r\n"
