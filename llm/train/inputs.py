"""What a run needs before its model is built: opened data, the vocabulary's size, the arithmetic, prompts in tokens.

Every function is called by all ranks together, and what one of them meets, all raise.
"""

from functools import partial
from typing import Any

from llm.checkpoint.reader import newest_valid, resolve
from llm.checkpoint.store import CheckpointStore
from llm.data.contamination import contamination_notes
from llm.data.source import TokenSource
from llm.data.sources import check_data, open_data, prepare_data, sides
from llm.errors import UserError
from llm.generation.text import context_length
from llm.parallel.collectives import agreed_error, all_or_none, main_decides
from llm.parallel.launch.world import World
from llm.tokenizer import Tokenizer
from llm.train.config import RunConfig
from llm.train.precision import faster_precision

VERIFY_TOKENS = 1 << 28
"""A source up to this size is verified whole before the run begins (under a second); a larger one shard by shard as
it is first read.
"""


def open_sources(
    config: RunConfig, tokenizer: Tokenizer, world: World
) -> tuple[list[tuple[str, TokenSource, float]], list[TokenSource], list[str]]:
    """The training sources with their names and weights, the held-out sources, and lines that say what they are made
    of; raw text is sharded by rank 0."""
    cache, of_role = config.data.cache_dir, sides(config.data.train, config.data.valid)
    for side in of_role.values():  # both before the first is sharded, which may take long
        main_decides(partial(check_data, side, cache_dir=cache), world)
    opened: dict[str, list[tuple[str, TokenSource, float]]] = {"data.train": [], "data.valid": []}
    for role, side in of_role.items():
        main_decides(partial(prepare_data, side, tokenizer, cache), world)
        opened[role] = all_or_none(partial(open_data, side, tokenizer, cache), world)
        for _, source, _ in opened[role]:
            if source.n_tokens <= VERIFY_TOKENS:
                main_decides(partial(_verify, source), world)
    train, valid = ([source for _, source, _ in opened[role]] for role in ("data.train", "data.valid"))
    contamination = main_decides(partial(contamination_notes, train, valid), world)
    return opened["data.train"], valid, [note for source in train + valid for note in source.notes] + contamination


def _verify(source: TokenSource) -> None:
    TokenSource.open(source.path, verify=True)


def settle_precision(config: RunConfig, store: CheckpointStore, world: World) -> tuple[RunConfig, str]:
    """The config with `train.precision: auto` replaced, and the reason in words; a continued run keeps what it has."""
    if config.train.precision != "auto":
        return config, "set in the config"
    saved = _saved(config, store, world, "train", "precision")
    if saved is not None:
        precision, reason = str(saved), "as this run began"
    else:
        dim = config.model.dim
        precision, reason = main_decides(lambda: list(faster_precision(dim, world.device)), world)
    train = config.train.model_copy(update={"precision": precision})
    return config.model_copy(update={"train": train}), reason


def settle_warmup(config: RunConfig, store: CheckpointStore, world: World) -> RunConfig:
    """The config with the `optim.warmup_steps` of the run that it goes on with, where it names none itself."""
    if config.optim.warmup_steps is not None:
        return config
    saved = _saved(config, store, world, "optim", "warmup_steps")
    return config.model_copy(update={"optim": config.optim.model_copy(update={"warmup_steps": saved})})


def _saved(config: RunConfig, store: CheckpointStore, world: World, section: str, key: str) -> Any:
    """What the checkpoint that this run will go on with has settled a key to; None for a new run."""

    def read() -> Any:
        checkpoint, _ = newest_valid(store.folder)
        if checkpoint is None and config.checkpoint.resume not in ("auto", "never"):
            checkpoint = resolve(config.checkpoint.resume)
        return None if checkpoint is None else checkpoint.meta_with("config")["config"][section][key]

    return main_decides(read, world)


def with_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """The config with the tokenizer's vocabulary where `model.vocab_size` leaves it open (-1)."""
    args = config.model
    if args.vocab_size == -1:
        filled = type(args).model_validate({**args.model_dump(), "vocab_size": tokenizer.vocab_size})
        return config.model_copy(update={"model": filled})
    if args.vocab_size < tokenizer.vocab_size:
        raise agreed_error(
            f"model.vocab_size={args.vocab_size} is below the tokenizer's {tokenizer.vocab_size} tokens; use -1"
        )
    return config


def encode_prompts(config: RunConfig, tokenizer: Tokenizer, world: World) -> list[list[int]]:
    """`eval.prompts` as token ids, each begun as the tokenizer begins a text. UserError where the tokenizer cannot say
    one, or where samples are asked for and one leaves no room for a token behind it.
    """
    context = context_length(config.model)

    def encode() -> list[list[int]]:
        try:
            prompts = [tokenizer.prompt_ids(text) for text in config.eval.prompts]
        except UserError as error:
            raise UserError(f"eval.prompts: {error}") from None
        for i, ids in enumerate(prompts):
            if config.eval.sample_interval is not None and len(ids) >= context:
                raise UserError(
                    f"eval.prompts.{i} has {len(ids):,} tokens, and the context of {context:,} (model.max_seq_len) no "
                    f"room for one behind them; give a shorter prompt, or eval.sample_interval=null"
                )
        return prompts

    return all_or_none(encode, world)
