"""Lattice: large transformer models, trained on any parallel layout with one answer.

LLM and ModelArgs are imported when they are first asked for: `lattice --help` is to be there before torch would be.
"""

from typing import TYPE_CHECKING, Any

import llm.installed  # noqa: F401  (first: it says in one line which package is missing)

if TYPE_CHECKING:
    from llm.args import ModelArgs
    from llm.model import LLM

__all__ = ["LLM", "ModelArgs"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from llm.model import LLM

        return LLM
    if name == "ModelArgs":
        from llm.args import ModelArgs

        return ModelArgs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
