"""A chat template that renders: messages in, text out, with the reason where it cannot.

Marks are characters of the private use planes that neither template nor conversation has. They are put into what is
said, or around it, to see in the rendered text where it came from, and are taken out again.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2

from llm.errors import UserError
from llm.tokenizers.chat.sandbox import MOST_SOURCE, Exceeded, Sandbox, budget

MARKS = range(0xF0000, 0xF1000)
MOST_OF_A_REASON = 300


class Renderer:
    """A template's text, compiled. `name`: what messages call it."""

    def __init__(self, source: str, name: str, names_of_marks: Mapping[str, str]) -> None:
        """names_of_marks: bos_token, eos_token and the like, which templates know by these names. UserError where the
        text is no template."""
        self.source, self.name, self._marks = source, name, dict(names_of_marks)
        if len(source) > MOST_SOURCE:
            raise UserError(f"{name}: longer than {MOST_SOURCE:,} characters")
        self._template = _compiled(source, name)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        generation_prompt: bool = False,
        generation_marks: tuple[str, str] = ("", ""),
    ) -> str:
        """The text of a conversation. UserError naming the template, with what it says where it refuses."""
        self._template.environment.generation_marks = generation_marks  # type: ignore[attr-defined]
        try:
            with budget():
                return self._template.render(
                    messages=list(messages),
                    tools=list(tools) or None,
                    documents=None,
                    add_generation_prompt=generation_prompt,
                    **self._marks,
                )
        except jinja2.exceptions.SecurityError as error:
            raise UserError(f"{self.name}: {_line(error)}") from None
        except Exceeded as error:
            raise UserError(f"{self.name}: {error}") from None
        except (RecursionError, MemoryError):
            raise UserError(f"{self.name}: is nested too deeply, or takes too much memory") from None
        except jinja2.TemplateError as error:
            raise UserError(f"{self.name} refuses the conversation: {_line(error)}") from None
        except Exception as error:
            raise UserError(f"{self.name} fails on the conversation: {type(error).__name__}: {_line(error)}") from None


@lru_cache(maxsize=64)
def _compiled(source: str, name: str) -> jinja2.Template:
    try:
        return Sandbox().from_string(source)
    except jinja2.exceptions.SecurityError as error:
        raise UserError(f"{name}: {_line(error)}") from None
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{name}: not a template that can be used: line {error.lineno}: {_line(error)}") from None
    except (RecursionError, MemoryError, SyntaxError, OverflowError) as error:
        raise UserError(f"{name}: not a template that can be used: {_line(error)}") from None


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= MOST_OF_A_REASON else f"{text[:MOST_OF_A_REASON]}..."


def strings(value: Any) -> Iterator[str]:
    """All texts in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def unused(texts: Sequence[str], count: int) -> list[str]:
    """`count` marks that no text has."""
    high = max((max(text) for text in texts if text), default="")
    if ord(high or "a") < MARKS[0]:
        return [chr(point) for point in MARKS[:count]]
    taken = set().union(*texts)
    return [chr(point) for point in range(MARKS[0], 0x10FFFE) if chr(point) not in taken][:count]


def taken_out(text: str, marks: str) -> tuple[str, list[tuple[int, str]]]:
    """The text without marks, and (place in that text, mark) of each."""
    parts = re.split(f"([{marks}])", text)
    places, place = [], 0
    for i, part in enumerate(parts):
        if i % 2:
            places.append((place, part))
        else:
            place += len(part)
    return "".join(parts[::2]), places
