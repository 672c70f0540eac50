"""What a run is trained to do: the entries of a list under `task`, and the sections of tasks, each called as its task,
with options that decide what it trains on, and how.
"""

from collections.abc import Iterator, Sequence

from pydantic import Field, model_validator

from llm.train.config.section import Section


class TaskEntry(Section):
    """One of several tasks of a run."""

    task: str = Field(min_length=1)
    """lm | mlm | prediction | seq2seq, or a task that an extension adds"""
    weight: float = Field(1.0, gt=0)
    """What its loss is multiplied with; how often its rows are read is said by the weight of its source."""
    source: str = Field(min_length=1)
    """Name of the source under data.train that it reads, and of one under data.valid."""


def source_problems(entries: Sequence[TaskEntry], train: Sequence[str], valid: Sequence[str]) -> Iterator[str]:
    """What is wrong with the sources that tasks read, the names of all being these: each is read by one task."""
    asked = [entry.source for entry in entries]
    if not asked:
        yield "task=[]: a list of tasks has an entry {task, weight, source} for each source under data.train"
    for i, source in enumerate(asked):
        if source not in train:
            yield f"task.{i}.source={source}: no such source; data.train has {', '.join(train)}"
        elif source in asked[:i]:
            yield f"task.{i}.source={source}: task.{asked.index(source)} reads it already; a source has one task"
    for key, names in (("train", train), ("valid", valid)):
        for i, name in enumerate(names):
            if name not in asked:
                yield (
                    f"data.{key}.{i}: no task reads the source {name}; the entries of task name {', '.join(asked)} "
                    f"(data.{key}.{i}.name gives it another name)"
                )


class DpoConfig(Section):
    beta: float = Field(0.1, gt=0)
    """How much a reward is of a log-probability's gain on the reference model: the higher, the nearer to it."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs that are taken to prefer the other answer."""


class MlmConfig(Section):
    rate: float = Field(0.15, gt=0, le=1)
    """Share of the tokens that are to be guessed; control tokens never are."""
    mask: float = Field(0.8, ge=0, le=1)
    """Share of these that the model sees as the mask token."""
    random: float = Field(0.1, ge=0, le=1)
    """Share of these that it sees as a random token; the rest it sees as they are."""
    mask_token: str | int | None = None
    """Name or id of the mask token; null: the tokenizer's <mask>, [MASK] or <|mask|>."""

    @model_validator(mode="after")
    def _shares_of_one_whole(self) -> "MlmConfig":
        if self.mask + self.random > 1 + 1e-9:  # 0.8 and 0.2 in binary
            raise ValueError(f"mlm.mask={self.mask} and mlm.random={self.random}: above 1 together")
        return self
