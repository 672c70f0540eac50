"""The blocks of a model through torch.compile, for training.

A block becomes a few graphs with attention and the experts' work between them, uncompiled: those follow the documents
of a batch and the choices of its tokens (llm/kernels/graph_breaks.py). So how documents are packed compiles nothing
anew; a new shape does so twice at most for each kind of layer, as the second one is compiled for all sizes (and sizes
of 1 once more).
"""

import os
import shutil
import sys

import torch

from llm.errors import UserError
from llm.kernels.graph_breaks import keep_graph_breaks
from llm.layers.block import Block
from llm.model import LLM


def compile_blocks(model: LLM, backend: str = "inductor") -> None:
    """Compile the model's blocks, the vision tower's too, at their first use; modules and names of parameters stay.

    Results differ from uncompiled ones by rounding. Forwards without gradients (validation, generation) run uncompiled:
    their shapes change too often. Raises UserError where this machine has no compiler for the code of the graphs.
    """
    if backend == "inductor":
        check_compiler(next(model.parameters()).device.type)
    keep_graph_breaks()
    for name, module in model.named_modules():
        if isinstance(module, Block):
            model.compiled[name] = torch.compile(module, backend=backend)


def check_compiler(device_type: str) -> None:
    """UserError without a compiler: on a CPU graphs become C++; on a GPU Triton builds a C launcher for its kernels."""
    if device_type == "cpu":
        variable, names = "CXX", ["clang++" if sys.platform == "darwin" else "g++"]
    else:
        variable, names = "CC", ["gcc", "clang"]
    names = os.environ.get(variable, "").split()[:1] or names
    if not any(shutil.which(name) for name in names):
        raise UserError(
            f"train.compile=true needs a compiler, but {' or '.join(names)} is not installed; name another in the "
            f"environment variable {variable}, or use train.compile=false"
        )
