"""The run config: one YAML file, one schema, overrides from the command line.

Everything is checked here, before a process group exists: unknown keys, wrong types, impossible combinations. A
message names the key (`train.steps`) and says what is possible instead. The line under each field is what `--help`
prints.
"""

import importlib.util
import sys
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from llm.args import ModelArgs
from llm.data.mixture import mixture_problem
from llm.data.sources import SourceSpec, source_specs
from llm.errors import UserError
from llm.parallel.layout import Layout, PipelineSchedule
from llm.parallel.validate import WHOLE_PARAMETERS_ONLY, Choice, Needs, check
from llm.paths import PathText
from llm.plans import Kind
from llm.tokenizer import TokenizerConfig
from llm.train.data_keys import as_sources
from llm.train.deepspeed_options import checked_options
from llm.train.explain import by_commas, explain, keys_of, prepared
from llm.train.length import misfit, untraced
from llm.train.names import meant
from llm.train.overrides import put
from llm.train.yaml_file import read_yaml

Count = Annotated[int, Field(ge=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
BY_COMMAS = BeforeValidator(by_commas)
ONE_TEXT = BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)


class Section(BaseModel):
    """A part of the config: frozen, no unknown keys, field documentation from the line under the field."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class ModelSection(ModelArgs):
    init_from: PathText | None = None
    """Begin with the weights of this run, checkpoint, model folder or foreign folder; keys left out here are its own.
    """


class DataConfig(Section):
    train: Annotated[PathText, Field(min_length=1)] | Annotated[list[SourceSpec], Field(min_length=1)]
    """Training text: a path, or a list of paths and {path, weight, name, text_field, separator}; raw text is sharded
    into the cache first."""
    valid: (
        Annotated[PathText, Field(min_length=1)]
        | Annotated[list[SourceSpec], Field(min_length=1)]
        | Annotated[float, Field(gt=0, lt=1)]
        | None
    ) = None
    """Held-out text, in the same form (weights do not matter), or a share of the training documents, as 0.05, chosen by
    their hash and not trained on; no validation without it."""
    cache_dir: PathText = "runs/cache"
    """Where raw text is kept as token shards after its first use."""

    @field_validator("train", "valid", mode="before")
    @classmethod
    def _listed(cls, value: Any, info: ValidationInfo) -> Any:
        return as_sources(value, f"data.{info.field_name}")

    @model_validator(mode="after")
    def _can_be_mixed(self) -> "DataConfig":
        specs = source_specs(self.train)
        problem = mixture_problem([spec.resolved_name() for spec in specs], [spec.weight for spec in specs])
        if problem is not None:
            raise ValueError(problem)
        return self


class ParallelConfig(Section):
    tensor: int = Field(1, ge=1)
    """Ranks that share every matrix; must divide model.n_heads and the feed-forward widths."""
    pipeline: int = Field(1, ge=1)
    """Ranks that hold the layers one after the other; needs zero_stage=1 and works best with many more micro-batches
    than ranks."""
    pipeline_schedule: PipelineSchedule = "1f1b"
    """1f1b: a stage a rank, one forward and one backward in turn. dualpipev: two stages a rank, half as large, the
    layers going from the first rank to the last and back: ranks wait less, keep more activations, send twice as much.
    """
    expert: int = Field(1, ge=1)
    """Data-parallel ranks that share the experts of a layer; must divide model.moe.n_experts."""
    context: int = Field(1, ge=1)
    """Context-parallel ranks."""
    zero_stage: int = Field(1, ge=0, le=3)
    """DeepSpeed ZeRO stage over the data-parallel ranks; 0 (nothing sharded) for plain data parallel in fp32 only."""
    offload_optimizer: bool = False
    """Keep the optimizer state and make the update in CPU memory; needs zero_stage 1 or more."""
    sequence_parallel: bool = True
    """Cut activations between tensor-parallel regions along the sequence; no effect at tensor=1."""
    timeout_s: float = Field(600.0, gt=0, le=1e9)
    """Seconds after which a collective that a peer never joined ends the job."""

    @model_validator(mode="after")
    def _only_what_runs(self) -> "ParallelConfig":
        if self.context != 1:
            raise ValueError(f"parallel.context={self.context} is not available yet; use parallel.context=1")
        return self


class OptimConfig(Section):
    name: Literal["adamw", "sgd", "muon"] = "adamw"
    """adamw (fused), sgd (plain), or muon (Muon for matrices and expert stacks, AdamW for the rest)."""
    lr: float = Field(3.0e-4, gt=0)
    """Peak learning rate."""
    muon_lr: float | None = Field(None, gt=0)
    """Peak learning rate of what Muon updates; it follows the same schedule; null = optim.lr."""
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    """Muon's (Nesterov) momentum."""
    lr_factors: dict[Kind, Annotated[float, Field(ge=0)]] = {}
    """Factor on the learning rate for kinds of parameters (matrix, expert, norm, router, embedding, head); 0 freezes:
    no update, no moments, no part in the gradient norm."""
    schedule: Literal["cosine", "linear", "wsd", "one_cycle", "constant"] = "cosine"
    """cosine; linear; wsd = warm-up, stable, decay (1 - sqrt); one_cycle = cosine from lr/25 up to lr, then down."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps of linear warm-up; null = 100, but at most a tenth of the run's steps; with one_cycle the steps of the
    rise, which must then be given (1 or more)."""
    decay_steps: int | None = Field(None, ge=1)
    """Steps of the decay at the end of wsd; null = 20 % of the steps."""
    min_lr: float = Field(3.0e-5, ge=0)
    """Learning rate at the last step (constant: no effect); min_lr / lr holds for muon_lr and lr_factors too."""
    betas: Annotated[tuple[Beta, Beta], BY_COMMAS] = (0.9, 0.95)
    """AdamW's averages of gradient and squared gradient."""
    eps: float = Field(1.0e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.1, ge=0)
    """Decay of matrices and expert stacks; never of norms, routers and embeddings."""
    clip_norm: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 = no clipping."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Keep an exponential moving average of the weights with this decay per step; null = none."""

    @model_validator(mode="after")
    def _consistent(self) -> "OptimConfig":
        if self.min_lr > self.lr:
            raise ValueError(f"optim.min_lr={self.min_lr} is above optim.lr={self.lr}")
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ValueError(f"optim.decay_steps belongs to optim.schedule=wsd, not {self.schedule}")
        if self.muon_lr is not None and self.name != "muon":
            raise ValueError(f"optim.muon_lr belongs to optim.name=muon, not {self.name}")
        if self.schedule == "one_cycle" and not self.warmup_steps:
            raise ValueError(
                "optim.schedule=one_cycle needs optim.warmup_steps, the steps of its rise; 30 % of the steps is usual"
            )
        return self


class TrainConfig(Section):
    steps: int | None = Field(None, ge=1)
    """Optimizer steps of the whole run; 1000 when train.epochs is not given either."""
    epochs: float | None = Field(None, gt=0)
    """Length of the run in passes over the training rows, instead of train.steps; the last step is a whole one."""
    global_batch_size: int = Field(64, ge=1, le=1 << 31)
    """Sequences per optimizer step, over all ranks; does not depend on the layout."""
    batch_schedule: tuple[tuple[Count, Count], ...] = ()
    """[rows, global_batch_size], ...: from that many rows seen on, the batch has that size."""
    micro_batch_size: int = Field(8, ge=1)
    """Sequences per forward on one rank."""
    seq_len: int = Field(1024, ge=1)
    """Tokens per sequence."""
    seq_len_schedule: tuple[tuple[Annotated[int, Field(ge=0)], Count], ...] = ()
    """[rows, length], ...: from that many rows seen on, each row is read as train.seq_len / length separate sequences.
    """
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """bf16 and fp16 (with loss scaling) keep float32 masters; auto takes the faster of fp32 and bf16 and prints which.
    """
    compile: bool = False
    """Compile the blocks with torch.compile (needs a C++ compiler)."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward recomputes to save memory: nothing, cheap elementwise work, or whole blocks."""
    skip_steps: Annotated[tuple[Count, ...], BY_COMMAS] = ()
    """Steps whose rows are passed over without an update."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    threads: int = Field(1, ge=1, le=1024)
    """CPU threads per process; part of what makes a run bitwise repeatable."""

    @model_validator(mode="before")
    @classmethod
    def _default_length(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("steps") is None and values.get("epochs") is None:
            return {**values, "steps": 1000}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"train.steps={self.steps} and train.epochs={self.epochs} both give the length; set one of them to null"
            )
        for key in ("batch_schedule", "seq_len_schedule"):
            rows = [row for row, _ in getattr(self, key)]
            for i, (before, after) in enumerate(zip(rows, rows[1:], strict=False)):
                if after <= before:
                    raise ValueError(f"train.{key}.{i + 1} begins at row {after}, not after row {before} of the last")
        for i, (_, length) in enumerate(self.seq_len_schedule):
            if self.seq_len % length:
                raise ValueError(
                    f"train.seq_len_schedule.{i}: {length} does not divide train.seq_len={self.seq_len}; "
                    f"rows are cut into equal sequences"
                )
        return self


class GuardConfig(Section):
    nonfinite: Literal["raise", "skip", "rewind"] = "raise"
    """At a loss or gradient norm that is no finite number: stop, skip the update, or go back to the last checkpoint."""
    spike: Literal["off", "warn", "skip", "rewind"] = "warn"
    """At a loss far above the last ones: nothing, say it, skip the update, or go back and pass over these rows."""
    spike_threshold: float = Field(8.0, gt=0)
    """How far is far: robust standard deviations of the last spike_window losses."""
    spike_window: int = Field(64, ge=8)
    """Losses that a new one is compared with."""
    max_events: int = Field(20, ge=0)
    """Skips and rewinds after which the run stops instead."""


class CheckpointConfig(Section):
    interval: int = Field(100, ge=1)
    """Steps between checkpoints; the last step always gets one."""
    keep: int = Field(3, ge=1)
    """Newest checkpoints that stay."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss (saved when it is reached)."""
    keep_every: int | None = Field(None, ge=1)
    """Checkpoints of every so many steps stay for good; a multiple of checkpoint.interval; null = none."""
    asynchronous: bool = True
    """Copy the state to host memory, which must have room for it, and write it while training goes on."""
    on_failure: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written (full disk): stop, or say so and train on; the last step's must be written.
    """
    resume: PathText = "auto"
    """auto = newest valid checkpoint of the run folder; never = refuse a used folder; or the path of a checkpoint."""
    allow_changes: Annotated[tuple[str, ...], BY_COMMAS] = ()
    """Config keys, separated by commas, that may differ from the checkpoint's although they change the results."""

    @model_validator(mode="after")
    def _consistent(self) -> "CheckpointConfig":
        if self.keep_every is not None and self.keep_every % self.interval:
            raise ValueError(
                f"checkpoint.keep_every={self.keep_every} is no multiple of checkpoint.interval={self.interval}"
            )
        return self


class EvalConfig(Section):
    interval: int = Field(100, ge=1)
    """Steps between validations; the last step always gets one."""
    rows: int | None = Field(512, ge=1)
    """Rows (of train.seq_len tokens) of the held-out text that a validation reads, a fixed choice over all of it, the
    same on every layout; null = all."""
    batches: int | None = Field(None, ge=1)
    """Older name for rows: so many times train.global_batch_size rows; null without eval.rows = all."""
    patience: int | None = Field(None, ge=1)
    """End the run after this many validations without a new best; null = never."""
    sample_interval: int | None = Field(None, ge=1)
    """Steps between text samples; null = none."""
    sample_tokens: int = Field(128, ge=1)
    """Tokens per sample."""
    temperature: float = Field(0.8, ge=0)
    """Temperature of the samples; 0 = greedy."""
    prompts: Annotated[tuple[str, ...], ONE_TEXT, Field(min_length=1)] = ("",)
    """Prompts of the samples, a list or one text; an empty one starts a document."""


class LogConfig(Section):
    interval: int = Field(10, ge=1)
    """Steps between lines on the screen; metrics.jsonl gets every step."""
    tensorboard: bool = True
    """Write curves to tb/ in the run folder."""
    wandb: bool = False
    """Send curves to Weights & Biases, online or offline as its own environment variables say."""
    peak_flops: float | None = Field(None, gt=0)
    """Arithmetic peak of one device (FLOP/s), for mfu; null = known for common GPUs, mfu stays null elsewhere."""
    trace_steps: Annotated[tuple[Count, Count] | None, BY_COMMAS] = None
    """[first, last]: write statistics of every module's output and every gradient of these steps to trace.jsonl."""

    @model_validator(mode="after")
    def _consistent(self) -> "LogConfig":
        if self.wandb and "wandb" not in sys.modules and importlib.util.find_spec("wandb") is None:
            raise ValueError(
                'log.wandb=true: the package wandb is not installed; pip install "lattice-llm[wandb]", '
                "or log.wandb=false"
            )
        if self.trace_steps is not None and self.trace_steps[0] > self.trace_steps[1]:
            raise ValueError(f"log.trace_steps={list(self.trace_steps)}: the first step lies after the last")
        return self


class RunConfig(Section):
    """Everything that a run is made of."""

    model: ModelSection
    """ModelArgs, or the path of a YAML file with them."""
    tokenizer: TokenizerConfig
    """kind: sentencepiece | bytes | characters, and the path of its file."""
    data: DataConfig
    """Training and held-out text."""
    parallel: ParallelConfig = ParallelConfig()
    """How the ranks share the work."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and learning-rate schedule."""
    train: TrainConfig = TrainConfig()
    """Steps, batch, precision."""
    guard: GuardConfig = GuardConfig()
    """What happens when the loss is not finite or jumps."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
    eval: EvalConfig = EvalConfig()
    """Validation and samples during training."""
    log: LogConfig = LogConfig()
    """What is written where."""
    deepspeed: dict[str, Any] = {}
    """Expert options passed through to DeepSpeed's JSON, but for those that the other sections decide."""

    @field_validator("deepspeed")
    @classmethod
    def _known_to_deepspeed(cls, options: dict[str, Any]) -> dict[str, Any]:
        return checked_options(options) if options else {}

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if self.train.seq_len > self.model.max_seq_len:
            raise ValueError(f"train.seq_len={self.train.seq_len} is above model.max_seq_len={self.model.max_seq_len}")
        if self.eval.patience is not None and self.data.valid is None:
            raise ValueError(f"eval.patience={self.eval.patience} needs held-out text: set data.valid")
        self._keys_are_known()
        optim, steps = self.optim, self.train.steps
        if steps is not None:  # of train.epochs only the data says how many they are
            length = f"train.steps={steps}"
            wrong = misfit(optim.warmup_steps, optim.decay_steps, steps, length)
            wrong = wrong or untraced(self.log.trace_steps, steps, length)
            if wrong:
                raise ValueError(wrong)
        return self._with_held_out_rows()

    def _with_held_out_rows(self) -> "RunConfig":
        """The config with `eval.rows` where the older `eval.batches` says how many."""
        given, batches = self.eval.model_fields_set, self.eval.batches
        if "batches" not in given:
            return self
        rows = None if batches is None else batches * self.train.global_batch_size
        if "rows" not in given:
            object.__setattr__(self, "eval", self.eval.model_copy(update={"rows": rows}))  # frozen for all others
        elif batches is not None and self.eval.rows != rows:
            held_out = "null" if self.eval.rows is None else self.eval.rows
            raise ValueError(
                f"eval.rows={held_out} and eval.batches={batches} (x train.global_batch_size="
                f"{self.train.global_batch_size} = {rows} rows) both say how much is read; set eval.batches to null"
            )
        return self

    def _keys_are_known(self) -> None:
        known = keys_of(RunConfig)
        sections = {key[:i] for key in known for i, letter in enumerate(key) if letter == "."}
        for key in self.checkpoint.allow_changes:
            if key not in known and key not in sections and not key.startswith("deepspeed."):
                near = meant(key, known)
                hint = f"did you mean {' or '.join(near)}?" if near else "see --help for all keys"
                raise ValueError(f"checkpoint.allow_changes={key}: no such key; {hint}")


def load_config(path: str | Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Read a YAML run config, apply `{"train.steps": 200}`-like overrides, validate.

    Raises UserError naming the file or the key; nothing else is touched.
    """
    raw = read_yaml(Path(path))
    model = raw.get("model")
    for key, value in (overrides or {}).items():
        if key == "model":
            model = raw["model"] = value
    if isinstance(model, str):
        raw["model"] = read_yaml(Path(model).expanduser())
    for key, value in (overrides or {}).items():
        if key != "model":
            put(raw, key, value, RunConfig)
    _complete_from_weights(raw, str(path))
    return validate(raw, str(path))


def _complete_from_weights(raw: dict[str, Any], where: str) -> None:
    """Fill in what `model.init_from` knows: the model, and its tokenizer if the config names none. A model that is
    written out needs the folder no more, as when a run is continued."""
    model = raw.get("model")
    source = model.get("init_from") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(source, str) or ("dim" in model and not Path(source).exists()):
        return
    from llm.pretrained import args_of, tokenizer_config_of  # they import torch

    try:
        own = args_of(source, tell=None).model_dump(mode="json")  # the run says them when it begins
        groups = {key: own[key] | value for key, value in model.items() if _is_group(value) and _is_group(own.get(key))}
        raw["model"] = own | model | groups
        if "tokenizer" not in raw:
            raw["tokenizer"] = tokenizer_config_of(source, tell=None).model_dump(mode="json")
    except UserError as error:
        raise UserError(f"{where}: model.init_from: {error}") from None


def _is_group(value: Any) -> bool:
    return isinstance(value, dict)


def validate(raw: dict[str, Any], where: str) -> RunConfig:
    """RunConfig of a nested dict; UserError with one line that names the first wrong key."""
    try:
        return RunConfig.model_validate(prepared(raw, RunConfig))
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, RunConfig)}") from None
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def layout_of(config: RunConfig, world: int) -> Layout:
    """The layout that the config asks for on `world` ranks, not checked."""
    parallel = config.parallel
    return Layout(
        world=world,
        tensor=parallel.tensor,
        expert=parallel.expert,
        pipeline=parallel.pipeline,
        context=parallel.context,
        zero_stage=parallel.zero_stage,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_schedule=parallel.pipeline_schedule,
    )


def check_layout(config: RunConfig, world: int) -> Layout:
    """The layout of the config on `world` ranks.

    UserError, naming the key and the nearest layout that works, when the run cannot be cut in this way. Everything of
    a config that depends on the number of ranks is checked here.
    """
    layout, train = layout_of(config, world), config.train
    settings = ((key, reduce(getattr, key.split("."), config)) for key in WHOLE_PARAMETERS_ONLY)
    needs = Needs(
        args=config.model,
        precision=train.precision,
        offload_optimizer=config.parallel.offload_optimizer,
        seq_len=train.seq_len,
        batches=_global_batches(train),
        asked_for=tuple(f"{key}={_as_typed(value)}" for key, value in settings if value),
    )
    check(needs, Choice(layout, train.micro_batch_size))
    return layout


def accumulation_steps(config: RunConfig, data_ranks: int) -> int:
    """Most micro-batches per rank and step of a layout that check_layout lets pass."""
    return max(size for _, size in _global_batches(config.train)) // (config.train.micro_batch_size * data_ranks)


def _global_batches(train: TrainConfig) -> tuple[tuple[str, int], ...]:
    later = ((f"train.batch_schedule.{i}.1", size) for i, (_, size) in enumerate(train.batch_schedule))
    return (("train.global_batch_size", train.global_batch_size), *later)


def _as_typed(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value)
