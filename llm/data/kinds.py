"""Kinds of data by name: how the files of a source become rows.

To add one: a subclass of `Kind` in a file of your own, `register(kind)` at the end of it, the file under `extensions`
and `kind: NAME` at a source in the run config.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from llm.data.images import ImageOptions
from llm.data.labels import LabelOptions, MaxLength
from llm.data.rows import RowSource
from llm.data.sources import SourceFiles, SourceSpec
from llm.data.split import Split
from llm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llm.args.vision import VisionArgs
    from llm.data.values import ValueOptions

PackingName = Literal["best_fit", "concat", "none"]


class ChatOptions(BaseModel):
    """The section `chat` of a run config."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    template: str = Field(default="auto", min_length=1)
    """how a conversation is written: auto (the template that came with the tokenizer) | llama3 | llama4 | chatml |
    gemma | mistral | the path of a .jinja file"""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """what is trained: all turns of the assistant, the last of them, or every token"""
    max_length: Literal["error", "drop", "cut"] = "error"
    """a sample longer than a row: stop, leave it out, or keep its beginning up to the last whole turn that fits"""
    add_tokens: bool = False
    """add the control tokens of the template that the tokenizer lacks to it, and rows for them to the model"""


@dataclass(frozen=True)
class Asked:
    """What a run asks of a source."""

    tokenizer: Tokenizer
    cache_dir: Path
    seq_len: int
    seed: int
    """Of the order."""
    held_out: bool = False
    """Whether its rows are for validation; they depend on no seed then."""
    split: Split | None = None
    """Only this side of its documents or samples."""
    packing: PackingName | None = None
    """`data.packing`."""
    chat: ChatOptions = field(default_factory=ChatOptions)
    source_len: int | None = None
    """Positions of a row for what the encoder reads; None: the run's model has no encoder."""
    pair_max_length: MaxLength = "error"
    """`pair.max_length`."""
    labels: LabelOptions | None = None
    """What the run's model predicts of whole texts, or of rows of values; None: nothing."""
    values: "ValueOptions | None" = None
    """How the run's model reads values; None: it does not."""
    tokenizer_path: str | None = None
    """Where the tokenizer came from, with its template."""
    threads: int = 1
    vision: "VisionArgs | None" = None
    """How the run's model reads images; None: it cannot."""
    images: ImageOptions = ImageOptions()
    """Which of them are read."""


@dataclass(frozen=True)
class Opened:
    """A source that is ready to be read."""

    rows: RowSource
    given: str
    """What its user calls it."""
    notes: tuple[str, ...] = ()
    """Lines for people about what it was made of."""
    digests: Callable[[], Iterator[NDArray[np.uint64]]] | None = None
    """Digests of its documents or samples, by which those that are trained on and held out are found."""
    given_whole: bool = False
    """Whether single documents could not be left out of it."""
    verify: Callable[[], None] | None = None
    """Checks all of its content, on one process before the run begins. UserError naming what is damaged."""


class Kind(ABC):
    """A kind of data."""

    name: str
    packings: tuple[PackingName, ...]
    """What `data.packing` may be for it, what it is by default first."""

    def check(self, files: SourceFiles) -> None:  # noqa: B027
        """UserError where the source cannot be of this kind, by its keys and the names of its files alone."""

    def look(self, files: SourceFiles, asked: Asked) -> None:  # noqa: B027
        """For a dry run: UserError where its first rows cannot be read; nothing is written."""

    def prepare(self, files: SourceFiles, asked: Asked) -> None:  # noqa: B027
        """What must be done once before all ranks open it, as writing into asked.cache_dir; one process does it."""

    @abstractmethod
    def open(self, files: SourceFiles, asked: Asked) -> Opened:
        """The rows, on every rank alike. UserError naming the file that is missing or damaged."""

    def packing(self, asked: Asked) -> PackingName:
        """How its rows are made of what it reads."""
        return asked.packing if asked.packing in self.packings else self.packings[0]


KINDS: dict[str, Kind] = {}
"""By name."""


def register(kind: Kind) -> None:
    """Make a kind of data known by its name. ValueError where the name is taken."""
    if kind.name in KINDS:
        raise ValueError(f"a kind of data is called {kind.name} already")
    KINDS[kind.name] = kind


def cached(spec: SourceSpec, cache_dir: Path, parts: list[object]) -> Path:
    """The folder in the cache for what is made of a source, `parts` being all that it depends on."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()
    return cache_dir / f"{spec.cache_name()}-{digest}"
