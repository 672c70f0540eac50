"""On PYTHONPATH, this makes DeepSpeed's accelerator answer that the CPU has neither fp16 nor bf16 arithmetic, in every
process that is started: with ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA it stands for a plain CPU (tests/slices.toml).
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ACCELERATOR = "deepspeed.accelerator.cpu_accelerator"


class _PlainAccelerator(MetaPathFinder):
    """Finds the accelerator's module as anyone else does, and changes two of its answers once it is loaded."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != ACCELERATOR:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            module.CPU_Accelerator.is_fp16_supported = lambda self: False
            module.CPU_Accelerator.is_bf16_supported = lambda self: False

        spec.loader.exec_module = load_and_change  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _PlainAccelerator())
