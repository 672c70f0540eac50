"""What the samples of a run begin with: `eval.prompts` in tokens, and the tiles of their images."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llm.errors import UserError
from llm.generation.chat import said_first
from llm.generation.pictures import Pictures
from llm.generation.text import context_length
from llm.parallel.collectives import all_or_none
from llm.parallel.launch.world import World
from llm.tokenizer import Tokenizer
from llm.tokenizers.chat import ChatTemplate
from llm.train.config import RunConfig


@dataclass(frozen=True)
class SamplePrompts:
    """The prompts of a run's samples."""

    ids: list[list[int]]
    images: list[Tensor | None]
    """uint8 tiles (n, 3, S, S) of each, in the order of their slots; None where it has none"""


def encode_prompts(
    config: RunConfig, tokenizer: Tokenizer, world: World, template: ChatTemplate | None = None
) -> SamplePrompts:
    """`eval.prompts` as token ids, each begun as the tokenizer begins a text, or with a template the user's turn of a
    conversation, of an encoder-decoder what the encoder reads; with `eval.images`. UserError where the tokenizer cannot
    say one, an image cannot be read, or samples are asked for and one leaves no room for a token behind it.
    """
    return all_or_none(lambda: _encoded(config, tokenizer, template), world)


def _encoded(config: RunConfig, tokenizer: Tokenizer, template: ChatTemplate | None) -> SamplePrompts:
    given = config.eval
    if tokenizer.kind == "none":  # what a config says of samples then has no effect, which its notes say
        return SamplePrompts([], [])
    pictures = Pictures(config.model.vision, "the model", config.data.images.limits)
    prompts: list[list[int]] = []
    images: list[Tensor | None] = []
    for i, text in enumerate(given.prompts):
        shown = [pictures.look(Path(path), f"eval.images.{i}: {path}") for path in given.images_of(i)]
        try:
            if config.model.encoder_layers:
                ids = tokenizer.source_ids(text)
            elif template is None:
                ids = pictures.prompt_ids(text, shown, tokenizer)
            else:
                said = said_first(text, [picture.name for picture in shown])
                ids = pictures.filled(template.prompt_ids(said.messages), shown, tokenizer)
        except UserError as error:
            raise UserError(f"eval.prompts: {error}") from None
        prompts.append(ids)
        images.append(pictures.tiles(shown))
    _check_room(config, prompts)
    return SamplePrompts(prompts, images)


def _check_room(config: RunConfig, prompts: list[list[int]]) -> None:
    context = context_length(config.model)
    for i, ids in enumerate(prompts):
        if config.eval.sample_interval is not None and len(ids) >= context:
            raise UserError(
                f"eval.prompts.{i} has {len(ids):,} tokens, and the context of {context:,} (model.max_seq_len) no "
                f"room for one behind them; give a shorter prompt, or eval.sample_interval=null"
            )
