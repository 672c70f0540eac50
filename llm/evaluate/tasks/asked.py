"""What a model is asked of a document: description, examples and prompt as one text, or as a conversation."""

from collections.abc import Sequence
from dataclasses import dataclass

from llm.args import ModelArgs
from llm.data.conversation import Message
from llm.data.labels import Prediction
from llm.errors import UserError
from llm.evaluate.encode import Encoder, Pair
from llm.generation.chat import said_first
from llm.generation.pictures import Picture, Pictures
from llm.tokenizers.chat import ChatTemplate
from llm.tokenizers.chat.encode import Span

JOINT = " "
"""Between a prompt and what follows it; with a chat template nothing."""


@dataclass(frozen=True)
class Head:
    """What a model predicts of a text."""

    kind: Prediction
    names: tuple[str, ...] | None
    """of its outputs; None: the classes are not known yet"""
    n: int

    @classmethod
    def of(cls, args: ModelArgs, names_known: bool = True) -> "Head | None":
        """That of a model; None where it has none. names_known: outputs without names are called by their numbers."""
        if not args.n_prediction:
            return None
        numbers = tuple(map(str, range(args.n_prediction))) if names_known else None
        return cls(args.prediction, args.prediction_names or numbers, args.n_prediction)


@dataclass(frozen=True)
class Setting:
    """How documents are put to a model."""

    encoder: Encoder
    chat: ChatTemplate | None = None
    """prompts are what a user says, answers what the assistant does"""
    pictures: Pictures | None = None
    head: Head | None = None
    """None: the model has no prediction head"""


@dataclass(frozen=True)
class Example:
    """A prompt with its answer."""

    prompt: str
    answer: str


class Asked:
    """Prompts with what stands before them."""

    def __init__(self, setting: Setting, description: str, examples: Sequence[Example], delimiter: str) -> None:
        self._setting, self._description, self._delimiter = setting, description, delimiter
        self._examples = list(examples)
        self._rendered: dict[str, tuple[str, list[Span]]] = {}
        """conversations by their prompts, as each choice asks for its own again"""

    def text(self, prompt: str) -> str:
        """All that is read before the answer."""
        if self._setting.chat is not None:
            return self._conversation(self._setting.chat, prompt)[0]
        examples = [f"{example.prompt}{JOINT}{example.answer}{self._delimiter}" for example in self._examples]
        return "".join([self._description, *examples, prompt])

    def pair(self, prompt: str, answer: str) -> Pair:
        """The prompt's ids, and those of an answer to it. UserError as of the encoder."""
        encoder, chat = self._setting.encoder, self._setting.chat
        if chat is not None:
            return encoder.rendered(chat, *self._conversation(chat, prompt), answer)
        return encoder.pair(self.text(prompt), JOINT + answer)

    def prompt(self, prompt: str, max_new_tokens: int) -> tuple[tuple[int, ...], bool]:
        """The prompt's ids, and whether it was cut on the left. UserError where there is no room for an answer."""
        encoder, chat = self._setting.encoder, self._setting.chat
        if chat is not None:
            return encoder.conversation(chat, self._messages(prompt), max_new_tokens)
        return encoder.prompt(self.text(prompt), max_new_tokens)

    def begun(self, prompt: str, max_new_tokens: int) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
        """What a model's answer goes on from, what its encoder reads, which is () without one, and whether something
        was cut. UserError as of `prompt`, and where an encoder-decoder is to talk."""
        encoder = self._setting.encoder
        if not encoder.reads_sources:
            ids, cut = self.prompt(prompt, max_new_tokens)
            return ids, (), cut
        if self._setting.chat is not None:
            raise UserError("an encoder-decoder keeps no conversation; leave the chat template out")
        source, cut = encoder.source(self.text(prompt))
        return (encoder.tokenizer.bos_id,), source, cut

    def with_pictures(self, prompt: str, pictures: Sequence[Picture], max_new_tokens: int) -> tuple[int, ...]:
        """The prompt's ids with the slots of its images. UserError where images and text do not fit: nothing is cut."""
        encoder, chat, reader = self._setting.encoder, self._setting.chat, self._setting.pictures
        assert reader is not None
        if chat is not None:
            asked = said_first(prompt, [picture.name for picture in pictures]).messages
            ids = reader.filled(chat.prompt_ids([*self._system(), *asked]), pictures, encoder.tokenizer)
        else:
            ids = reader.prompt_ids(self.text(prompt), pictures, encoder.tokenizer)
        reader.check_slots(ids, pictures)
        if len(ids) + max_new_tokens > encoder.context_length:
            raise UserError(
                f"its {len(ids):,} tokens and {max_new_tokens} new ones do not fit into the model's context of "
                f"{encoder.context_length:,}, and a prompt with images is not cut"
            )
        return tuple(ids)

    def _conversation(self, chat: ChatTemplate, prompt: str) -> tuple[str, list[Span]]:
        if prompt not in self._rendered:
            self._rendered[prompt] = chat.prompt_text(self._messages(prompt))
        return self._rendered[prompt]

    def _system(self) -> list[Message]:
        return [{"role": "system", "content": self._description}] if self._description else []

    def _messages(self, prompt: str) -> list[Message]:
        said: list[Message] = self._system()
        for example in self._examples:
            said.append({"role": "user", "content": example.prompt})
            said.append({"role": "assistant", "content": example.answer})
        return [*said, {"role": "user", "content": prompt}]
