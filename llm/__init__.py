"""Lattice: large transformer models, trained on any parallel layout with one answer."""

from llm.args import ModelArgs
from llm.model import LLM

__all__ = ["LLM", "ModelArgs"]
