"""`TrainConfig`: what Miniformer says of a training, and the run config of the one trainer that says the same."""

from dataclasses import dataclass, field
from typing import Any, Literal

from llm.args.layers import either
from llm.siblings.miniformer_config import EncoderDecoderConfig, TransformerConfig
from llm.tokenizer import TokenizerConfig
from llm.train.config import RunConfig
from llm.train.config.load import validate
from llm.train.config.overrides import put

TaskName = Literal["language_modeling", "classification", "regression", "seq2seq"]
ModelName = Literal["encoder", "seq2seq"]
Scheduler = Literal["cosine", "linear", "onecycle", "constant", "wsd"]
Logger = Literal["tensorboard", "wandb", "csv", "none"]
SCHEDULES: dict[str, str] = {"onecycle": "one_cycle"}
"""Names of schedules that are others here; the rest are the same."""
MOST_AT_ONCE = 16
"""Rows of a forward; more of a batch go one after the other."""
CHOICES = {
    "task": ("language_modeling", "classification", "regression", "seq2seq"),
    "model": ("encoder", "seq2seq"),
    "scheduler": ("cosine", "linear", "onecycle", "constant", "wsd"),
    "logger": ("tensorboard", "wandb", "csv", "none"),
}


@dataclass
class TrainConfig:
    """What a training is. ValueError in one line, naming the key, where there is no such training."""

    train_path: str
    """JSON Lines to train on."""
    val_path: str | None = None
    """Held-out rows of the same form; None = no validation."""
    batch_size: int = 32
    """Rows of a step, over all processes: records, or of language modelling rows of seq_len tokens."""
    lr: float = 3e-4
    """Highest learning rate."""
    max_epochs: int = 10
    """Passes over the training rows."""
    scheduler: Scheduler = "cosine"
    """How the learning rate changes: cosine and linear fall after a warm-up, onecycle rises for 30 % of the steps."""
    work_dir: str = "runs/miniformer"
    """The run folder: checkpoints, logs, the tokenizer that was trained."""
    logger: Logger = "tensorboard"
    """Where curves are drawn beside metrics.jsonl."""
    task: TaskName = field(default="language_modeling", kw_only=True)
    """What is learned."""
    model: ModelName = field(default="encoder", kw_only=True)
    """One stack of layers, or an encoder and a decoder; language modelling with the latter reads the first half of each
    text in a row and writes the second."""
    seq_len: int | None = field(default=None, kw_only=True)
    """Tokens of a row; None = max_seq_len of the model for language modelling, else what the longest record needs."""
    warmup_steps: int | None = field(default=None, kw_only=True)
    """Steps in which the learning rate rises; None = a tenth of the run's, at most 100; with onecycle 30 %."""
    weight_decay: float = field(default=0.01, kw_only=True)
    """AdamW's, of matrices alone."""
    clip_norm: float = field(default=1.0, kw_only=True)
    """Largest gradient norm; 0 = no clipping."""
    patience: int | None = field(default=3, kw_only=True)
    """Validations in a row, one a pass, without a new best, after which training stops; None = never."""
    seed: int = field(default=0, kw_only=True)
    """Of initial values, dropout and the order of rows."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = field(default="auto", kw_only=True)
    """auto takes the faster of fp32 and bf16."""
    text_column: str = field(default="text", kw_only=True)
    label_column: str = field(default="label", kw_only=True)
    source_column: str = field(default="source", kw_only=True)
    target_column: str = field(default="target", kw_only=True)
    """Columns of the records."""

    def __post_init__(self) -> None:
        for key, known in CHOICES.items():
            if getattr(self, key) not in known:
                raise ValueError(f"{key}={getattr(self, key)!r} is not known; use {either(known)}")
        for key in ("batch_size", "max_epochs", "seq_len", "patience"):
            value = getattr(self, key)
            least_is_one = not isinstance(value, bool) and isinstance(value, int) and value >= 1
            if not least_is_one and not (value is None and key in ("seq_len", "patience")):
                raise ValueError(f"{key}={value!r}: expected a whole number of at least 1")
        if self.task == "seq2seq" and self.model != "seq2seq":
            raise ValueError("task=seq2seq writes a target from a source, which model=encoder has no place for; "
                             "give model=seq2seq")  # fmt: skip
        if self.task in ("classification", "regression") and self.model != "encoder":
            raise ValueError(f"task={self.task} predicts labels of whole rows; give model=encoder")

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Columns of the records that hold text."""
        return (self.source_column, self.target_column) if self.task == "seq2seq" else (self.text_column,)

    @property
    def packed(self) -> bool:
        """Whether rows are cut from one stream of text."""
        return self.task == "language_modeling"


def run_config(
    train: TrainConfig,
    model: TransformerConfig,
    tokenizer: TokenizerConfig,
    overrides: dict[str, Any] | None = None,
    *,
    ranks: int = 1,
) -> RunConfig:
    """The run of the one trainer that a training is, with further keys of it, as {"parallel.tensor": 2}, on so many
    processes. UserError naming the key where there is no such run."""
    raw = raw_config(train, model, tokenizer, ranks)
    for key, value in (overrides or {}).items():
        put(raw, key, value, RunConfig)
    return validate(raw, "miniformer")


def raw_config(train: TrainConfig, model: TransformerConfig, tokenizer: TokenizerConfig, ranks: int) -> dict[str, Any]:
    """The same as it would stand in a YAML file."""
    seq_len = model.max_seq_len if train.seq_len is None else train.seq_len
    args = (EncoderDecoderConfig.like(model) if train.model == "seq2seq" else model).args()
    raw: dict[str, Any] = {
        "model": args.model_dump(mode="json", exclude_unset=True),
        "tokenizer": tokenizer.model_dump(mode="json", exclude_unset=True),
        "task": _task(train),
        "data": {"train": [_source(train, train.train_path)]},
        "optim": {
            "lr": train.lr,
            "min_lr": 0.0,
            "schedule": SCHEDULES.get(train.scheduler, train.scheduler),
            "warmup_steps": train.warmup_steps,
            "betas": [0.9, 0.999],
            "weight_decay": train.weight_decay,
            "clip_norm": train.clip_norm,
        },
        "train": {
            "epochs": train.max_epochs,
            "global_batch_size": train.batch_size,
            "micro_batch_size": _at_once(train.batch_size, ranks),
            "seq_len": seq_len,
            "precision": train.precision,
            "seed": train.seed,
        },
        "log": {
            "tensorboard": train.logger == "tensorboard",
            "wandb": train.logger == "wandb",
            "csv": train.logger == "csv",
        },
    }
    if not train.packed:
        raw["data"]["packing"] = "none"
    if train.val_path is not None:
        raw["data"]["valid"] = [_source(train, train.val_path)]
        raw["eval"] = {"interval_epochs": 1, "rows": None, "patience": train.patience}
    if train.task == "seq2seq":
        raw["pair"] = {"max_length": "cut"}
    if model.of_rows:
        raw["prediction"] = {"max_length": "cut", "causal": model.is_causal}
    return raw


def _task(train: TrainConfig) -> str:
    if train.model == "seq2seq":
        return "seq2seq"
    return "lm" if train.task == "language_modeling" else "prediction"


def _source(train: TrainConfig, path: str) -> dict[str, Any]:
    if train.task == "language_modeling":
        return {"path": path, "kind": "text", "text_field": train.text_column}
    if train.task == "seq2seq":
        return {"path": path, "kind": "pair", "columns": {"source": train.source_column, "target": train.target_column}}
    return {"path": path, "kind": "labelled", "columns": {"text": train.text_column, "label": train.label_column}}


def _at_once(batch_size: int, ranks: int) -> int:
    """Rows of a forward: as many as divide the batch of a process, at most MOST_AT_ONCE."""
    of_each = max(batch_size // ranks, 1)
    return max(n for n in range(1, min(of_each, MOST_AT_ONCE) + 1) if of_each % n == 0)
