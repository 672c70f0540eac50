"""Prompts from a terminal and from a pipe."""

import io
import sys

import pytest

from llm.errors import UserError
from llm.generation.terminal import converse


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def shown() -> list[tuple[str, str, int]]:
    return []


@pytest.mark.parametrize(("typed", "texts"), [("one\n two \r\n\n", ["one", " two ", ""]), ("one", ["one"])])
def test_each_line_of_a_pipe_is_a_prompt(monkeypatch, shown, typed, texts):
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed, newline=""))
    converse(lambda *one: shown.append(one))
    assert shown == [(text, f"line {i + 1} of stdin", i) for i, text in enumerate(texts)]


@pytest.mark.parametrize("stdin", [None, io.StringIO("")], ids=["closed", "empty"])
def test_without_any_prompt_a_document_is_begun(monkeypatch, shown, stdin):
    monkeypatch.setattr(sys, "stdin", stdin)
    converse(lambda *one: shown.append(one))
    assert shown == [("", "the empty prompt", 0)]


def test_a_terminal_goes_on_after_ctrl_c_and_bad_prompts_until_it_ends(monkeypatch, shown, capsys):
    typed = iter(["one", KeyboardInterrupt(), "broken off", "too long", "last"])

    def line(_: str) -> str:
        try:
            word = next(typed)
        except StopIteration:
            raise EOFError from None
        if isinstance(word, BaseException):
            raise word
        return word

    def show(text: str, name: str, place: int) -> None:
        shown.append((text, name, place))
        if text == "broken off":
            raise KeyboardInterrupt
        if text == "too long":
            raise UserError("the prompt is too long")

    monkeypatch.setattr("builtins.input", line)
    monkeypatch.setattr(sys, "stdin", Terminal())
    converse(show)
    assert [text for text, _, _ in shown] == ["one", "broken off", "too long", "last"]
    assert [place for *_, place in shown] == [0, 1, 2, 3]
    assert "error: the prompt is too long" in capsys.readouterr().err


def test_a_pipe_ends_at_a_bad_prompt(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))

    def refuse(text: str, name: str, place: int) -> None:
        raise UserError(f"{name} is bad")

    with pytest.raises(UserError, match="line 1 of stdin is bad"):
        converse(refuse)
