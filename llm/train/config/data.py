"""The section `data`: training and held-out text."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from llm.data.images import ImageOptions
from llm.data.kinds import PackingName
from llm.data.mixture import mixture_problem
from llm.data.sources import SourceSpec, source_specs
from llm.paths import PathText
from llm.train.config.data_keys import as_sources
from llm.train.config.section import Section
from vision.opening import MOST_PIXELS, ImageLimits

LIMITS = ImageLimits()


class DataConfig(Section):
    train: Annotated[PathText, Field(min_length=1)] | Annotated[list[SourceSpec], Field(min_length=1)]
    """Training data: a path, or a list of paths and {path, kind, weight, name, columns, text_field, separator}; raw
    text is sharded, and conversations are encoded, into the cache first."""
    valid: (
        Annotated[PathText, Field(min_length=1)]
        | Annotated[list[SourceSpec], Field(min_length=1)]
        | Annotated[float, Field(gt=0, lt=1)]
        | None
    ) = None
    """Held-out data, in the same form (weights do not matter), or a share of the training documents, as 0.05, chosen by
    their hash and not trained on; no validation without it."""
    packing: PackingName | None = None
    """How samples become rows: best_fit (several whole ones in a row) or none (one in a row); text is one stream
    (concat); null: as is best for the kind."""
    source_len: int | None = Field(default=None, ge=1, exclude_if=lambda value: value is None)
    """Positions of a row for what the encoder of an encoder-decoder reads; null: train.seq_len."""
    cache_dir: PathText = "runs/cache"
    """Where raw text and samples are kept as token shards after their first use."""
    image_root: PathText | None = None
    """The folder that paths of images begin at, and may not lead out of; null: that of the file of the row."""
    max_pixels: int = Field(default=LIMITS.max_pixels, gt=0, le=MOST_PIXELS)
    """Most pixels of an image, width times height."""
    max_image_bytes: int = Field(default=LIMITS.max_bytes, gt=0)
    """Most bytes of an image's file."""
    bad_images: Literal["error", "drop"] = "error"
    """A row with an image that is missing, broken or too large: stop, or leave the row out and count it."""

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

    @property
    def images(self) -> ImageOptions:
        """What is said of images."""
        return ImageOptions(self.image_root, ImageLimits(self.max_pixels, self.max_image_bytes), self.bad_images)
