"""The sections `checkpoint`, `eval` and `log`: what a run saves, measures and reports, and when."""

import importlib.util
import re
import sys
from typing import Annotated, Literal

from pydantic import Field, model_validator

from llm.paths import PathText
from llm.train.config.section import BY_COMMAS, ONE_TEXT, Count, Section

TASK_METRIC = r"eval/(?P<task>.+)/(?P<metric>[^/]+)"
"""Name of a field of metrics.jsonl that has a task's metric."""


def metric_of_task(field: str) -> tuple[str, str]:
    """Task and metric of such a field. ValueError where it is none."""
    found = re.fullmatch(TASK_METRIC, field)
    if found is None:
        raise ValueError(f"{field}: expected eval/TASK/METRIC")
    return found["task"], found["metric"]


RISING = ("acc", "accuracy", "f1", "roc_auc", "average_precision", "r2", "margin")
FALLING = ("loss", "ppl", "bits_per_byte", "rmse", "mae", "loss_ema")


def is_of_validation(field: str) -> bool:
    """Whether a field of metrics.jsonl is of those that a validation fills in."""
    return re.fullmatch(r"valid_\w+", field) is not None


def higher_is_better(field: str) -> bool | None:
    """Whether the highest value of such a field is the best; None where that is not known."""
    for names, higher in ((RISING, True), (FALLING, False)):
        if any(f"_{name}" == field[-len(name) - 1 :] for name in names):
            return higher
    return None


class CheckpointConfig(Section):
    interval: int = Field(100, ge=1)
    """Steps between checkpoints; the last step always gets one."""
    keep: int = Field(3, ge=1)
    """Newest checkpoints that stay."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss, or the best eval.best (saved when it is reached)."""
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
    interval_epochs: float | None = Field(None, gt=0, exclude_if=lambda epochs: epochs is None)
    """The same in passes over the training rows: with it, interval is as many steps as these have."""
    at_start: bool = False
    """Validate before the first step too, as row 0 of metrics.jsonl: what a model that is trained further begins with;
    `lattice finetune` does, unless this is set."""
    rows: int | None = Field(512, ge=1)
    """Rows (of train.seq_len tokens) of the held-out text that a validation reads, a fixed choice over all of it, the
    same on every layout; null = all."""
    batches: int | None = Field(None, ge=1)
    """Older name for rows: so many times train.global_batch_size rows; null without eval.rows = all."""
    patience: int | None = Field(None, ge=1)
    """End the run after this many validations without a new best; null = never."""
    best: str = "valid_loss"
    """The field of metrics.jsonl that checkpoint.keep_best and eval.patience follow: valid_loss or another of what a
    validation says, such as valid_roc_auc, or eval/TASK/METRIC of one of eval.tasks."""
    best_mode: Literal["min", "max"] | None = Field(None, exclude_if=lambda mode: mode is None)
    """Whether the lowest or the highest eval.best is the best; null = known of the metrics of lm, mlm, prediction, dpo
    and eval.tasks."""
    tasks: Annotated[tuple[PathText, ...], BY_COMMAS] = ()
    """Tasks that the model is evaluated on in between, as `lattice evaluate --tasks` takes them: paths of YAML files,
    or names of those in configs/evaluate/; with eval.at_start before the first step too."""
    tasks_interval: int | None = Field(None, ge=1)
    """Steps between evaluations on eval.tasks; the last step always gets one; null = eval.interval."""
    tasks_limit: int | None = Field(None, ge=1)
    """Documents of each of eval.tasks that are read, the first ones; null = all."""
    apply_chat_template: bool = False
    """Write the prompts of eval.tasks as the turns of a conversation, as the run's chat template does."""
    sample_interval: int | None = Field(None, ge=1)
    """Steps between text samples; null = none."""
    sample_tokens: int = Field(128, ge=1)
    """Tokens per sample."""
    temperature: float = Field(0.8, ge=0)
    """Temperature of the samples; 0 = greedy."""
    prompts: Annotated[tuple[str, ...], ONE_TEXT, Field(min_length=1)] = ("",)
    """Prompts of the samples, a list or one text; an empty one starts a document."""
    images: Annotated[tuple[Annotated[tuple[PathText, ...], ONE_TEXT], ...], ONE_TEXT] = ()
    """Files of the images of the prompts, in their order: for each a path, or a list of paths, one for each `<image>`
    in it; before a prompt without."""

    @property
    def interval_of_tasks(self) -> int:
        """Steps between evaluations on eval.tasks."""
        return self.interval if self.tasks_interval is None else self.tasks_interval

    def images_of(self, prompt: int) -> tuple[str, ...]:
        """The image files of a prompt, by its number."""
        return self.images[prompt] if prompt < len(self.images) else ()

    @model_validator(mode="after")
    def _best_is_measured(self) -> "EvalConfig":
        if self.best == "valid_loss" and self.best_mode == "max":
            raise ValueError("eval.best_mode=max: of losses the lowest is the best")
        if is_of_validation(self.best):
            if self.best_mode is None and higher_is_better(self.best) is None:
                raise ValueError(
                    f"eval.best={self.best}: whether it is to rise or to fall is not known; set eval.best_mode to max "
                    f"or min"
                )
            return self
        if not re.fullmatch(TASK_METRIC, self.best):
            raise ValueError(
                f"eval.best={self.best}: expected valid_loss, or eval/TASK/METRIC of one of eval.tasks, or another "
                f"field of a validation, as valid_acc"
            )
        if not self.tasks:
            raise ValueError(f"eval.best={self.best} is of a task, and eval.tasks has none")
        return self

    @model_validator(mode="after")
    def _images_have_prompts(self) -> "EvalConfig":
        if len(self.images) > len(self.prompts):
            raise ValueError(f"eval.images has {len(self.images)} entries for {len(self.prompts)} eval.prompts")
        return self


class LogConfig(Section):
    interval: int = Field(10, ge=1)
    """Steps between lines on the screen; metrics.jsonl gets every step."""
    tensorboard: bool = True
    """Write curves to tb/ in the run folder."""
    wandb: bool = False
    """Send curves to Weights & Biases, online or offline as its own environment variables say."""
    csv: bool = Field(False, exclude_if=lambda value: value is False)
    """Write the same curves to metrics.csv in the run folder, a row a step."""
    peak_flops: float | None = Field(None, gt=0)
    """Arithmetic peak of one device (FLOP/s), for mfu; null = known for common GPUs, mfu stays null elsewhere."""
    report: bool = Field(True, exclude_if=lambda value: value is True)
    """Write report.html to the run folder when the run ends (`lattice report` makes it at any time)."""
    trace_steps: Annotated[tuple[Count, Count] | None, BY_COMMAS] = None
    """[first, last]: write statistics of every module's output and every gradient of these steps to trace.jsonl."""
    profile_steps: Annotated[tuple[Count, Count] | None, BY_COMMAS] = Field(None, exclude_if=lambda span: span is None)
    """[first, last]: write PyTorch's profile of these steps to profile/ in the run folder, as Chrome traces of the
    ranks that together hold the model once."""

    @property
    def watched(self) -> dict[str, tuple[int, int] | None]:
        """The steps that are looked at more closely, by the keys that say so."""
        return {"log.trace_steps": self.trace_steps, "log.profile_steps": self.profile_steps}

    @model_validator(mode="after")
    def _consistent(self) -> "LogConfig":
        if self.wandb and "wandb" not in sys.modules and importlib.util.find_spec("wandb") is None:
            raise ValueError(
                'log.wandb=true: the package wandb is not installed; pip install "lattice-llm[wandb]", '
                "or log.wandb=false"
            )
        for key, steps in self.watched.items():
            if steps is not None and steps[0] > steps[1]:
                raise ValueError(f"{key}={list(steps)}: the first step lies after the last")
        return self
