"""What is asked of a model, in tokens, and what it answers. Requests know no task, model or batch: two that are alike
have one answer, which is computed once.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm.errors import UserError
from llm.generation.beams import Beams
from llm.generation.pictures import Picture
from llm.generation.sampling import Sampling
from llm.generation.text import FinishReason


@dataclass(frozen=True)
class Score:
    """How likely these tokens are after those."""

    context: tuple[int, ...]
    """at least one"""
    target: tuple[int, ...]
    """at least one; with the context but its last, no more than the model's context"""
    pictures: tuple[Picture, ...] = ()
    """whose tiles fill the slots of the context"""


@dataclass(frozen=True)
class Continue:
    """What the model writes after these tokens."""

    prompt: tuple[int, ...]
    """at least one"""
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    """texts before which the answer ends, whichever tokens they are written in; the tokenizer's end marks end it too"""
    sampling: Sampling = Sampling()
    sample: int = 0
    """which of several answers: with the seed and the prompt it decides the draws"""
    pictures: tuple[Picture, ...] = ()
    """whose tiles fill the slots of the prompt"""
    beams: Beams = Beams()
    """with num_beams above 1 the answer is the best that a search finds"""
    source: tuple[int, ...] = ()
    """what the encoder of an encoder-decoder reads; the prompt then begins the answer"""

    @property
    def n_tokens(self) -> int:
        """That are computed before the first new one."""
        return len(self.prompt) + len(self.source)


@dataclass(frozen=True)
class Predict:
    """What the model's prediction head makes of a text."""

    tokens: tuple[int, ...]
    """at least one, its begin and end marks among them; no more than the model's context"""


Request = Score | Continue | Predict


@dataclass(frozen=True)
class Scored:
    """The answer to a Score."""

    logprob: float
    """sum over the target, nats"""
    greedy: bool
    """whether each token of the target is the likeliest after those before it"""


@dataclass(frozen=True)
class Continued:
    """The answer to a Continue."""

    text: str
    """without end mark and stop text"""
    tokens: int
    """generated, the end mark and those of the stop text included"""
    finish_reason: FinishReason


@dataclass(frozen=True)
class Predicted:
    """The answer to a Predict."""

    predictions: tuple[float, ...]
    """of each output: the probability of a class, that of a label, or a value in the units of labels"""


Answer = Scored | Continued | Predicted


class NonFinite(UserError):
    """A model's logits hold NaN or infinity, so that no answer made of them means anything."""

    def __init__(self, index: int, message: str) -> None:
        """index: of the request, among those given."""
        super().__init__(message)
        self.index = index


def digest(request: Request) -> str:
    """The same for requests that have the same answer from the same model and tokenizer, 32 hexadecimal digits."""
    said: dict[str, Any] = dict(vars(request))
    if isinstance(request, Continue):
        said["sampling"] = vars(request.sampling)
        del said["beams"]
        if not request.source:
            del said["source"]
        if request.beams.num_beams > 1:
            said["beams"] = vars(request.beams)
    if not isinstance(request, Predict):
        said["pictures"] = [picture.digest for picture in request.pictures]
    text = json.dumps([type(request).__name__, said], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def as_json(answer: Answer) -> dict[str, Any]:
    """For a journal: floats come back as they are."""
    return dict(vars(answer))


def from_json(found: Mapping[str, Any]) -> Answer:
    """What `as_json` wrote. TypeError where it is none of the answers."""
    if "predictions" in found:
        return Predicted(tuple(found["predictions"]))
    return Scored(**found) if "logprob" in found else Continued(**found)
