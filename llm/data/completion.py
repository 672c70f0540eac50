"""The kind `completion`: a prompt and what follows it, both plain text, of which what follows is trained.

A sample is the text of both as the tokenizer writes it in one piece, between its begin mark and its end mark. Trained
are the end mark and the tokens that the prompt alone does not have: where the last piece of the prompt and the first of
the completion are one token, that token too.
"""

from collections.abc import Mapping
from os.path import commonprefix
from typing import Any

import numpy as np

from llm.data.json_rows import called
from llm.data.kinds import Asked, register
from llm.data.sample import Sample
from llm.data.sample_kind import Content, SampleKind
from llm.data.sources import SourceFiles
from llm.data.tables import columns_of
from llm.errors import UserError
from llm.tokenizer import Tokenizer


class Completion(SampleKind):
    name = "completion"
    columns = ("prompt", "completion")

    def encoder(self, files: SourceFiles, asked: Asked) -> "CompletionEncoder":
        return CompletionEncoder(asked.tokenizer, files.spec.columns, whole=asked.chat.train_on == "all")


class CompletionEncoder:
    """Reads rows {prompt, completion}; whole: the prompt is trained too."""

    def __init__(self, tokenizer: Tokenizer, columns: Mapping[str, str], whole: bool) -> None:
        self.tokenizer, self.whole = tokenizer, whole
        self.names = [columns.get(name, name) for name in Completion.columns]
        self.fingerprint: object = ["completion", whole]

    def read(self, row: Mapping[str, Any]) -> Content:
        prompt, completion = (text_in(row, name) for name in self.names)
        return Content(f"{prompt}\0{completion}".encode(), lambda: (self._sample(prompt, completion),))

    def _sample(self, prompt: str, completion: str) -> Sample:
        begin = list(self.tokenizer.begin_ids)
        both = self.tokenizer.encode(prompt + completion)
        untrained = len(begin)
        if not self.whole:
            untrained += len(commonprefix([self.tokenizer.encode(prompt), both]))
        tokens = np.array([*begin, *both, self.tokenizer.eos_id], dtype=np.int64)
        weights = (np.arange(len(tokens)) >= untrained).astype(np.float32)
        return Sample(tokens, weights, np.array([len(tokens)], dtype=np.int64))


def text_in(row: Mapping[str, Any], name: str) -> str:
    """The text in a column of a row. UserError where there is none, or what no encoding has."""
    if name not in row:
        raise UserError(f"no column {name!r}; it has {columns_of(row)}")
    text = row[name]
    if not isinstance(text, str):
        raise UserError(f"its column {name!r} is {called(text)}, not a text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"its column {name!r} has a lone surrogate, which is no character") from None
    return text


register(Completion())
