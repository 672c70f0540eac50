"""The sections of tasks over values, and what a config of such a run must agree on."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from llm.args import ModelArgs
from llm.data.labels import MaxLength
from llm.train.config.section import Section

TASKS_OF_VALUES = ("regression", "autoregressive")
TASKS_OF_TOKENS = ("lm", "mlm", "dpo", "prediction", "seq2seq")

KINDS_OF_TEXT = ("text", "chat", "completion", "preference", "image_text", "labelled", "pair")


class RegressionConfig(Section):
    max_length: MaxLength = "error"
    """A sample of more positions than a row: stop, leave it out, or keep its beginning."""


class AutoregressiveConfig(Section):
    stride: int | None = Field(None, gt=0)
    """Steps from the beginning of one window of a series to the next; null: train.seq_len, windows side by side.
    Held-out series are always cut side by side."""


def reads_and_predicts_values(model: Any) -> bool:
    """Whether a model section, as it was written, needs no tokenizer."""
    return isinstance(model, Mapping) and None not in (model.get("input_dim"), model.get("output_dim"))


def check_tasks_of_values(model: ModelArgs, tasks: tuple[str, ...], has_text: bool) -> None:
    """ValueError where a task, the model and its tokenizer do not go together."""
    of_values = next((name for name in tasks if name in TASKS_OF_VALUES), None)
    of_tokens = next((name for name in tasks if name in TASKS_OF_TOKENS), None)
    dims = {"input_dim": model.input_dim, "output_dim": model.output_dim}
    given = next((f"model.{key}={value}" for key, value in dims.items() if value is not None), None)
    if of_tokens is not None and given is not None:
        raise ValueError(f"{given}: values are of the tasks {' and '.join(TASKS_OF_VALUES)}, and task={of_tokens} is "
                         f"of tokens")  # fmt: skip
    missing = next((key for key, value in dims.items() if value is None), None)
    if of_values is not None and missing is not None:
        raise ValueError(f"task={of_values}: the model reads and predicts values; set model.{missing}")
    if not has_text and given is None:
        raise ValueError("tokenizer.kind=none: a model of tokens needs a tokenizer; runs over values have model."
                         "input_dim and model.output_dim")  # fmt: skip
    if "autoregressive" not in tasks:
        return
    if model.input_dim != model.output_dim:
        raise ValueError(
            f"model.output_dim={model.output_dim}: task=autoregressive predicts the next values of what it reads, "
            f"model.input_dim={model.input_dim}"
        )
    if not model.causal:
        raise ValueError("model.causal=false: task=autoregressive is of models whose steps do not see what comes; "
                         "leave it out")  # fmt: skip


def kind_problem(task: str, kind: str) -> str | None:
    """Why rows of a kind are not those of a task; None where they may be."""
    if task in TASKS_OF_VALUES and kind in KINDS_OF_TEXT:
        return f"task={task} trains on kind values (numbers)"
    if task in TASKS_OF_TOKENS and kind == "values":
        return f"values are read by the tasks {' and '.join(TASKS_OF_VALUES)}, and task={task} is of tokens"
    return None
