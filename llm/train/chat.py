"""The tokenizer of a run, and the template by which it writes conversations."""

from pathlib import Path

from llm.data.sources import source_specs
from llm.tokenizer import Tokenizer, load_tokenizer
from llm.tokenizers.chat import ChatTemplate, open_template
from llm.tokenizers.chat.find import template_in
from llm.train.config import RunConfig

WITH_TEMPLATE = ("completion", "preference")
"""Kinds of data whose rows may be conversations, or plain texts without a template."""


def run_tokenizer(config: RunConfig) -> tuple[Tokenizer, ChatTemplate | None]:
    """The tokenizer of a config, with the control tokens of the run's template that it lacked if chat.add_tokens; and
    the template, None where the run has no conversations. UserError naming the file or the template.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    sources = [config.data.train, *([] if isinstance(config.data.valid, float | None) else [config.data.valid])]
    kinds = {spec.kind for given in sources for spec in source_specs(given)}
    chat, folder = config.chat, config.tokenizer.path
    chosen = chat.template != "auto" or (folder is not None and template_in(Path(folder)) is not None)
    if "chat" not in kinds and not (chosen and kinds.intersection(WITH_TEMPLATE)):
        return tokenizer, None
    template = open_template(chat.template, tokenizer, folder, chat.add_tokens)
    return template.tokenizer, template
