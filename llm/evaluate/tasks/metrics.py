"""Metrics as pure functions: of one document, and of sums over documents.

Sources: lm-eval 0.4.13 (acc_norm, words); Chen et al. 2021, arXiv:2107.03374 (pass@k); Wang et al. 2022,
arXiv:2203.11171 (maj@k); Rajpurkar et al. 2016, arXiv:1606.05250 (F1 of words); Antol et al. 2015, arXiv:1505.00468
(soft accuracy of answers about pictures).
"""

import math
import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence

LOWER_IS_BETTER = frozenset(("ppl", "perplexity", "word_ppl", "byte_ppl", "bits_per_byte", "loss", "rmse", "mae"))
"""Metrics of which less is better; of all others more is."""
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
NUMBER = re.compile(r"[-+]?(\d+(,\d{3})+|\d+)?(\.\d+)?([eE][-+]?\d+)?")


def highest(scores: Sequence[float]) -> tuple[int, bool]:
    """The first of the highest, and whether there are several."""
    best = max(scores)
    return scores.index(best), scores.count(best) > 1


def normalised(logprobs: Sequence[float], lengths: Sequence[int]) -> list[float]:
    """Log-probabilities by length; something of no length is never the best."""
    return [a / b if b else -math.inf for a, b in zip(logprobs, lengths, strict=True)]


def words(text: str) -> int:
    """How many stretches blanks cut a text into; those before a first and after a last blank count, as in lm-eval."""
    return len(re.split(r"\s+", text))


def plain(text: str) -> str:
    """A text in small letters without punctuation, articles and blanks but single ones."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words, both texts `plain`; 1 where neither has words."""
    said, meant = plain(answer).split(), plain(reference).split()
    if not said or not meant:
        return float(said == meant)
    same = sum((Counter(said) & Counter(meant)).values())
    return 2 * same / (len(said) + len(meant))


def number(text: str) -> float | None:
    """The number that a text is, but for currency, percent signs, commas at thousands and a last full stop."""
    found = text.strip().strip("$€£%").strip().removesuffix(".").strip()
    if not any(c.isdigit() for c in found) or NUMBER.fullmatch(found) is None:
        return None
    return float(found.replace(",", ""))


def same_number(answer: str, reference: str) -> bool:
    """Whether two texts are the same number, to 1e-9 of it."""
    one, other = number(answer), number(reference)
    return one is not None and other is not None and math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)


def pass_at(n: int, correct: int, k: int) -> float:
    """How likely one of k is correct, drawn from n of which some are: 1 - C(n - correct, k) / C(n, k)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def most_frequent(answers: Sequence[Hashable | None]) -> Hashable | None:
    """The answer that is given most often, the first of several; None are no answers."""
    counts = Counter(answer for answer in answers if answer is not None)
    return max(counts, key=counts.__getitem__) if counts else None  # max keeps the first, and counts their order


NUMBER_WORDS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
BETWEEN_DIGITS = re.compile(r"(?<=\d)[,](?=\d{3})")
VQA_PUNCTUATION = re.compile(r"""[;/\[\]"{}()=+\\_\-<>@`?!:*&^%$#|~]""")


def vqa_plain(text: str) -> str:
    """An answer about a picture without articles, punctuation (a point in a number stays), and words for numbers."""
    found = BETWEEN_DIGITS.sub("", " ".join(text.lower().split()))
    found = VQA_PUNCTUATION.sub(" ", found).replace("'", "")
    found = re.sub(r"(?<!\d)[.,]|[.,](?!\d)", " ", found)
    kept = [NUMBER_WORDS.get(word, word) for word in found.split() if word not in ("a", "an", "the")]
    return " ".join(kept)


def vqa_accuracy(answer: str, given: Sequence[str]) -> float:
    """min(people who gave this answer / 3, 1)."""
    said = vqa_plain(answer)
    return min(1.0, sum(vqa_plain(other) == said for other in given) / 3)


def yes_or_no(text: str) -> bool | None:
    """Whether an answer begins as yes or no does; None where it is neither."""
    first = next(iter(vqa_plain(text).split()), "")
    return {"yes": True, "no": False}.get(first)
