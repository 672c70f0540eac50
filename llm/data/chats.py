"""The kinds `chat`, `completion` and `preference`: raw rows as conversations, written by a template, or as plain texts.

A plain prompt and completion are the text of both as the tokenizer writes it in one piece, between its begin mark and
its end mark. Trained are the end mark and the tokens that the prompt alone does not have: where the last piece of the
prompt and the first of the completion are one token, that token too.
"""

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.conversation import (
    Completion,
    Conversation,
    Preference,
    Trained,
    read_completion,
    read_conversation,
    read_preference,
)
from llm.data.images import ImageReader, digests, filled
from llm.data.kinds import Asked, register
from llm.data.sample import Sample
from llm.data.sample_kind import Content, SampleKind, first_row
from llm.data.sources import SourceFiles
from llm.errors import UserError
from llm.tokenizer import Tokenizer
from llm.tokenizers.chat import ChatTemplate, open_template
from llm.tokenizers.chat.encode import ChatEncoder as ControlEncoder
from llm.tokenizers.chat.template import completion_sample


class Chats(SampleKind):
    """What the three have in common. has_images: whether a row may have any."""

    has_images = False

    def encoder(self, files: SourceFiles, asked: Asked) -> "ChatEncoder":
        """A template is opened where the first row is no plain text; all rows are of one form."""
        first = first_row(files)
        plain = first is not None and self.is_plain(first, files.spec.single_columns)
        return ChatEncoder(self, files, asked, None if plain else template_of(asked))

    @abstractmethod
    def parts(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[Trained, ...]:
        """What is trained of a row, one part for each sample of an item. UserError saying what is wrong with it."""

    def is_plain(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> bool:
        """Whether a row is of texts that no template writes."""
        return isinstance(row.get(columns.get("prompt", "prompt")), str)


class Chat(Chats):
    name = "chat"
    has_images = True

    def parts(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[Trained, ...]:
        return (read_conversation(row, columns),)

    def is_plain(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> bool:
        return False


class Completions(Chats):
    name = "completion"
    columns = ("prompt", "completion", "tools")

    def parts(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[Trained, ...]:
        return (read_completion(row, columns),)


class Preferences(Chats):
    name = "preference"
    target = "dpo"
    samples_per_item = 2
    columns = ("prompt", "chosen", "rejected", "tools")

    def encoder(self, files: SourceFiles, asked: Asked) -> "ChatEncoder":
        for key, given in (("train_on", "all"), ("max_length", "cut")):
            if getattr(asked.chat, key) == given:
                raise UserError(f"chat.{key}={given}: {files.given} is of kind preference, whose answers are compared, "
                                f"whole and without their prompt")  # fmt: skip
        return super().encoder(files, asked)

    def parts(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[Trained, ...]:
        found: Preference = read_preference(row, columns)
        for part in (found.chosen, found.rejected):
            if isinstance(part, Conversation) and any(weight not in (None, 0, 1) for weight in part.weights):
                raise UserError("a turn of an answer that is compared has a loss_weight other than 0 and 1")
        return found.chosen, found.rejected


def template_of(asked: Asked) -> ChatTemplate:
    """The template that a run's conversations are written by."""
    folder = None if asked.tokenizer_path is None else Path(asked.tokenizer_path)
    return open_template(asked.chat.template, asked.tokenizer, folder, asked.chat.add_tokens)


class ChatEncoder:
    """Reads rows by a kind; template: None where they are plain texts."""

    def __init__(
        self,
        kind: Chats,
        files: SourceFiles,
        asked: Asked,
        template: ChatTemplate | None,
        images: ImageReader | None = None,
    ) -> None:
        self.kind, self.files, self.asked, self.template, self.images = kind, files, asked, template, images
        if images is None and asked.vision is not None and kind.has_images:
            self.images = ImageReader(asked.vision, asked.tokenizer, asked.images)
        made_with = [asked.chat.train_on, None if template is None else template.fingerprint]
        self.fingerprint: object = made_with if self.images is None else [*made_with, self.images.fingerprint]

    def beside(self, folder: Path) -> "ChatEncoder":
        """The same for rows of a file in this folder."""
        if self.images is None:
            return self
        return ChatEncoder(self.kind, self.files, self.asked, self.template, self.images.beside(folder))

    def read(self, row: Mapping[str, Any]) -> Content:
        parts = self.kind.parts(row, self.files.spec.single_columns)
        sources = [source for part in parts if isinstance(part, Conversation) for source in part.images]
        if sources and self.images is None:
            raise UserError("has images, which a model without vision cannot read (model.vision)")
        contents = [] if self.images is None else self.images.contents(sources)
        known_by = json.dumps([_known(part, contents) for part in parts], sort_keys=True)

        def samples() -> tuple[Sample, ...]:
            found = tuple(self._sample(part) for part in parts)
            if self.images is None:
                return found
            (sample,) = found  # of one conversation, as only the kind chat has images
            return (filled(sample, self.images.cut(contents, sources), self.images.marks.image),)

        return Content(known_by.encode(), samples)

    def _sample(self, part: Trained) -> Sample:
        train_on = self.asked.chat.train_on
        if isinstance(part, Completion):
            return plain_sample(self.asked.tokenizer, part, whole=train_on == "all")
        if self.template is None:
            raise UserError("has messages, where the first row of its source has a prompt that is plain text")
        return self.template.sample(part, train_on)


def _known(part: Trained, contents: Sequence[bytes]) -> dict[str, Any]:
    """What a part says, its images by their digests."""
    fields = asdict(part)
    if fields.pop("images", ()):
        fields["images"] = digests(contents)
    return fields


def plain_sample(tokenizer: Tokenizer, part: Completion, whole: bool) -> Sample:
    """The sample of plain texts; whole: the prompt is trained too."""
    sample = completion_sample(part, ControlEncoder(tokenizer))
    if not whole:
        return sample
    untrained = len(tokenizer.begin_ids)
    return replace(sample, weights=(np.arange(len(sample.tokens)) >= max(1, untrained)).astype(np.float32))


for kind in (Chat(), Completions(), Preferences()):
    register(kind)
