"""The files of a finished evaluation: results.json and samples/TASK.jsonl, which are the same bytes whatever the ranks,
batches and folders of the model, and run.json, which says how and on what they were made.
"""

import json
import math
import os
import platform
import socket
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from llm.atomic import write_file
from llm.errors import UserError

RESULTS, SAMPLES, RUN = "results.json", "samples", "run.json"


def write_results(output: Path, model: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> None:
    """Write results.json. model: what identifies it; results: of each task, by name."""
    _write(output / RESULTS, _text({"model": model, "results": results}, indent=1))


def write_samples(output: Path, task: str, samples: Iterable[Mapping[str, Any]]) -> None:
    """Write samples/TASK.jsonl, a line a document."""
    _write(output / SAMPLES / f"{task}.jsonl", "".join(_text(sample) for sample in samples))


def write_run(output: Path, facts: Mapping[str, Any]) -> None:
    """Write run.json: these facts, and of this machine and these versions."""
    content = {"time": time.strftime("%Y-%m-%d %H:%M:%S %z"), **facts, "hardware": hardware(), "versions": versions()}
    _write(output / RUN, _text(content, indent=1))


def _text(value: Any, indent: int | None = None) -> str:
    """Strict JSON: what is no finite number, as the score of nothing, is null."""
    return json.dumps(_finite(value), ensure_ascii=False, indent=indent, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def _write(file: Path, text: str) -> None:
    try:
        write_file(file, text.encode(errors="surrogatepass"))
    except OSError as error:
        raise UserError(
            f"{file}: cannot be written ({error.strerror}); the same command goes on from the journal"
        ) from None


def hardware() -> dict[str, Any]:
    """What this machine computes with."""
    found: dict[str, Any] = {"host": socket.gethostname(), "processor": _processor(), "cores": _cores()}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Of Python and what computes."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": metadata.version("numpy")}
