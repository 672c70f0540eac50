"""Folders and files appear whole or not at all, also where several processes write the same one, or are killed."""

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llm import atomic
from llm.atomic import new_directory, write_file, write_unless_same

# Writes a folder under the given name, says so, and waits to be killed.
KILLED = """
import sys, time
from pathlib import Path
from llm.atomic import new_directory, _locked_file
with new_directory(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    _locked_file(Path(sys.argv[1]).with_name("file"))
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path: Path):
    """Another process that is writing tmp_path/source and tmp_path/file."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "source")], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "source") as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == []
    with new_directory(tmp_path / "source") as folder:
        (folder / "whole").write_text("whole")
    assert (names(tmp_path), names(tmp_path / "source")) == (["source"], ["whole"])


def test_of_two_that_prepare_at_once_one_folder_stays(tmp_path: Path) -> None:
    target = tmp_path / "source"
    with pytest.raises(FileExistsError), new_directory(target) as slower:
        (slower / "file").write_text("slower")
        with new_directory(target) as faster:
            assert faster != slower
            (faster / "file").write_text("faster")
    assert names(tmp_path) == ["source"]
    assert (target / "file").read_text() == "faster"


def test_what_another_process_is_writing_is_left_alone_though_its_id_looks_dead(
    other: subprocess.Popen, tmp_path: Path
) -> None:
    # as in another container, whose process ids say nothing here: only the lock is asked
    writing = names(tmp_path)
    assert len(writing) == 3 and not any(str(other.pid) in name.split(".") for name in writing)
    with new_directory(tmp_path / "source"):
        pass
    write_file(tmp_path / "file", b"mine")
    assert set(writing) < set(names(tmp_path))


def test_what_a_killed_process_left_is_cleared(other: subprocess.Popen, tmp_path: Path) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert len(names(tmp_path)) == 3
    with new_directory(tmp_path / "source"):
        pass
    write_file(tmp_path / "file", b"mine")
    assert names(tmp_path) == ["file", "source"]


def test_it_is_cleared_where_the_file_need_not_be_written_too(other: subprocess.Popen, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    other.kill()
    other.wait()
    assert any(name.startswith(".file.") for name in names(tmp_path))
    before = (tmp_path / "file").stat().st_mtime_ns
    write_unless_same(tmp_path / "file", b"content")
    assert not any(name.startswith(".file.") for name in names(tmp_path))
    assert (tmp_path / "file").stat().st_mtime_ns == before


def test_without_flock_nothing_is_taken_for_abandoned(
    other: subprocess.Popen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(descriptor: int, mode: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    writing = names(tmp_path)
    with new_directory(tmp_path / "source") as folder:
        (folder / "whole").write_text("whole")
    write_file(tmp_path / "file", b"mine")
    assert set(names(tmp_path)) == {*writing, "source", "file"}
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_name_lost_before_it_was_locked_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # another process locks the new file first and removes it as abandoned
    lock, lost = atomic._try_lock, []

    def taken(descriptor: int) -> bool | None:
        if not lost:
            lost.append(next(tmp_path.glob(".file.*")))
            lost[0].unlink()
        return lock(descriptor)

    monkeypatch.setattr(atomic, "_try_lock", taken)
    write_file(tmp_path / "file", b"content")
    assert lost and names(tmp_path) == ["file"]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_file(tmp_path / "deep" / "file", b"old")
    write_file(tmp_path / "deep" / "file", b"new")
    assert (tmp_path / "deep" / "file").read_bytes() == b"new"
    assert names(tmp_path / "deep") == ["file"]


def test_the_longest_names_have_room_for_their_temporary_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "h" * 64)
    name = "\u00e9" * 120  # 240 of the 255 bytes of a file name
    with new_directory(tmp_path / name):
        pass
    write_file(tmp_path / (name + ".txt"), b"content")
    assert names(tmp_path) == [name, name + ".txt"]


def _write_many(folder: Path, number: int) -> None:
    for _ in range(30):
        write_file(folder / "file", str(number).encode() * 1000)


def test_processes_that_write_one_file_at_once_all_succeed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(tmp_path, number)) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=120)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert names(tmp_path) == ["file"]
    assert len(set((tmp_path / "file").read_text())) == 1 and os.path.getsize(tmp_path / "file") == 1000
