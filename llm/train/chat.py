"""The tokenizer of a run, and the template by which it writes conversations."""

from pathlib import Path

from llm.data.sources import source_specs
from llm.errors import UserError
from llm.tasks.mlm import MASK_TOKENS, mask_name
from llm.tokenizer import Tokenizer, load_tokenizer
from llm.tokenizers.chat import ChatTemplate, open_template
from llm.tokenizers.chat.find import template_in
from llm.tokenizers.extended import with_tokens
from llm.train.config import RunConfig
from vision.tokens import NAMES

WITH_TEMPLATE = ("completion", "preference")
"""Kinds of data whose rows may be conversations, or plain texts without a template."""


def run_tokenizer(config: RunConfig) -> tuple[Tokenizer, ChatTemplate | None]:
    """The tokenizer of a config, with the control tokens that it lacked if chat.add_tokens: those of images for a model
    with vision, the mask token of task mlm, and those of the run's template; and the template, None where the run has
    no conversations. UserError naming the file, the template or what the tokenizer lacks.
    """
    tokenizer = _with_mask_token(config, _with_image_tokens(config, load_tokenizer(config.tokenizer)))
    sources = [config.data.train, *([] if isinstance(config.data.valid, float | None) else [config.data.valid])]
    kinds = {spec.kind for given in sources for spec in source_specs(given)}
    chat, folder = config.chat, config.tokenizer.path
    chosen = chat.template != "auto" or (folder is not None and template_in(Path(folder)) is not None)
    if "chat" not in kinds and not (chosen and kinds.intersection(WITH_TEMPLATE)):
        return tokenizer, None
    template = open_template(chat.template, tokenizer, folder, chat.add_tokens)
    return template.tokenizer, template


def _with_image_tokens(config: RunConfig, tokenizer: Tokenizer) -> Tokenizer:
    """Rows of text alone need none of them where the model says which token is a slot."""
    if config.model.vision is None:
        return tokenizer
    missing = [name for name in NAMES.values() if name not in tokenizer.control_tokens]
    if missing and not config.chat.add_tokens and config.model.vision.patch_token_id == -1:
        raise UserError(
            f"model.vision: the tokenizer has no {', '.join(missing)}, which stand for images in a text; "
            f"chat.add_tokens=true adds them to it"
        )
    return with_tokens(tokenizer, missing) if config.chat.add_tokens else tokenizer


def _with_mask_token(config: RunConfig, tokenizer: Tokenizer) -> Tokenizer:
    """What a run that hides tokens without a mask token must be given, its rows say (llm/tasks/mlm.py)."""
    asked = config.mlm.mask_token
    if "mlm" not in config.task_names or not config.chat.add_tokens or isinstance(asked, int):
        return tokenizer
    return tokenizer if mask_name(tokenizer, asked) else with_tokens(tokenizer, [asked or MASK_TOKENS[0]])
