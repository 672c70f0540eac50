"""What is learned of labels from all training rows together: the classes and their places, how values are scaled.

It depends on the rows alone, in the order of the sources in the config and of the rows in these, and on no layout.

Shapes: n samples, L labels of one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llm.data.labelled_rows import LabelledRows
from llm.data.rows import RowSource
from llm.errors import UserError

FEW = 10
"""Names that a message lists."""


@dataclass(frozen=True)
class Scaling:
    """Of each label: what is taken from it, and what the rest is divided by."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def labelled_in(sources: Sequence[RowSource]) -> list[LabelledRows]:
    """Those of some sources that have labels."""
    return [source for source in sources if isinstance(source, LabelledRows)]


def scaling(sources: Sequence[LabelledRows]) -> Scaling:
    """Mean and standard deviation (of all, n in the denominator; 1 where all labels are the same) of each label over
    the samples that have it, in float64. UserError naming a label that none has.
    """
    labels_nL = np.concatenate([source.labels_kept() for source in sources]).astype(np.float64)
    names = sources[0].labels.names
    mean, std = [], []
    for name, column_n in zip(names, labels_nL.T, strict=True):
        known = column_n[~np.isnan(column_n)]
        if not len(known):
            raise UserError(f"{sources[0].given}: no row has the label {name!r}, so it cannot be learned")
        mean.append(float(known.mean()))
        deviation = float(known.std())
        std.append(deviation if deviation > 0 else 1.0)
    return Scaling(tuple(mean), tuple(std))


def scaling_of(parts: Sequence[NDArray[np.float32]]) -> Scaling:
    """Mean and standard deviation, as of `scaling`, of each column of (n, F) values, in float64."""
    n = sum(len(part) for part in parts)
    mean = sum(part.sum(0, dtype=np.float64) for part in parts) / n
    std = np.sqrt(sum(np.square(part - mean).sum(0) for part in parts) / n)
    varies = np.max([part.max(0) for part in parts], 0) > np.min([part.min(0) for part in parts], 0)
    return Scaling(tuple(mean.tolist()), tuple(np.where(varies, std, 1.0).tolist()))


def classes_in(sources: Sequence[LabelledRows]) -> list[str]:
    """The classes that there are, in the order in which they come up."""
    return list(dict.fromkeys(name for source in sources for name in source.labels.classes))


def class_names(sources: Sequence[LabelledRows], n: int) -> tuple[str, ...]:
    """The n classes in the order of their places: the integers from 0 where all of the training rows' are integers,
    else their names, sorted. UserError naming file and row of one too many.
    """
    found = classes_in(sources)
    if all(name.lstrip("-").isdecimal() for name in found):
        names = tuple(map(str, range(n)))
        check_classes(sources, names)
        return names
    if len(found) > n:
        raise UserError(f"{_where(sources, found[n])}: has the class {found[n]!r}, number {n + 1} of them where "
                        f"model.n_prediction={n}; before it came {_listed(found[:n])}")  # fmt: skip
    if len(found) < n:
        raise UserError(
            f"{sources[0].given}: the classes of the training rows are {_listed(found)}, which are {len(found)}, and "
            f"model.n_prediction={n}; where there are others, model.prediction_names names all"
        )
    return tuple(sorted(found))


def check_classes(sources: Sequence[LabelledRows], names: Sequence[str]) -> None:
    """UserError naming file and row of the first sample whose class is none of these."""
    for source in sources:
        for name in source.labels.classes:
            if name not in names:
                known = f"classes that are integers go from 0 to {len(names) - 1} (model.n_prediction={len(names)})"
                if list(names) != [str(i) for i in range(len(names))]:
                    known = f"the model knows {_listed(sorted(names))}"
                raise UserError(f"{_where([source], name)}: has the class {name!r}; {known}")


def _where(sources: Sequence[LabelledRows], name: str) -> str:
    """File and row of the first sample of a class."""
    for source in sources:
        if name in source.labels.classes:
            place = source.labels.classes.index(name)
            (numbers,) = np.nonzero(source.source.labels()[:, 0] == place)
            origin = source.source.origin(int(numbers[0]))
            return f"{source.given}: {origin.file}, row {origin.row}"
    raise KeyError(name)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:FEW])) + (", ..." if len(names) > FEW else "")
