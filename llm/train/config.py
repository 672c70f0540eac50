"""The run config: one YAML file, one schema, overrides from the command line.

Everything is checked here, before a process group exists: unknown keys, wrong types, impossible combinations. A
message names the key (`train.steps`) and says what is possible instead. The line under each field is what `--help`
prints.
"""

import difflib
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llm.args import ModelArgs
from llm.data.sources import SourceSpec
from llm.errors import UserError
from llm.tokenizer import TokenizerConfig


class Section(BaseModel):
    """A part of the config: frozen, no unknown keys, field documentation from the line under the field."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class DataConfig(Section):
    train: Annotated[str, Field(min_length=1)] | Annotated[list[SourceSpec], Field(min_length=1)]
    """Training text: a path, or a list of {path, weight, name, text_field}; raw text is sharded into the cache first.
    """
    valid: Annotated[str, Field(min_length=1)] | Annotated[list[SourceSpec], Field(min_length=1)] | None = None
    """Held-out text, in the same form (weights do not matter); no validation without it."""
    cache_dir: str = "runs/cache"
    """Where raw text is kept as token shards after its first use."""


class ParallelConfig(Section):
    tensor: int = Field(1, ge=1)
    """Tensor-parallel ranks."""
    pipeline: int = Field(1, ge=1)
    """Pipeline stages."""
    expert: int = Field(1, ge=1)
    """Expert-parallel ranks."""
    context: int = Field(1, ge=1)
    """Context-parallel ranks."""
    zero_stage: int = Field(1, ge=0, le=3)
    """DeepSpeed ZeRO stage over the data-parallel ranks."""
    timeout_s: float = Field(600.0, gt=0)
    """Seconds after which a collective that a peer never joined ends the job."""

    @model_validator(mode="after")
    def _only_what_runs(self) -> "ParallelConfig":
        for name in ("tensor", "pipeline", "expert", "context"):
            if getattr(self, name) != 1:
                raise ValueError(
                    f"parallel.{name}={getattr(self, name)} is not available yet; use parallel.{name}=1 (data parallel)"
                )
        if self.zero_stage != 1:
            raise ValueError(f"parallel.zero_stage={self.zero_stage} is not available yet; use parallel.zero_stage=1")
        return self


class OptimConfig(Section):
    name: Literal["adamw", "sgd"] = "adamw"
    """adamw (fused) or sgd (plain)."""
    lr: float = Field(3.0e-4, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine; wsd = warm-up, stable, decay (1 - sqrt); constant."""
    warmup_steps: int = Field(100, ge=0)
    """Steps of linear warm-up."""
    decay_steps: int | None = Field(None, ge=1)
    """Steps of the decay at the end of wsd; default: 20 % of the steps."""
    min_lr: float = Field(3.0e-5, ge=0)
    """Learning rate at the last step."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's averages of gradient and squared gradient."""
    eps: float = Field(1.0e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.1, ge=0)
    """Decay of matrices and expert stacks; never of norms, routers and embeddings."""
    clip_norm: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 = no clipping."""

    @model_validator(mode="after")
    def _consistent(self) -> "OptimConfig":
        if self.min_lr > self.lr:
            raise ValueError(f"optim.min_lr={self.min_lr} is above optim.lr={self.lr}")
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ValueError(f"optim.decay_steps belongs to optim.schedule=wsd, not {self.schedule}")
        return self


class TrainConfig(Section):
    steps: int = Field(1000, ge=1)
    """Optimizer steps of the whole run."""
    global_batch_size: int = Field(64, ge=1)
    """Sequences per optimizer step, over all ranks; does not depend on the layout."""
    micro_batch_size: int = Field(8, ge=1)
    """Sequences per forward on one rank."""
    seq_len: int = Field(1024, ge=1)
    """Tokens per sequence."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 keeps float32 masters; auto takes the faster of both on this machine and prints which."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    threads: int = Field(1, ge=1)
    """CPU threads per process; part of what makes a run bitwise repeatable."""


class CheckpointConfig(Section):
    interval: int = Field(100, ge=1)
    """Steps between checkpoints; the last step always gets one."""
    keep: int = Field(3, ge=1)
    """Newest checkpoints that stay."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss (saved when it is reached)."""
    resume: str = "auto"
    """auto = newest valid checkpoint of the run folder; never = refuse a used folder; or the path of a checkpoint."""
    allow_changes: tuple[str, ...] = ()
    """Config keys that may differ from the checkpoint's although they change the results."""


class EvalConfig(Section):
    interval: int = Field(100, ge=1)
    """Steps between validations; the last step always gets one."""
    batches: int | None = Field(None, ge=1)
    """Micro-batches per rank of a validation; null = the whole held-out source."""
    sample_interval: int | None = Field(None, ge=1)
    """Steps between text samples; null = none."""
    sample_tokens: int = Field(128, ge=1)
    """Tokens per sample."""
    temperature: float = Field(0.8, ge=0)
    """Temperature of the samples; 0 = greedy."""
    prompts: tuple[str, ...] = Field(("",), min_length=1)
    """Prompts of the samples; an empty one starts a document."""


class LogConfig(Section):
    interval: int = Field(10, ge=1)
    """Steps between lines on the screen; metrics.jsonl gets every step."""
    tensorboard: bool = True
    """Write curves to tb/ in the run folder."""


# What the config's own sections decide of DeepSpeed's JSON; the rest may be passed through.
OWNED_BY_CONFIG = frozenset(
    ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    + ("optimizer", "scheduler", "bf16", "fp16", "torch_autocast", "data_types")
)


class RunConfig(Section):
    """Everything that a run is made of."""

    model: ModelArgs
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
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
    eval: EvalConfig = EvalConfig()
    """Validation and samples during training."""
    log: LogConfig = LogConfig()
    """What is written where."""
    deepspeed: dict[str, Any] = {}
    """Expert options passed through to DeepSpeed's JSON."""

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        owned = sorted(OWNED_BY_CONFIG & self.deepspeed.keys())
        if owned:
            raise ValueError(f"deepspeed.{owned[0]} is set by the other sections of the config; leave it out")
        zero = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, dict) or "stage" in zero:
            raise ValueError("deepspeed.zero_optimization.stage is set by parallel.zero_stage; leave it out")
        if self.train.seq_len > self.model.max_seq_len:
            raise ValueError(f"train.seq_len={self.train.seq_len} is above model.max_seq_len={self.model.max_seq_len}")
        return self


# Keys whose change on resume keeps the mathematics of the run: how it is cut, how long it is, what is watched.
FREE_ON_RESUME = (
    "parallel", "train.steps", "train.global_batch_size", "train.micro_batch_size", "train.threads",
    "checkpoint", "eval", "log", "data", "tokenizer", "deepspeed",
)  # fmt: skip


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
        raw["model"] = read_yaml(Path(model))
    for key, value in (overrides or {}).items():
        if key != "model":
            _set(raw, key, value)
    return validate(raw, str(path))


def validate(raw: dict[str, Any], where: str) -> RunConfig:
    """RunConfig of a nested dict; UserError with one line that names the first wrong key."""
    try:
        _refuse_booleans(raw, RunConfig)
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, RunConfig)}") from None
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _refuse_booleans(raw: Any, schema: type[BaseModel], prefix: str = "") -> None:
    """pydantic would read true as the number 1, and a flag without its value is true."""
    for name, value in raw.items() if isinstance(raw, dict) else ():
        info = schema.model_fields.get(name)
        if info is None:
            continue
        inner = section_of(info.annotation)
        if inner is not None:
            _refuse_booleans(value, inner, f"{prefix}{name}.")
        elif isinstance(value, bool) and bool not in _leaf_types(info.annotation):
            raise ValueError(f"{prefix}{name}={str(value).lower()}: expected a value other than true or false")


def _leaf_types(annotation: Any) -> set[Any]:
    inner = getattr(annotation, "__args__", None)
    return {annotation} if inner is None else set().union(*(_leaf_types(argument) for argument in inner))


def explain(error: ValidationError, schema: type[BaseModel]) -> str:
    """One line for the first problem of a pydantic error, naming the key as it is written on the command line."""
    problems = error.errors()
    # of a value that may be a string or a list, pydantic tells both ways in which it failed: the longer one is meant
    first = max(problems[:2], key=lambda problem: len(problem["loc"])) if len(problems) > 1 else problems[0]
    key = ".".join(str(part) for part in first["loc"] if not isinstance(part, str) or part.isidentifier())
    if first["type"] == "extra_forbidden":
        known = _fields(schema, [str(part) for part in first["loc"][:-1]])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known keys here: {', '.join(known)}"
        return f"unknown key {key}; {hint}"
    if first["type"] == "missing":
        return f"missing key {key}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return message
    return f"{key}={first['input']!r}: {message[0].lower()}{message[1:]}"


def _fields(schema: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        field = schema.model_fields.get(part)
        inner = section_of(field.annotation) if field is not None else None
        if inner is not None:
            schema = inner
    return list(schema.model_fields)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The schema inside a field's type, as in `ModelArgs` or `MoEArgs | None`; None for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = [section_of(argument) for argument in getattr(annotation, "__args__", ())]
    return next((schema for schema in inner if schema is not None), None)


def _set(raw: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, leaf = dotted.split(".")
    node = raw
    for i, section in enumerate(sections):
        child = node.setdefault(section, {})
        if child is None:
            child = node[section] = {}
        if not isinstance(child, dict):
            raise UserError(f"--{dotted}: {'.'.join(sections[: i + 1])} is a value, not a section")
        node = child
    node[leaf] = value


# The parser's own error, and what its constructors raise for a date that does not exist, a list as a key, endless
# nesting.
NOT_YAML = (yaml.YAMLError, ValueError, TypeError, RecursionError)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<`: its keys may be given again
                continue
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; UserError naming the file when it is missing or malformed."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; expected YAML") from None
    try:
        value = _Loader(text).get_single_data()
    except NOT_YAML as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(value).__name__}")
    return value


def scalar(text: str) -> Any:
    """What `text` would be as a value in the YAML file: `1e-4` a number, `false` false, `[a, b]` a list."""
    try:
        return _Loader(text).get_single_data()
    except NOT_YAML:
        return text


def accumulation_steps(config: RunConfig, data_ranks: int) -> int:
    """Micro-batches per rank and step; UserError when the global batch cannot be cut evenly."""
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    if batch % (micro * data_ranks):
        fits = [m for m in range(1, batch + 1) if batch % (m * data_ranks) == 0]
        how = (
            f"use train.micro_batch_size={max([m for m in fits if m <= micro], default=fits[0])}"
            if fits
            else f"use a multiple of {data_ranks}"
        )
        raise UserError(
            f"train.global_batch_size={batch} is not divisible by train.micro_batch_size={micro} x {data_ranks} "
            f"data-parallel ranks; {how}"
        )
    return batch // (micro * data_ranks)


def learning_rate(optim: OptimConfig, steps: int, step: int) -> float:
    """Learning rate of step `step` (1-based) of `steps`: linear warm-up, then the schedule; min_lr at the last step."""
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "cosine":
        progress = (step - optim.warmup_steps) / max(steps - optim.warmup_steps, 1)
        return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    decay = optim.decay_steps or max(steps // 5, 1)
    progress = max(step - (steps - decay), 0) / decay
    return optim.lr - (optim.lr - optim.min_lr) * math.sqrt(progress) if progress < 1 else optim.min_lr


def differences(saved: dict[str, Any], now: dict[str, Any], allowed: tuple[str, ...] = ()) -> list[str]:
    """Lines `key: saved -> now` for every key that must not change on resume and did."""
    flat_saved, flat_now = _flatten(saved), _flatten(now)
    lines = []
    for key in sorted(flat_saved.keys() | flat_now.keys()):
        free = any(key == prefix or key.startswith(prefix + ".") for prefix in FREE_ON_RESUME + allowed)
        if not free and flat_saved.get(key) != flat_now.get(key):
            lines.append(f"{key}: {flat_saved.get(key)!r} -> {flat_now.get(key)!r}")
    return lines


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
