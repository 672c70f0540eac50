"""A long text cut into parts whose ids, one after the other, are those of the whole: libraries take memory many times
the size of what they encode at once.

Where a text may be cut depends on the tokenizer; what it cannot promise to be the same stays in one part.
"""

from collections.abc import Callable, Iterable

PART_CHARACTERS = 1 << 18
MOST_AT_ONCE = 4 * PART_CHARACTERS
"""Longer parts are worth a line: their encoding may take much memory."""

SafeAt = Callable[[str, int], bool]
"""Whether a text may be cut before its character i."""


def cut(text: str, safe_at: SafeAt, size: int = PART_CHARACTERS) -> list[str]:
    """The text in parts of about `size` characters, cut at safe places only; a part may be longer where there are
    none.
    """
    parts, begin = [], 0
    while len(text) - begin > size:
        end = begin + size
        place = next((i for i in range(end, begin + size // 2, -1) if safe_at(text, i)), None)
        if place is None:
            place = next((i for i in range(end + 1, len(text)) if safe_at(text, i)), len(text))
        parts.append(text[begin:place])
        begin = place
    if begin < len(text) or not parts:
        parts.append(text[begin:])
    return parts


def anywhere(text: str, i: int) -> bool:
    """For tokenizers whose ids are of single characters or bytes."""
    return True


def no_piece_crosses(pieces: Iterable[str], space: str) -> SafeAt:
    """For tokenizers that merge characters into `pieces`, in which a space is written as `space`: safe is a place
    between two characters that stand beside each other in no piece, as no merge can then reach across it.
    """
    joined = {a + b for piece in pieces for a, b in zip(piece, piece[1:], strict=False)}

    def safe_at(text: str, i: int) -> bool:
        pair = text[i - 1 : i + 1]
        return space not in pair and pair.replace(" ", space) not in joined

    return safe_at


def between_words(begins_word: Callable[[str, int], bool]) -> SafeAt:
    """For tokenizers that first cut text into words: safe is a place before the single space between two letters if
    `begins_word(text around it, place)` finds a word beginning there, wherever that text itself begins.
    """

    def safe_at(text: str, i: int) -> bool:
        if text[i] != " " or not text[i - 1].isalpha() or not text[i + 1 : i + 2].isalpha():
            return False
        return all(begins_word(text[max(0, i - n) : i + 100], min(i, n)) for n in (100, 101, 103, 107))

    return safe_at
