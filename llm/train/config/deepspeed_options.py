"""The `deepspeed:` section, checked before anything else of a run: every option known, of its type, and not one that
the config decides elsewhere.

DeepSpeed itself looks at an option when the engine is built, after the data: a wrong type ends there in a traceback,
and an unknown name at the top is passed over. Where it has pydantic models they have the say; the names at the top,
which it only asks for one by one, are the tables here, of exactly the pinned version.
"""

import difflib
import importlib
import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, cast

from pydantic import BaseModel, TypeAdapter, ValidationError

from llm.train.config.yaml_file import plain, typed

PLAIN_OPTIONS: dict[str, str] = {
    "communication_data_type": "fp16 | bf16 | fp32",
    "disable_allgather": "bool",
    "disable_python_gc": "bool",
    "dump_state": "bool",
    "gradient_predivide_factor": "float",
    "log_level": "debug | info | warning | error | critical",
    "memory_breakdown": "bool",
    "prescale_gradients": "bool",
    "steps_per_print": "int",
    "wall_clock_breakdown": "bool",
}
"""Option at the top -> its type, or the words that it may be."""

GROUPS: dict[str, str] = {
    "zero_optimization": "deepspeed.runtime.zero.config.DeepSpeedZeroConfig",
    "comms_logger": "deepspeed.comm.config.CommsLoggerConfig",
    "csv_monitor": "deepspeed.monitor.config.CSVConfig",
    "comet": "deepspeed.monitor.config.CometConfig",
    "timers.throughput": "deepspeed.utils.config.DeepSpeedThroughputTimerConfig",
}
"""Group of options -> DeepSpeed's own model of it."""

PLAIN_GROUPS: dict[str, dict[str, str]] = {
    "flops_profiler": {
        "enabled": "bool", "recompute_fwd_factor": "float", "profile_step": "int", "module_depth": "int",
        "top_modules": "int", "detailed": "bool", "output_file": "str | None",
    },
}  # fmt: skip
"""Group of options that DeepSpeed has no model of -> option -> type."""

DECIDED: dict[str, str] = {
    "activation_checkpointing": "train.activation_checkpointing",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "checkpoint": "the section checkpoint",
    "compile": "train.compile",
    "data_types": "train.precision",
    "expert_parallel": "parallel.expert",
    "fp16": "train.precision",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_allreduce_op": "the loss, a mean over the global batch",
    "gradient_clipping": "optim.clip_norm",
    "managed_gradient_accumulation": "train.global_batch_size and train.micro_batch_size",
    "optimizer": "optim.name",
    "pipeline": "parallel.pipeline",
    "scheduler": "optim.schedule",
    "seq_parallel_communication_data_type": "train.precision",
    "tensor_parallel": "parallel.tensor",
    "tensorboard": "log.tensorboard",
    "torch_autocast": "train.precision",
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "use_data_before_expert_parallelism": "parallel.expert",
    "vocabulary_size": "model.vocab_size",
    "wandb": "log.wandb",
    "zero_allow_untested_optimizer": "optim.name",
    "zero_force_ds_cpu_optimizer": "parallel.offload_optimizer",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.offload_optimizer": "parallel.offload_optimizer",
    "zero_optimization.cpu_offload": "parallel.offload_optimizer",
    "zero_optimization.cpu_offload_param": "parallel.offload_optimizer",
    "zero_optimization.cpu_offload_use_pin_memory": "parallel.offload_optimizer",
}
"""Option -> the key of the config that decides it."""

NOT_USED = (
    ("aio", "autotuning", "data_efficiency", "dataloader_drop_last", "datastates_ckpt", "hybrid_engine")
    + ("weight_quantization", "zero_optimization.elastic_checkpoint", "zero_optimization.load_from_fp32_weights")
)  # fmt: skip
"""Options of parts of DeepSpeed that a run here has nothing to do with: they would be passed over."""

REMOVED = (
    ("amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting", "nebula")
    + ("progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients")
    + ("zero_optimization.mics_shard_size", "zero_optimization.mics_hierarchical_params_gather")
    + ("zero_optimization.zeropp_loco_param",)
)
"""Options of older versions, which this one refuses by name."""

NOT_FREE = frozenset((*DECIDED, *NOT_USED, *REMOVED))
TYPES: dict[str, Any] = {"bool": bool, "int": int, "float": float, "str | None": str | None}


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as built-in values of their types. ValueError naming `deepspeed.KEY` and what is possible.

    Imports DeepSpeed, which takes a second or two, only where an option stands in a group.
    """
    checked: dict[str, Any] = {}
    for name, value in plain(dict(options)).items():
        key = f"deepspeed.{name}"
        _refuse_decided(str(name))
        if name in PLAIN_OPTIONS:
            checked[name] = _plain(key, value, PLAIN_OPTIONS[name])
        elif name in PLAIN_GROUPS:
            types = PLAIN_GROUPS[name]
            for option in _group(key, value):
                _refuse_unknown(f"{key}.{option}", option, types)
            checked[name] = {option: _plain(f"{key}.{option}", inner, types[option]) for option, inner in value.items()}
        elif name in GROUPS:
            checked[name] = _of_model(str(name), _group(key, value))
        elif name == "timers":
            for option in _group(key, value):
                _refuse_unknown(f"{key}.{option}", option, ["throughput"])
            checked[name] = {
                option: _of_model(f"timers.{option}", _group(f"{key}.{option}", inner))
                for option, inner in value.items()
            }
        else:
            _refuse_unknown(key, name, [*PLAIN_OPTIONS, *PLAIN_GROUPS, *(group.split(".")[0] for group in GROUPS)])
    return checked


def _refuse_decided(name: str) -> None:
    if name in DECIDED:
        raise ValueError(f"deepspeed.{name} is set by {DECIDED[name]}; leave it out")
    if name in NOT_USED:
        raise ValueError(f"deepspeed.{name} has no effect here: that part of DeepSpeed is not used; leave it out")
    if name in REMOVED:
        raise ValueError(f"deepspeed.{name}: DeepSpeed has removed this option; leave it out")


def _refuse_unknown(key: str, name: Any, known: Iterable[str]) -> None:
    if name not in known:
        section = key.rpartition(".")[0]
        possible = [option for option in known if f"{section}.{option}".removeprefix("deepspeed.") not in NOT_FREE]
        near = difflib.get_close_matches(str(name), possible, n=1)
        hint = f"did you mean {section}.{near[0]}?" if near else f"known here: {', '.join(possible)}"
        raise ValueError(f"unknown option {key}; {hint}")


def _group(key: str, value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{key}={typed(value)}: expected a mapping of options")
    return value


def _plain(key: str, value: Any, kind: str) -> Any:
    if kind not in TYPES:
        words = kind.split(" | ")
        if value not in words:
            raise ValueError(f"{key}={typed(value)}: possible are {', '.join(words)}")
        return value
    if TYPES[kind] is not bool and isinstance(value, bool):
        raise ValueError(f"{key}={typed(value)}: expected a value other than true or false")
    try:
        return TypeAdapter(TYPES[kind]).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{key}={typed(value)}: {_lower(error.errors()[0]['msg'])}") from None


def _of_model(name: str, options: dict[Any, Any]) -> dict[str, Any]:
    """The options of a group, as DeepSpeed's model reads them."""
    model = model_of(name)
    key = f"deepspeed.{name}"
    fields = {info.alias or field: field for field, info in model.model_fields.items()}
    for option in options:
        _refuse_decided(f"{name}.{option}")
        if option not in model.model_fields:  # they may be given by alias or by name
            _refuse_unknown(f"{key}.{option}", option, fields)
    try:
        with warnings.catch_warnings(action="ignore"):
            read = model(**options)
    except ValidationError as error:
        raise ValueError(_first_problem(key, error)) from None
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"{key}: {error}") from None
    values = vars(read)
    taken = {
        option: values.get(fields.get(option, option), given)
        for option, given in options.items()
        if given != "auto"  # DeepSpeed's word for its own default
    }
    return {option: options[option] if isinstance(value, BaseModel) else value for option, value in taken.items()}


def _first_problem(key: str, error: ValidationError) -> str:
    first = error.errors()[0]
    named = ".".join([key, *map(str, first["loc"])])
    if first["type"] == "extra_forbidden":
        return f"unknown option {named}; DeepSpeed has none of that name there"
    return f"{named}={typed(first['input'])}: {_lower(first['msg'])}"


def model_of(group: str) -> type[BaseModel]:
    """DeepSpeed's model of a group of options."""
    module, _, name = GROUPS[group].rpartition(".")
    logging.disable(logging.WARNING)  # it announces the accelerator that it found
    try:
        return cast(type[BaseModel], getattr(importlib.import_module(module), name))
    finally:
        logging.disable(logging.NOTSET)


def _lower(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[0].lower() + message[1:]
