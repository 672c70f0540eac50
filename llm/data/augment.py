"""Other ways to write a text that mean the same, drawn anew each time a training sample is read, by name.

What is drawn depends on the seed, the pass over the data and the sample alone. To add one: a subclass of `Augmentation`
in a file of your own, `register(augmentation)` at the end of it, the file under `extensions` and `augment: NAME` at a
source of kind labelled.
"""

from abc import ABC, abstractmethod

import numpy as np

from llm.data.order import round_keys
from llm.errors import UserError


class Augmentation(ABC):
    """A way to write texts anew."""

    name: str
    fingerprint: object = 1
    """All that decides what is made of a text besides the draw, as JSON can hold it."""

    def check(self) -> None:  # noqa: B027 - many need nothing
        """UserError where what it needs is not installed; asked before the run begins."""

    @abstractmethod
    def written(self, text: str, draw: np.random.Generator) -> str:
        """The text in another way; as it is where there is none."""


AUGMENTATIONS: dict[str, Augmentation] = {}
"""By name."""


def register(augmentation: Augmentation) -> None:
    """Make an augmentation known by its name. ValueError where the name is taken."""
    if augmentation.name in AUGMENTATIONS:
        raise ValueError(f"an augmentation is called {augmentation.name} already")
    AUGMENTATIONS[augmentation.name] = augmentation


def augmentation_named(name: str, key: str) -> Augmentation:
    """The augmentation of a name, which stands under `key`. UserError with the known ones where there is none."""
    if name not in AUGMENTATIONS:
        known = f"known are {', '.join(sorted(AUGMENTATIONS))}" if AUGMENTATIONS else "none is known"
        raise UserError(f"{key}={name}: no such augmentation; {known}")
    return AUGMENTATIONS[name]


def draw_of(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """What a sample's text is drawn by in a pass over the data."""
    return np.random.Generator(np.random.Philox(key=round_keys(seed, "augment", epoch, sample)[:2]))
