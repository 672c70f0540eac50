"""What of a text that a model wrote is its answer: the first match of the first pattern that matches. Where none does
there is no answer, which is counted; nothing is guessed."""

import re
from collections.abc import Sequence
from typing import Literal

from llm.errors import UserError
from llm.evaluate.tasks.config import Section


class Rule(Section):
    """How an answer is found."""

    pattern: str
    """regular expression; the answer is its first group that matches, or without groups all of it"""
    match: Literal["first", "last"] = "first"
    """which of several matches"""


class Extract:
    """Rules, the later ones for texts in which those before find nothing."""

    def __init__(self, given: str | Rule | Sequence[str | Rule]) -> None:
        """UserError where a pattern is no regular expression."""
        listed = [given] if isinstance(given, str | Rule) else given
        self.rules = [Rule(pattern=one) if isinstance(one, str) else one for one in listed]
        if not self.rules:
            raise UserError("extract: has no patterns")
        try:
            self._patterns = [re.compile(rule.pattern) for rule in self.rules]
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"extract: not a regular expression ({error})") from None

    def __call__(self, text: str) -> tuple[str | None, int]:
        """The answer, and which rule found it, from 1; (None, 0) where none does."""
        for number, (rule, pattern) in enumerate(zip(self.rules, self._patterns, strict=True), 1):
            found = list(pattern.finditer(text))
            if found:
                match = found[0 if rule.match == "first" else -1]
                groups = [group for group in match.groups() if group]
                return (groups[0] if groups else match.group()).strip(), number
        return None, 0
