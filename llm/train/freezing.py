"""Which parameters of a run train: all but those that `train.freeze` names."""

from difflib import get_close_matches
from fnmatch import fnmatchcase

from llm.checkpoint.frozen import Origin, Taken
from llm.errors import UserError
from llm.parameters import ParameterTable
from llm.train.config import RunConfig

NEAREST = 3
"""Names that a line proposes."""


def parameter_table(config: RunConfig) -> ParameterTable:
    """The rows of the run's model, which needs a vocabulary. UserError where a pattern of `train.freeze` names nothing,
    or nothing is left to train.
    """
    patterns = config.train.freeze
    table = ParameterTable.of(config.model)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in table):
            near = get_close_matches(pattern, table, n=NEAREST, cutoff=0.0)
            raise UserError(f"train.freeze: no parameter is named {pattern!r}; the nearest are {', '.join(near)}")
    if not patterns:
        return table
    frozen = table.frozen(patterns)
    if not any(row.trainable for row in frozen.values()):
        raise UserError(f"train.freeze={list(patterns)} names every parameter, so nothing is left to train")
    return frozen


def frozen_notes(table: ParameterTable, origin: Origin | None) -> list[str]:
    """A line about what a run does not train, if there is anything, and where that came from."""
    total = sum(row.numel for row in table.values())
    frozen = sum(row.numel for row in table.values() if not row.trainable)
    if not frozen:
        return []
    place = f"read from {origin.path}" if isinstance(origin, Taken) else "as drawn"
    return [f"train.freeze leaves out {frozen:,} of {total:,} parameters, {place}"]
