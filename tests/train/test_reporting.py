"""What a run reports never ends it: full disks, closed pipes, folders that are gone, threads that die."""

import errno
import io
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from llm import LLM, ModelArgs, screen
from llm.train.curves import TensorBoard
from llm.train.log import RunLog, cut_from
from llm.train.reporting import LineFile, Opened
from llm.train.trace import Trace
from tests.train.test_log import ROW
from tests.train.test_trace import ALONE
from tests.vision.pictures import levels

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
ALWAYS_FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")


class FullDisk:
    """From construction to `free`, this file takes no more than `room` bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, file: Path, room: int = 0, truncates: bool = True) -> None:
        self.file, self.room, self.full, self.truncates = file, room, True, truncates
        self._write, self._truncate = os.write, os.ftruncate
        monkeypatch.setattr(os, "write", self.write)
        monkeypatch.setattr(os, "ftruncate", self.truncate)

    def _is_mine(self, descriptor: int) -> bool:
        return self.full and self.file.exists() and os.path.samestat(os.fstat(descriptor), self.file.stat())

    def write(self, descriptor: int, data: bytes) -> int:
        if not self._is_mine(descriptor):
            return self._write(descriptor, data)
        if not self.room:
            raise FULL
        taken = self._write(descriptor, data[: self.room])
        self.room -= taken
        return taken

    def truncate(self, descriptor: int, length: int) -> None:
        if self._is_mine(descriptor) and not self.truncates:
            raise FULL
        self._truncate(descriptor, length)


def row(step: int) -> dict[str, Any]:
    return {**ROW, "step": step}


def steps_of(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_line_that_a_full_disk_takes_half_of_is_not_there_and_the_next_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = LineFile(tmp_path / "a.txt")
    file.write("one")
    disk = FullDisk(monkeypatch, tmp_path / "a.txt", room=2)
    with pytest.raises(OSError, match="No space"):
        file.write("second")
    assert (tmp_path / "a.txt").read_text() == "one\n"
    disk.full = False
    file.write("three")
    assert (tmp_path / "a.txt").read_text() == "one\nthree\n"


def test_where_half_a_line_cannot_be_taken_back_the_next_begins_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = LineFile(tmp_path / "a.txt")
    disk = FullDisk(monkeypatch, tmp_path / "a.txt", room=2, truncates=False)
    file.close()
    (tmp_path / "a.txt").touch()
    with pytest.raises(OSError, match="No space"):
        file.write("second")
    disk.full = False
    file.write("three")
    assert (tmp_path / "a.txt").read_text() == "se\nthree\n"


def test_a_line_behind_what_a_killed_process_left_begins_afresh(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntw")
    LineFile(tmp_path / "a.txt").write("three")
    assert (tmp_path / "a.txt").read_text() == "one\ntw\nthree\n"


def test_files_are_utf_8_and_take_every_string(tmp_path: Path) -> None:
    LineFile(tmp_path / "a.txt").write("gr\u00fc\u00df \U0001f600 \udcff")
    assert (tmp_path / "a.txt").read_bytes().decode("utf-8") == "gr\u00fc\u00df \U0001f600 \\udcff\n"


def test_a_removed_run_folder_is_begun_again(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    log = RunLog(run_dir, first_step=1, steps=9, interval=1)
    log.step(row(1))
    for file in run_dir.iterdir():
        file.unlink()
    run_dir.rmdir()
    log.step(row(2))
    log.close()
    assert steps_of(run_dir) == [2] and "step      2/9" in (run_dir / "log.txt").read_text()


def test_lost_rows_are_reported_once_and_counted_when_it_works_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path, first_step=1, steps=9, interval=100)
    log.step(row(1))
    disk = FullDisk(monkeypatch, tmp_path / "metrics.jsonl", room=10)
    for step in (2, 3, 4):
        log.step(row(step))
    disk.full = False
    log.step(row(5))
    log.close()
    assert steps_of(tmp_path) == [1, 5]
    said = (tmp_path / "log.txt").read_text()
    assert said.count("metrics.jsonl cannot be written (No space left on device); the run goes on without") == 1
    assert said.count("metrics.jsonl is written again; 3 rows were lost") == 1
    assert capsys.readouterr().out == said


def test_what_is_lost_at_the_end_is_reported_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path, first_step=1, steps=9, interval=1)
    FullDisk(monkeypatch, tmp_path / "log.txt")
    (tmp_path / "log.txt").touch()
    log.say("two\nlines")
    log.close()
    assert "log.txt: the last 2 lines were lost (No space left on device)" in capsys.readouterr().out


def test_a_screen_that_is_gone_is_reported_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(os.dup(write), "w") as pipe:
        monkeypatch.setattr(sys, "stdout", screen.Protected(pipe))
        log = RunLog(tmp_path, first_step=1, steps=3, interval=1)
        for step in (1, 2, 3):
            log.step(row(step))
        log.close()
        os.dup2(os.open(os.devnull, os.O_WRONLY), pipe.fileno())  # for what is still in its buffer
    said = (tmp_path / "log.txt").read_text()
    assert said.count("the screen cannot be written (Broken pipe); the run goes on without") == 1
    assert "the screen: the last 3 lines were lost (Broken pipe)" in said
    assert steps_of(tmp_path) == [1, 2, 3]


def fail_to(kind: int) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise OSError(kind, os.strerror(kind))

    return fail


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EIO, errno.EPIPE, errno.EAGAIN])
def test_a_protected_stream_goes_on_and_complains_once(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        write = flush = staticmethod(fail_to(kind))

    monkeypatch.setattr(sys, "stdout", screen.Protected(Broken()))  # type: ignore[arg-type]
    print("lost", flush=True)
    lost = screen.complaint()
    assert lost is not None and lost.errno == kind and screen.complaint() is None


def test_a_closed_or_missing_screen_is_none_to_fail_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    closed = open(tmp_path / "a.txt", "w")  # noqa: SIM115
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    monkeypatch.setattr(sys, "stderr", None)
    screen.protect()
    print("lost", flush=True)
    print("lost", file=sys.stderr, flush=True)
    assert screen.complaint() is not None
    stdout = sys.stdout
    screen.protect()
    assert sys.stdout is stdout, "twice is once"


def test_a_letter_that_the_screen_lacks_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "out.txt", "w", encoding="latin-1") as stream:
        monkeypatch.setattr(sys, "stdout", screen.Protected(stream))
        print("gr\u00fc\u00df \u65e5")
    assert (tmp_path / "out.txt").read_bytes() == b"gr\xfc\xdf \\u65e5\n"


class Faulty:
    """A sink that raises whatever it is asked."""

    name = "curves"

    def numbers(self, step: int, values: dict[str, float]) -> None:
        raise RuntimeError("no network")

    def text(self, step: int, name: str, text: str) -> None:
        raise RuntimeError("no network")

    def images(self, step: int, name: str, tiles: Tensor) -> None:
        raise RuntimeError("no network")

    def close(self) -> None:
        raise RuntimeError("no network at all")


def test_a_sink_of_curves_that_raises_is_reported_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path, first_step=1, steps=9, interval=100, curves=[Faulty()])
    for step in (1, 2):
        log.step(row(step))
    log.sample(2, "a", "b")
    log.close()
    said = (tmp_path / "log.txt").read_text()
    assert said.count("curves cannot be written (RuntimeError: no network)") == 1
    assert "curves: the last 3 points of steps were lost (RuntimeError: no network at all)" in said
    assert steps_of(tmp_path) == [1, 2]


def test_tensorboard_shows_the_images_of_a_sample_beside_its_text(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tiles = torch.from_numpy(levels(12, 8, 0)).permute(2, 0, 1)[None]
    log = RunLog(tmp_path, first_step=1, steps=9, interval=100, curves=[TensorBoard(tmp_path, 1)])
    log.sample(2, "<image>a", "b", tiles)
    log.sample(2, "c", "d")
    log.close()
    found = EventAccumulator(str(tmp_path / "tb"), size_guidance={"images": 0})
    found.Reload()
    (image,) = found.Images("sample")
    assert image.step == 2
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(image.encoded_image_string))), levels(12, 8, 0))


def test_tensorboard_goes_on_in_a_new_file_after_its_thread_has_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    board = TensorBoard(tmp_path, 1)
    board.numbers(1, {"train/loss": 3.0})
    monkeypatch.setattr(RecordWriter, "write", fail_to(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        for step in range(2, 1000):  # the thread works on its own time
            board.numbers(step, {"train/loss": 3.0})
    monkeypatch.undo()
    with pytest.raises(OSError, match="No space"):
        board.numbers(1000, {"train/loss": 3.0})  # a pause
    board.numbers(1001, {"train/loss": 2.5})
    board.close()
    files = sorted((tmp_path / "tb").iterdir(), key=lambda file: file.stat().st_mtime_ns)
    assert len(files) == 2
    assert b"train/loss" in files[-1].read_bytes()
    assert "Traceback" not in capsys.readouterr().err


def test_attempts_to_open_become_rarer() -> None:
    uses, tries = itertools.count(), []

    def open_it() -> None:
        tries.append(use)
        raise FULL

    opened: Opened[None] = Opened(open_it, lambda _: None)
    while (use := next(uses)) < 20:
        with pytest.raises(OSError, match="No space"):
            opened.use(lambda _: None)
    assert tries == [0, 2, 5, 10, 19]


def test_repeated_rows_are_cut_off_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) for step in range(1, 6)]
    path.write_text("\n".join(lines) + '\n{"ste')
    monkeypatch.setattr(Path, "write_bytes", fail_to(errno.ENOSPC))
    assert cut_from(path, 4) is None
    assert path.read_text() == "\n".join(lines[:3]) + "\n"
    path.write_text("\n".join(["damaged", *lines]) + "\n")
    said = cut_from(path, 4)
    assert said == f"{path}: damaged lines and rows of repeated steps stay in it (No space left on device)"
    assert path.read_text() == "\n".join(["damaged", *lines[:3]]) + "\n", "no row is there twice"


def test_rows_that_cannot_be_read_are_left_and_a_folder_in_their_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    said = cut_from(tmp_path / "metrics.jsonl", 1)
    assert said is not None and "Is a directory" in said
    log = RunLog(tmp_path, first_step=1, steps=3, interval=1)
    log.step(row(1))
    log.close()
    assert "metrics.jsonl cannot be written (Is a directory)" in (tmp_path / "log.txt").read_text()


@ALWAYS_FULL
def test_a_trace_that_cannot_be_written_is_noted(tmp_path: Path) -> None:
    (tmp_path / "trace.jsonl").symlink_to("/dev/full")
    model = LLM(ModelArgs(dim=16, n_layers=1, n_heads=2, vocab_size=8, max_seq_len=8))
    trace = Trace(model, ALONE, tmp_path / "trace.jsonl", (1, 2), 1)
    for step in (1, 2):
        with trace.step(step, 1.0):
            model(torch.zeros(1, 4, dtype=torch.int64))
    *_, first, last = trace.notes()
    assert "trace.jsonl cannot be written (No space left on device)" in first and "were lost" in last
    assert trace.notes() == []
