"""Graphs as files: a folder with the graph, its weights, and `export.json`, which says what goes in and what comes out.

The folder appears whole or not at all.
"""

import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from llm.atomic import new_directory
from llm.errors import UserError
from llm.export.check import Runner, largest_difference
from llm.export.graphs import Graph, Port, Ports, most_tokens, sized
from llm.export.kinds import What, graph_of
from llm.model import LLM
from llm.paths import check_free
from llm.tokenizer import Tokenizer

Format = Literal["onnx", "torch"]
NAMES: Mapping[Format, str] = {"onnx": "model.onnx", "torch": "model.pt2"}
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""Of the extra `export`."""
ALONE = 1 << 30
"""Bytes of weights from which an ONNX file has them beside it: a file holds no more than 2 GiB."""
EXAMPLE = {"batch": 2, "length": 3, "past": 5, "source": 7}
"""Sizes of the inputs that a graph is traced with; none is 0 or 1, and no two are the same, so that none is taken for
a constant or for another."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    nbytes: int
    """Of the files with the graph and its weights."""
    difference: float | None
    """The largest between the graph's numbers and the model's; None where that was not looked at."""


def export_model(
    model: LLM,
    folder: str | Path,
    *,
    format: Format = "onnx",
    what: What = "llm",
    tokenizer: Tokenizer | None = None,
    check: bool = False,
    about: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a graph of the model into a new folder. check: compare its numbers with the model's before it is there, at
    three lengths and two batch sizes. about: what else export.json is to say, such as where the model came from.

    UserError where the model or a part of it cannot be exported, a package is missing, the folder is there already, or
    the numbers differ.
    """
    target = Path(folder)
    check_free(target)
    if format == "onnx":
        refuse_without_packages()
    graph = graph_of(model, what)
    program = program_of(graph)
    with new_directory(target) as temporary:
        opset = None
        if format == "onnx":
            opset = _write_onnx(graph, program, temporary / NAMES[format])
        else:
            torch.export.save(program, temporary / NAMES[format])
        difference = largest_difference(model, graph, runner_of(temporary, format, graph)) if check else None
        files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        made_with = {name: version(name) for name in ("torch", *(PACKAGES if format == "onnx" else ()))}
        said = {
            "format": format,
            "opset": opset,
            "what": what,
            "files": list(files),
            "inputs": _ports(graph.inputs),
            "outputs": _ports(graph.outputs),
            "most_tokens": most_tokens(model.args),
            "tokenizer": None if tokenizer is None else _of_tokenizer(tokenizer),
            "largest_difference": difference,
            "model": model.args.model_dump(mode="json", exclude_unset=True),
            "made_with": made_with,
            **(about or {}),
        }
        (temporary / "export.json").write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return Exported(target, sum(files.values()), difference)


def refuse_without_packages() -> None:
    """UserError where a package is missing that writes or runs ONNX."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"ONNX needs {', '.join(missing)}, of the extra `export`: `make export` makes .venv-export with it; "
            f"use .venv-export/bin/python, or --format torch, which needs nothing more"
        )


@torch.no_grad()
def program_of(graph: Graph) -> ExportedProgram:
    """The graph as torch.export has it, its named sizes free."""
    longest = most_tokens(graph.args)
    sizes = {
        "batch": Dim("batch", min=1),
        "length": Dim("length", min=1) if longest is None else Dim("length", min=1, max=longest),
        "past": Dim("past", min=0),
        "source": Dim("source", min=1) if longest is None else Dim("source", min=1, max=longest),
    }
    free = tuple(
        {i: sizes[size] for i, size in enumerate(port.shape) if isinstance(size, str)}
        for port in graph.inputs.values()
    )
    example = tuple(_example(name, port) for name, port in graph.inputs.items())
    with _quiet():
        return torch.export.export(graph, example, dynamic_shapes=free)


def _example(name: str, port: Port) -> Tensor:
    shape = sized(port.shape, EXAMPLE)
    if "positions" in name:
        return torch.arange(shape[1]).expand(shape).contiguous()
    return torch.zeros(shape, dtype=port.dtype)


def _write_onnx(graph: Graph, program: ExportedProgram, path: Path) -> int:
    """Write the file, and one with weights beside it where they are large; the version of ONNX's operators."""
    names = [*graph.inputs]
    sizes = {name: {i: size for i, size in enumerate(port.shape) if isinstance(size, str)}
             for name, port in graph.inputs.items()}  # fmt: skip
    with _quiet():
        made = torch.onnx.export(
            program,
            input_names=names,
            output_names=[*graph.outputs],
            dynamic_shapes=sizes,
            dynamo=True,
            verbose=False,
        )
        assert made is not None
        weights = sum(parameter.nbytes for parameter in graph.parameters())
        made.save(path, external_data=weights >= ALONE)
    return int(made.model.opset_imports[""])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of itself: packages that it does not find, and functions that it will drop."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def runner_of(folder: Path, format: Format, graph: Graph) -> Runner:
    """What runs a written graph: onnxruntime on the CPU, or torch."""
    if format == "torch":
        module = torch.export.load(folder / NAMES[format]).module()

        def run(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found = module(*(given[name] for name in graph.inputs))
            return dict(zip(graph.outputs, (found,) if isinstance(found, Tensor) else found, strict=True))

        return run
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / NAMES[format]), providers=["CPUExecutionProvider"])

    def run_onnx(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = session.run([*graph.outputs], {name: given[name].numpy() for name in graph.inputs})
        return {name: torch.from_numpy(array) for name, array in zip(graph.outputs, found, strict=True)}

    return run_onnx


def _ports(ports: Ports) -> list[dict[str, Any]]:
    return [
        {"name": name, "dtype": str(port.dtype).removeprefix("torch."), "shape": list(port.shape)}
        for name, port in ports.items()
    ]


def _of_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}
