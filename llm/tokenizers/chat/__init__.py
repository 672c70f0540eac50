"""Chat templates: conversations as tokens. `open_template` finds one, a `ChatTemplate` applies it."""

from llm.tokenizers.chat.find import open_template
from llm.tokenizers.chat.template import ChatTemplate

__all__ = ["ChatTemplate", "open_template"]
