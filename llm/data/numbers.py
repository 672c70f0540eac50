"""Numbers as raw rows have them: a list of numbers, a list of lists, or the cells of several columns.

Shapes: n positions, F numbers of each.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm.data.json_rows import called
from llm.data.labels import finite, is_missing, shown_value
from llm.errors import UserError

LARGEST = float(np.finfo(np.float32).max)
Floats = NDArray[np.float32]


def values_of(value: Any, name: str, width: int, columns: Sequence[str] = ()) -> Floats:
    """(n, F) float32 of what a row has: a list of lists of F numbers; a list of numbers, which are a position each
    where F is 1, and else one position; or a single number. UserError saying what is wrong with it, `name` being its
    column. columns: what the items of the list are called, where each was a cell of its own.
    """
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        value = [value]
    if not len(value):
        raise UserError(f"its {name} is empty, where numbers must be")
    nested = [isinstance(inner, Sequence) and not isinstance(inner, str | bytes) for inner in value]
    if not any(nested):
        if width != 1 and len(value) != width:
            raise UserError(
                f"its {name} has {len(value)} numbers, and model.input_dim={width}: give so many, or a list of lists "
                f"of so many"
            )
        return _numbers(value, f"its {name}", columns).reshape(-1, width)
    for place, (inner, is_list) in enumerate(zip(value, nested, strict=True), 1):
        if not is_list:
            raise UserError(f"its {name}: position {place} is {shown_value(inner)}, where a list of numbers must be")
        if len(inner) != width:
            raise UserError(f"its {name}: position {place} has {len(inner)} numbers, and model.input_dim={width}")
    rows = [_numbers(inner, f"its {name}: position {place}") for place, inner in enumerate(value, 1)]
    return np.stack(rows)


def _numbers(values: Sequence[Any], where: str, columns: Sequence[str] = ()) -> Floats:
    """(n,) of so many numbers, or texts of them. UserError naming the first that is none, by its column if it has one.
    """
    if {type(value) for value in values} <= {int, float}:
        try:
            whole = np.array(values, dtype=np.float64)
        except OverflowError:
            whole = np.array([math.inf])
        if bool((np.abs(whole) <= LARGEST).all()):
            return whole.astype(np.float32)
    found = np.empty(len(values), dtype=np.float32)
    for place, value in enumerate(values):
        try:
            found[place] = _number(value)
        except ValueError as error:
            name = f"its {columns[place]}" if columns else f"{where}: number {place + 1}"
            raise UserError(f"{name} is {error}") from None
    return found


def _number(value: Any) -> float:
    """ValueError with what it is instead."""
    if is_missing(value):
        raise ValueError(f"missing ({'nan' if value is not None else 'null'})")
    if isinstance(value, list | dict):
        raise ValueError(f"{called(value)}, where a number must be")
    try:
        return finite(value)
    except ValueError as error:
        raise ValueError(f"{shown_value(value)}, {error}") from None
