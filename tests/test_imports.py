"""Imports run one way: each room imports rooms above it in the list, and no two modules need each other."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    # what anything may use
    "errors", "installed", "shipped", "malloc", "environment", "signals", "paths", "screen", "atomic", "boxes",
    "safetensors_file", "scorers", "prediction_scores",
    # what a model is, and the model
    "args", "init", "kernels", "datatypes", "layers", "parameters", "flops", "recompute", "batch", "cache", "row_cache",
    "conveniences", "value_methods", "contexts", "embeds", "heads", "sides", "model", "compile", "generation.sampling",
    "decoder", "generation.beams", "generate", "objectives", "surgery",
    # files, and many ranks
    "adapters.int8", "tokenizers", "tokenizer", "data.json_rows", "data.sample", "data.image_source",
    "data.conversation", "tokenizers.chat", "data", "parallel", "plan", "checkpoint", "foreign", "adapters",
    "pretrained", "export",
    # what users ask for
    "generation", "evaluate", "tasks", "extensions", "cli", "report", "train", "siblings", "jobs", "runs",
    "command", "__main__",
)  # fmt: skip
"""A room is a module or a package of llm; it may import those before it."""
LATE = {"llm.conveniences", "llm.layers.foreign_names"}
"""The deliberate exceptions: methods of LLM that read and write files, and the loading of a state dict, whose names may
be foreign, need what knows models; they import it when called."""


def modules() -> dict[str, Path]:
    """All modules of llm by name."""
    found = {}
    for path in sorted((ROOT / "llm").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = modules()


def imports(tree: ast.AST, late: bool = False) -> Iterator[tuple[str, bool]]:
    """(module, whether inside a function) that a file imports when it runs; not those for the type checker alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in FILES else node.module), late
        else:
            yield from imports(node, late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


GRAPH = {name: list(dict.fromkeys(imports(ast.parse(path.read_text())))) for name, path in FILES.items()}


def room(module: str) -> str:
    """The longest entry of ROOMS that holds a module."""
    inside = module.removeprefix("llm.")
    held = [name for name in ROOMS if inside == name or inside.startswith(f"{name}.")]
    assert held, f"{module} is in no room; tests/test_imports.py lists them from the ground up"
    return max(held, key=len)


@pytest.mark.parametrize("module", [name for name in GRAPH if name != "llm"])
def test_a_module_imports_only_rooms_before_its_own(module: str) -> None:
    own = ROOMS.index(room(module))
    for imported, late in GRAPH[module]:
        if imported.split(".")[0] in ("launch", "tools", "tests"):
            raise AssertionError(f"{module} imports {imported}")
        if imported.startswith("llm.") and not (late and module in LATE):
            assert ROOMS.index(room(imported)) <= own, f"{module} imports {imported}, whose room comes later"


def test_no_modules_import_each_other_in_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        for imported, late in GRAPH.get(module, []):
            if not (late and module in LATE):
                visit(imported, (*path, module))
        done.add(module)

    for module in GRAPH:
        if module != "llm":
            visit(module, ())


@pytest.mark.parametrize("module", ["llm.layers", "llm.model", "llm.kernels", "llm.cache"])
def test_layers_and_the_model_know_no_ranks_files_or_families(module: str) -> None:
    for name, found in GRAPH.items():
        if name == module or name.startswith(f"{module}."):
            for imported, _ in found:
                assert imported.split(".")[0] not in ("deepspeed", "fairscale", "safetensors"), (name, imported)
