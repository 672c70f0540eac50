"""Which signals a run obeys, and what a touched file asks for."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm.signals import STOP_SIGNALS, heeded
from llm.train.stop import SAVE_FILE, Requests, leave_before_first_step


@pytest.fixture(autouse=True)
def signals_of_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_every_signal_that_asks_to_stop_is_heard_and_the_first_counts(number: signal.Signals, tmp_path: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
    requests = Requests(tmp_path)
    assert requests.stop is None
    signal.raise_signal(number)
    signal.raise_signal(signal.SIGTERM)
    assert requests.stop == number.name
    requests.close()


def test_a_run_under_nohup_is_deaf_to_a_closing_terminal_but_not_to_its_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    requests = Requests(tmp_path)
    signal.raise_signal(signal.SIGHUP)
    assert requests.stop is None
    requests.close()
    assert signal.SIGHUP in heeded(launched=True), "torchrun kills who does not end"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("RANK", "0")
    requests = Requests(tmp_path)
    signal.raise_signal(signal.SIGHUP)
    assert requests.stop == "SIGHUP"
    requests.close()


def test_after_the_run_a_signal_does_nothing(tmp_path: Path) -> None:
    leave_before_first_step()
    Requests(tmp_path).close()
    signal.raise_signal(signal.SIGTERM)  # would end this process


def test_signals_are_given_back_to_whoever_had_them(tmp_path: Path) -> None:
    heard: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    Requests(tmp_path).close()
    signal.raise_signal(signal.SIGUSR1)
    assert heard == [signal.SIGUSR1]


def test_a_touched_file_that_cannot_be_removed_asks_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = Requests(tmp_path)
    try:
        file = tmp_path / SAVE_FILE
        file.touch()
        assert requests.save_wanted()
        with monkeypatch.context() as read_only:
            read_only.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError(30, "Read-only")))
            requests.save_done()
        assert file.exists() and not requests.save_wanted()
        os.utime(file, ns=(1, 1))
        assert requests.save_wanted(), "touched again"
        requests.save_done()
        assert not requests.save_wanted()
    finally:
        requests.close()


def test_a_run_folder_that_cannot_be_looked_into_asks_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = Requests(tmp_path)
    monkeypatch.setattr(Path, "stat", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "denied")))
    assert not requests.save_wanted()
    requests.close()
