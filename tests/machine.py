"""What this machine cannot do is asked of its device, as a run asks it, and skipped alone and by name."""

from functools import cache
from typing import Any

import pytest

from llm.parallel.precision import has_arithmetic

has = cache(has_arithmetic)


def needs(precision: str) -> None:
    """Skip this test where the device lacks the precision."""
    if not has(precision):
        pytest.skip(f"this device has no {precision} arithmetic")


def possible(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cases whose `precision` (fp32 where none is given) this device has."""
    return [case for case in cases if has(case.get("precision", "fp32"))]
