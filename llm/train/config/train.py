"""The sections `train` and `guard`: length, batch and precision of a run, and what happens when a step goes wrong."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from llm.train.config.section import BY_COMMAS, Count, Section
from llm.train.config.yaml_file import plain


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
    objectives: Annotated[dict[str, dict[str, Any]], AfterValidator(plain)] = {}
    """Further losses beside the task's: the name of each, and under it its options, as weight; see `extensions`."""
    freeze: Annotated[tuple[str, ...], BY_COMMAS] = ()
    """Parameters that do not train, by name or pattern as `layers.*.feed_forward.*`: without gradient, optimizer state,
    average or room in the checkpoint, which names where they came from."""
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
