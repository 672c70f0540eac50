"""The section `data`: training and held-out text."""

from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from llm.data.mixture import mixture_problem
from llm.data.sources import SourceSpec, source_specs
from llm.paths import PathText
from llm.train.config.data_keys import as_sources
from llm.train.config.section import Section


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
