"""A conversation with a model: what was said so far as a prompt, and the answer as it is made."""

from collections.abc import Sequence
from typing import Any

from llm.data.conversation import Conversation, Message, read_conversation
from llm.errors import UserError
from llm.generation.beams import Beams
from llm.generation.pictures import Picture, placed
from llm.generation.prompts import PromptRow
from llm.generation.sampling import Sampling
from llm.generation.terminal import show_prompt
from llm.generation.text import NO_BEAMS, Continuer
from llm.tokenizers.chat import ChatTemplate

HINT = "a message a line; ctrl-C ends an answer, ctrl-D the conversation"


class Chat:
    """How conversations become prompts. system: what the system says where a conversation has no such message."""

    def __init__(self, template: ChatTemplate, system: str | None) -> None:
        self.template, self.system = template, system

    def ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """The prompt for the assistant's next turn. UserError saying why there is none."""
        return self.template.prompt_ids([*self._system(messages), *messages], tools)

    def _system(self, messages: Sequence[Message]) -> list[Message]:
        if self.system is None or (messages and messages[0]["role"] == "system"):
            return []
        return [{"role": "system", "content": self.system}]

    def row(self, row: PromptRow) -> Conversation:
        """What is said in a row of a file: its messages, or its prompt as what the user says."""
        return read_conversation(row.columns) if row.column == "messages" else said_first(row.text, row.images)

    def made_of(self) -> dict[str, str]:
        """What decides the prompts, by the name that a message gives it."""
        return {"the chat template": self.template.fingerprint, "--system": str(self.system)}


def said_first(text: str, images: Sequence[str] = ()) -> Conversation:
    """A conversation that a user begins, with images where the text says `<image>`, or before it. UserError on more or
    fewer of these than images."""
    content = placed(text, len(images)) if images else text
    return read_conversation({"messages": [{"role": "user", "content": content}], "images": list(images) or None})


class Talk:
    """One conversation, which remembers what was said. pictures: the images that go with what is said first."""

    def __init__(
        self,
        continuer: Continuer,
        chat: Chat,
        sampling: Sampling,
        max_new_tokens: int,
        pictures: Sequence[Picture] = (),
        beams: Beams = NO_BEAMS,
    ) -> None:
        self.continuer, self.chat, self.pictures = continuer, chat, tuple(pictures)
        self.sampling, self.max_new_tokens, self.beams = sampling, max_new_tokens, beams
        self.messages: list[Message] = []

    def say(self, text: str, name: str = "the message", place: int = 0) -> None:
        """Write the answer to what the user says; an answer that is broken off counts as far as it went. UserError
        where there can be none, as when the context is full; then nothing was said."""
        try:
            if self.messages:
                asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
            else:
                asked = list(said_first(text, [picture.name for picture in self.pictures]).messages)
            ids = self.continuer.pictures.filled(self.chat.ids(asked), self.pictures, self.continuer.tokenizer)
            prompt = self.continuer.prompt_of(ids, "the conversation", str(place), self.pictures)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        parts: list[str] = []
        try:
            show_prompt(
                self.continuer, prompt, self.sampling, self.max_new_tokens, heard=parts.append, beams=self.beams
            )
        finally:
            self.messages = [*asked, {"role": "assistant", "content": "".join(parts)}]
