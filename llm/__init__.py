"""Lattice: large transformer models, trained on any parallel layout with one answer."""

import llm.installed  # noqa: F401  (first: it says in one line which package is missing)
from llm.args import ModelArgs
from llm.foreign import load as _load  # noqa: F401  (so that load_state_dict takes foreign names)
from llm.model import LLM

__all__ = ["LLM", "ModelArgs"]
