"""What a checkpoint says of the parameters that its run does not train, and so does not hold: their shapes, and where
their values came from.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llm.boxes import Box
from llm.checkpoint.reader import MANIFEST, Checkpoint
from llm.checkpoint.weights import Weights
from llm.errors import DamagedFile
from llm.parallel.build import drawn
from llm.parameters import ParameterTable


@dataclass(frozen=True)
class Seed:
    """Values as they are drawn."""

    seed: int

    def to_json(self) -> dict[str, Any]:
        return {"seed": self.seed}


@dataclass(frozen=True)
class Taken:
    """Values read from another folder."""

    path: str
    """Of the checkpoint, model folder or foreign folder."""
    digest: str
    """Of all its weights."""

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "digest": self.digest}


Origin = Seed | Taken


def origin_of(said: Mapping[str, Any]) -> Origin:
    """What `to_json` gave."""
    return Seed(int(said["seed"])) if "seed" in said else Taken(str(said["path"]), str(said["digest"]))


@dataclass(frozen=True)
class Frozen:
    """The parameters that a checkpoint does not hold."""

    patterns: tuple[str, ...]
    """`train.freeze`."""
    shapes: Mapping[str, tuple[int, ...]]
    origin: Origin

    def to_json(self) -> dict[str, Any]:
        """For the checkpoint's meta."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return {"patterns": list(self.patterns), "shapes": shapes, "from": self.origin.to_json()}


def frozen_in(checkpoint: Checkpoint) -> Frozen | None:
    """What the checkpoint lacks because its run does not train it; None where it holds a whole model."""
    said = checkpoint.meta.get("frozen")
    if said is None:
        return None
    try:
        shapes = {str(name): tuple(int(n) for n in shape) for name, shape in said["shapes"].items()}
        return Frozen(tuple(map(str, said["patterns"])), shapes, origin_of(said["from"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DamagedFile(f"{checkpoint.path / MANIFEST}: damaged: meta.frozen makes no sense") from None


class Drawn:
    """The initial values of a model."""

    def __init__(self, table: ParameterTable, seed: int) -> None:
        self.read = drawn(table, seed)


class Completed:
    """What a run has trained, and what it has not, from where that came from."""

    def __init__(self, trained: Weights, frozen: Set[str], origin: Weights) -> None:
        self._trained, self._frozen, self._origin = trained, frozen, origin

    def read(self, name: str, box: Box, out: Tensor) -> Tensor:
        return (self._origin if name in self._frozen else self._trained).read(name, box, out)
