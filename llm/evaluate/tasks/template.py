"""Jinja templates over the columns of a row, in the sandbox of chat templates: what they reach and do is limited.

A template that is one expression (`{{ choices }}`) gives its value as it is; any other gives a text. Blocks and line
ends stay as they are written, the last line end too.
"""

from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.environment import TemplateExpression
from jinja2.runtime import Undefined

from llm.data.json_rows import called
from llm.errors import UserError
from llm.tokenizers.chat.sandbox import MOST_SOURCE, Exceeded, Sandbox, budget

MOST_OF_A_REASON = 300


class RowSandbox(Sandbox):
    """The environment of templates over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.trim_blocks = self.lstrip_blocks = False
        self.keep_trailing_newline = True
        self.undefined = jinja2.StrictUndefined


SANDBOX = RowSandbox()


class Template:
    """A template. `key`: what messages call it."""

    def __init__(self, source: str, key: str) -> None:
        """UserError naming the key where the source is no template."""
        self.source, self.key = source, key
        if len(source) > MOST_SOURCE:
            raise UserError(f"{key}: longer than {MOST_SOURCE:,} characters")
        try:
            expression = _only_expression(SANDBOX.parse(source))
            self._expression: TemplateExpression | None = None
            self._text: jinja2.Template | None = None
            if expression is None:
                self._text = SANDBOX.from_string(source)
            else:
                kept = nodes.Assign(nodes.Name("result", "store", lineno=1), expression, lineno=1)
                self._expression = TemplateExpression(SANDBOX.from_string(nodes.Template([kept], lineno=1)), False)
        except jinja2.exceptions.SecurityError as error:
            raise UserError(f"{key}: the template {_line(error)}") from None
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{key}: not a template that can be used: line {error.lineno}: {_line(error)}") from None
        except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError, OverflowError) as error:
            raise UserError(f"{key}: not a template that can be used: {_line(error)}") from None

    def value(self, row: Mapping[str, Any]) -> Any:
        """What the template makes of a row. UserError naming the key, and a column that is missing."""
        try:
            with budget():
                if self._text is not None:
                    return self._text.render(row)
                assert self._expression is not None
                found = self._expression(row)
                return str(found) if isinstance(found, Undefined) else found  # its text is an error that names it
        except jinja2.exceptions.SecurityError as error:
            raise UserError(f"{self.key}: the template {_line(error)}") from None
        except jinja2.UndefinedError as error:
            columns = ", ".join(map(str, list(row)[:20])) or "none"
            raise UserError(f"{self.key}: {_line(error)} (the row's columns: {columns})") from None
        except Exceeded as error:
            raise UserError(f"{self.key}: the template {error}") from None
        except (RecursionError, MemoryError):
            raise UserError(f"{self.key}: the template is nested too deeply, or takes too much memory") from None
        except Exception as error:  # whatever an expression does with the values of a row
            raise UserError(f"{self.key}: the template fails: {type(error).__name__}: {_line(error)}") from None

    def text(self, row: Mapping[str, Any]) -> str:
        """The value as a text: one, or a number."""
        return as_text(self.value(row), self.key)


def as_text(value: Any, key: str) -> str:
    """A text, or a number as one. UserError naming the key where the value is something else."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"{key} is {kind_of(value)}, not a text")


def kind_of(value: Any) -> str:
    """What a value is called in a message."""
    return "a text" if isinstance(value, str) else called(value)


def _only_expression(parsed: nodes.Template) -> nodes.Expr | None:
    """The expression that is all of a template."""
    match parsed.body:
        case [nodes.Output(nodes=[expression])] if not isinstance(expression, nodes.TemplateData):
            return expression
    return None


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= MOST_OF_A_REASON else f"{text[:MOST_OF_A_REASON]}..."
