"""Texts before which a growing text ends, whichever tokens they are written in."""

from collections.abc import Sequence


class StopTexts:
    """A growing text that ends before the first of some texts that comes to stand in it."""

    def __init__(self, texts: Sequence[str]) -> None:
        """ValueError where one is empty."""
        if "" in texts:
            raise ValueError("a stop text is empty; every text has that in it")
        self._texts = tuple(texts)
        self._held = ""
        self.stopped = False
        """Whether one stands in it."""

    def push(self, part: str) -> str:
        """What is certain of the text once this part has come: what may begin a stop text waits."""
        if self.stopped or not part:
            return ""
        self._held += part
        found = [place for place in map(self._held.find, self._texts) if place >= 0]
        if found:
            self.stopped = True
            certain, self._held = self._held[: min(found)], ""
            return certain
        waiting = max((_begun(self._held, text) for text in self._texts), default=0)
        certain = self._held[: len(self._held) - waiting]
        self._held = self._held[len(certain) :]
        return certain

    def end(self) -> str:
        """What is left when no more comes."""
        left, self._held = self._held, ""
        return left


def _begun(text: str, stop: str) -> int:
    """How much of a stop text, not the whole of it, the end of a text may be."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
