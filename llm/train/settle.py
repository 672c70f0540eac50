"""What of a config is known only from the registries, the tokenizer, the run folder, this machine or where the run
stands.

The functions that take a `world` are called by all ranks together, and what one of them meets, all raise.
"""

from typing import Any, get_args

from llm.args import ModelArgs
from llm.args.model import OF_VALUES, SETTLED, same_head
from llm.checkpoint.reader import newest_valid, resolve
from llm.checkpoint.store import CheckpointStore
from llm.data.labels import LabelOptions
from llm.data.values import ValueOptions, ValueTask
from llm.errors import UserError
from llm.objectives import Objectives, objectives_of
from llm.parallel.collectives import agreed_error, main_decides
from llm.parallel.launch.world import World
from llm.tasks import OpenedRows, RowsWanted, Task, task_named
from llm.tasks.mixture import Mixture, objectives_of_parts
from llm.tokenizer import Tokenizer
from llm.tokenizers.extended import ExtendedTokenizer
from llm.train.config import RunConfig, Section
from llm.train.config.length import default_warmup
from llm.train.precision import faster_precision
from llm.train.schedule import epoch_rows, steps_between
from vision.tokens import NAMES


def objectives_in(config: RunConfig) -> Objectives:
    """What a config trains for. UserError naming the key where its task, an objective or an option is not known."""
    try:
        of_parts = objectives_of_parts(task_in(config).parts, options_in(config))
        every = [objective for of_part in of_parts for objective in of_part]
        return objectives_of(every, config.train.objectives, [of_part[0] for of_part in of_parts])
    except ValueError as error:
        raise UserError(str(error)) from None


def task_in(config: RunConfig) -> Task:
    """What a config's model is trained to do. UserError naming the key where a task is not known, or cannot be one of
    several.
    """
    try:
        if isinstance(config.task, str):
            return task_named(config.task)
        return Mixture.of([(entry.task, entry.weight, entry.source) for entry in config.task])
    except ValueError as error:
        raise UserError(str(error)) from None


def options_in(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The sections that are called as a task that the config trains, by its name."""
    sections = {name: getattr(config, name, None) for name in config.task_names}
    return {name: section.model_dump() for name, section in sections.items() if isinstance(section, Section)}


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


def settle_outputs(config: RunConfig, store: CheckpointStore, world: World) -> RunConfig:
    """The config with what the run that it goes on with has learned of labels, where it does not say it itself."""
    model = config.model
    keys = [key for key in (*SETTLED, *OF_VALUES) if getattr(model, key) is None]
    if not learns_outputs(model) or not keys:
        return config
    saved = _saved(config, store, world, "model")
    if saved is None:
        return config
    update = {key: tuple(saved[key]) for key in keys if saved.get(key) is not None}
    return config.model_copy(update={"model": model.model_copy(update=update)})


def settle_model(config: RunConfig, task: Task, rows: OpenedRows, goes_on: bool) -> RunConfig:
    """The config with what only its rows say of the model. goes_on: from a checkpoint. UserError where rows and model
    do not go together.
    """
    source = config.model.init_from
    began_from = None
    if source is not None and not goes_on and learns_outputs(config.model):
        from llm.pretrained import args_of  # of no use to others

        began_from = args_of(source, notify=None)
    model = task.settle(config.model, rows, began_from)
    if began_from is not None and same_head(model, began_from):  # what no task here learns is kept
        there = {key: getattr(began_from, key) for key in SETTLED if getattr(model, key) is None}
        model = model.model_copy(update=there)
    return config.model_copy(update={"model": model})


def learns_outputs(model: ModelArgs) -> bool:
    """Whether the rows say something of the model: what its outputs stand for, or how values are scaled."""
    return model.n_prediction > 0 or model.input_dim is not None or model.output_dim is not None


def values_wanted(config: RunConfig) -> ValueOptions | None:
    """How a config's model reads values."""
    task = next((name for name in config.task_names if name in get_args(ValueTask)), None)
    if task is None or config.model.input_dim is None:
        return None
    return ValueOptions(task, config.model.input_dim, config.autoregressive.stride)  # type: ignore[arg-type]


def labels_wanted(config: RunConfig) -> LabelOptions | None:
    """What a config's model predicts of whole samples."""
    model, options = config.model, config.prediction
    if model.output_dim is not None:
        of_values = config.regression.max_length, model.causal, "model.output_dim"
        return LabelOptions("regression", model.output_dim, *of_values)
    if not model.n_prediction:
        return None
    return LabelOptions(model.prediction, model.n_prediction, options.max_length, model.prediction_causal)


def _saved(config: RunConfig, store: CheckpointStore, world: World, section: str, key: str | None = None) -> Any:
    """What the checkpoint that this run will go on with has settled a key, or a section, to; None for a new run."""

    def read() -> Any:
        checkpoint, _ = newest_valid(store.folder)
        if checkpoint is None and config.checkpoint.resume not in ("auto", "never"):
            checkpoint = resolve(config.checkpoint.resume)
        if checkpoint is None:
            return None
        found = checkpoint.meta_with("config")["config"][section]
        return found if key is None else found[key]

    return main_decides(read, world)


def with_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """The config with the tokenizer's vocabulary where `model.vocab_size` leaves it open (-1), or where chat.add_tokens
    has added tokens for which the model has no rows. Rows of added tokens train whole beside adapters. Where
    `model.vision.patch_token_id` leaves the token of a slot open, it is the tokenizer's.
    """
    config = _with_slot(config, tokenizer)
    args = config.model
    if tokenizer.kind == "none":
        return config
    new = _added_tokens(config, tokenizer)
    if new is not None:
        size, lora = max(args.vocab_size, tokenizer.vocab_size), config.lora
        if lora is not None and lora.token_rows is None:
            lora = lora.model_copy(update={"token_rows": new})
        model = args.model_copy(update={"vocab_size": size, "lora": None if lora is None else lora.args})
        return config.model_copy(update={"model": model, "lora": lora})
    if args.vocab_size == -1:
        filled = type(args).model_validate({**args.model_dump(), "vocab_size": tokenizer.vocab_size})
        return config.model_copy(update={"model": filled})
    if args.vocab_size < tokenizer.vocab_size:
        raise agreed_error(
            f"model.vocab_size={args.vocab_size} is below the tokenizer's {tokenizer.vocab_size} tokens; use -1"
        )
    return config


def _added_tokens(config: RunConfig, tokenizer: Tokenizer) -> tuple[int, int] | None:
    """The first of the tokens that chat.add_tokens has added to the config's tokenizer, and the first beyond them; None
    where it has added none."""
    if not isinstance(tokenizer, ExtendedTokenizer) or tokenizer.names == config.tokenizer.added_tokens:
        return None
    return tokenizer.inner.vocab_size + len(config.tokenizer.added_tokens), tokenizer.vocab_size


def _with_slot(config: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    vision = config.model.vision
    if vision is None:
        return config
    slot = tokenizer.control_tokens.get(NAMES["patch"])
    if vision.patch_token_id not in (-1, slot) and slot is not None:
        raise agreed_error(
            f"model.vision.patch_token_id={vision.patch_token_id}: the tokenizer's {NAMES['patch']} is {slot}; use -1"
        )
    if vision.patch_token_id != -1 or slot is None:
        return config
    filled = config.model.model_copy(update={"vision": vision.model_copy(update={"patch_token_id": slot})})
    return config.model_copy(update={"model": filled})


def settle_rows(config: RunConfig) -> tuple[RunConfig, str]:
    """The config without the older `eval.batches`, which has set eval.rows; and what decides the rows, in words."""
    rows, batches = config.eval.rows, config.eval.batches
    if batches is None:
        return config, f"eval.rows={'null' if rows is None else rows}"
    size = config.train.global_batch_size
    why = f"eval.batches={batches} is {batches} x train.global_batch_size={size} rows on any layout: eval.rows={rows}"
    return config.model_copy(update={"eval": config.eval.model_copy(update={"batches": None})}), why


def settle_length(
    config: RunConfig, epochs: float | None, n_rows: int, step: int, consumed: int, earlier: int
) -> RunConfig:
    """The config with a number of steps, and the warm-up that fits them, where it names none itself.

    epochs: `train.epochs` as it was given, passes over `n_rows` rows. How many steps they are depends on where the run
    stands, as the batch size may have been another one before: after `step`, `consumed` rows of the present data and
    `earlier` ones of other data.
    """
    train, optim = config.train, config.optim
    if epochs is not None:
        end = epoch_rows(epochs, n_rows)
        steps = step + steps_between(train, earlier + consumed, earlier + end)
        train = train.model_copy(update={"steps": steps, "epochs": None})
    if optim.warmup_steps is None:
        assert train.steps is not None
        warmup = default_warmup(train.steps, optim.decay_steps, optim.schedule)
        optim = optim.model_copy(update={"warmup_steps": warmup})
    evaluation = config.eval
    if evaluation.interval_epochs is not None:
        interval = steps_between(train, 0, epoch_rows(evaluation.interval_epochs, n_rows))
        evaluation = evaluation.model_copy(update={"interval": max(interval, 1)})
    return config.model_copy(update={"train": train, "optim": optim, "eval": evaluation})


def rows_wanted(config: RunConfig) -> RowsWanted:
    """The rows that a config reads."""
    return RowsWanted(
        train=config.data.train,
        valid=config.data.valid,
        cache_dir=config.data.cache_dir,
        seq_len=config.train.seq_len,
        seed=config.train.seed,
        held_out_rows=config.eval.rows,
        packing=config.data.packing,
        chat=config.chat,
        tokenizer_path=config.tokenizer.path,
        vision=config.model.vision,
        images=config.data.images,
        labels=labels_wanted(config),
        values=values_wanted(config),
        source_len=config.source_len,
        pair_max_length=config.pair.max_length,
        options=options_in(config),
    )
