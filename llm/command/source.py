"""What functions and config sections say of themselves, read from their sources without importing them.

Importing a script imports torch, which takes seconds; `--help` is to be there at once. What is read here is what
llm/cli.py and llm/train/config/flags.py print after an import (tests/command/test_help.py compares them).
"""

import ast
import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llm import shipped

ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.LShift: operator.lshift,
}  # fmt: skip
"""Of numbers in defaults, as 64 << 20."""
REQUIRED = object()
"""The default of what has none."""


@dataclass(frozen=True)
class Flag:
    """A parameter of a function, or a field of a dataclass, as a flag."""

    name: str
    kind: str
    default: Any


@dataclass(frozen=True)
class Signature:
    """A function's or dataclass's docstring and flags."""

    doc: str
    flags: tuple[Flag, ...]


class Module:
    """A source file, and what its names stand for."""

    def __init__(self, path: Path) -> None:
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self._imported: dict[str, tuple[str, str]] = {}
        self._own: dict[str, ast.AST] = {}
        for node in self.tree.body:
            if isinstance(node, ast.ImportFrom) and node.module:
                self._imported |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                self._own[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self._own[node.targets[0].id] = node.value
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                self._own[node.target.id] = node.value

    def find(self, name: str) -> "tuple[Module, ast.AST] | None":
        """(the module that has it, what it is there); None for what is built in or another project's."""
        if name in self._own:
            return self, self._own[name]
        if name in self._imported:
            module, original = self._imported[name]
            file = _file_of(module)
            return None if file is None else read(file).find(original)
        return None

    def class_(self, name: str) -> "tuple[Module, ast.ClassDef] | None":
        """The same for a class alone."""
        found = self.find(name)
        return (found[0], found[1]) if found is not None and isinstance(found[1], ast.ClassDef) else None


@cache
def read(path: Path) -> Module:
    """The module in a file, parsed once."""
    return Module(path)


def _file_of(module: str) -> Path | None:
    first, *parts = module.split(".")
    if first not in ("llm", "vision", "tools"):
        return None
    base = (shipped.root() if first == "tools" else shipped.PACKAGE.parent).joinpath(first, *parts)
    file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    return file if file.is_file() else None


def _at(place: str) -> tuple[Module, ast.AST]:
    """What FILE:NAME is."""
    path, _, name = place.partition(":")
    home = shipped.PACKAGE.parent if path.startswith("llm/") else shipped.root()
    found = read(home / path).find(name)
    if found is None:
        raise LookupError(place)
    return found


def signature(place: str) -> Signature:
    """Of the function or dataclass at FILE:NAME."""
    module, node = _at(place)
    if isinstance(node, ast.ClassDef):
        fields = [(part.target.id, part.annotation, part.value) for part in _fields(node)]
    else:
        assert isinstance(node, ast.FunctionDef)
        given = node.args
        early = given.posonlyargs + given.args
        none: list[ast.expr | None] = [None] * (len(early) - len(given.defaults))
        pairs = list(zip(early, [*none, *given.defaults], strict=True))
        pairs += list(zip(given.kwonlyargs, given.kw_defaults, strict=True))
        fields = [(argument.arg, argument.annotation, default) for argument, default in pairs]
    flags = []
    for name, annotation, given_default in fields:
        default = REQUIRED if given_default is None else value(module, given_default)
        flags.append(Flag(name.removesuffix("_"), kind_of(module, annotation), default))
    return Signature(inspect.cleandoc(ast.get_docstring(node) or ""), tuple(flags))


def table(place: str) -> dict[str, str]:
    """The dict of texts at FILE:NAME."""
    return dict(ast.literal_eval(_at(place)[1]))


def _fields(node: ast.ClassDef) -> "list[Any]":
    return [part for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)]


def kind_of(module: Module, annotation: ast.expr | None) -> str:
    """A type as llm/cli.py names it."""
    if isinstance(annotation, ast.Name):
        found = module.find(annotation.id)
        if found is None or isinstance(found[1], ast.ClassDef):
            return annotation.id
        return kind_of(found[0], found[1])  # type: ignore[arg-type]
    if isinstance(annotation, ast.Constant) and annotation.value is None:
        return "None"
    if isinstance(annotation, ast.BinOp):
        return f"{kind_of(module, annotation.left)} | {kind_of(module, annotation.right)}"
    if isinstance(annotation, ast.Subscript):
        name = ast.unparse(annotation.value).rpartition(".")[2]
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        if name == "Literal":
            return " | ".join(ast.literal_eval(word) for word in inner)
        if name == "Annotated":
            return kind_of(module, inner[0])
        return f"{name}[{', '.join(kind_of(module, one) for one in inner)}]"
    return "..." if annotation is None else ast.unparse(annotation).replace("Ellipsis", "...")


def value(module: Module, node: ast.expr) -> Any:
    """What a default is, as far as a source says it: constants, names of them, fields of an object made without
    arguments; else its text."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        pass
    if isinstance(node, ast.Name) and (found := module.find(node.id)) is not None and isinstance(found[1], ast.expr):
        return value(found[0], found[1])
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        made = module.find(node.value.id)
        if made is not None and isinstance(made[1], ast.Call) and isinstance(made[1].func, ast.Name):
            of = made[0].class_(made[1].func.id)
            for part in _fields(of[1]) if of is not None else ():
                if part.target.id == node.attr and part.value is not None:
                    return value(of[0], part.value)  # type: ignore[index]
    if isinstance(node, ast.BinOp) and (operation := ARITHMETIC.get(type(node.op))) is not None:
        left, right = value(module, node.left), value(module, node.right)
        if isinstance(left, int | float) and isinstance(right, int | float):
            return operation(left, right)
    return ast.unparse(node)


@dataclass(frozen=True)
class Key:
    """A key of the run config."""

    name: str
    about: str
    default: Any


def keys(place: str, prefix: str = "") -> list[Key]:
    """Every dotted key of the config section at FILE:NAME that has a value."""
    module, node = _at(place)
    assert isinstance(node, ast.ClassDef)
    return list(_keys(module, node, prefix))


def _keys(module: Module, node: ast.ClassDef, prefix: str) -> Iterator[Key]:
    for home, part, about in _all_fields(module, node):
        name = prefix + part.target.id
        section, has_forms = _section(home, part.annotation)
        default = REQUIRED if part.value is None else _default(home, part.value)
        if section is None:
            yield Key(name, about, default)
            continue
        if has_forms:
            yield Key(name, about, REQUIRED)
        yield from _keys(*section, f"{name}.")


def _all_fields(module: Module, node: ast.ClassDef) -> list[tuple[Module, Any, str]]:
    """(module, field, the text under it) of a class and those that it comes from, the oldest first; a field given anew
    keeps its place."""
    found: dict[str, tuple[Module, Any, str]] = {}
    for base in node.bases:
        of = module.class_(base.id) if isinstance(base, ast.Name) else None
        if of is not None:
            found |= {part[1].target.id: part for part in _all_fields(*of)}
    for part, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(part, ast.AnnAssign) or not isinstance(part.target, ast.Name):
            continue
        if "ClassVar" in ast.unparse(part.annotation):
            continue
        said = ast.literal_eval(after.value) if isinstance(after, ast.Expr) else ""
        found[part.target.id] = (module, part, inspect.cleandoc(said))
    return list(found.values())


def _section(module: Module, annotation: ast.expr) -> tuple[tuple[Module, ast.ClassDef] | None, bool]:
    """(the section that a field holds, whether it takes other forms too)."""
    found, other = None, False
    forms = [annotation]
    while forms:
        form = forms.pop()
        if isinstance(form, ast.BinOp):
            forms += [form.left, form.right]
            continue
        if isinstance(form, ast.Constant) and form.value is None:
            continue
        section = next(_sections(module, form), None)
        found, other = found or section, other or section is None
    return found, other and found is not None


def _sections(module: Module, node: ast.AST) -> Iterator[tuple[Module, ast.ClassDef]]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            found = module.find(inner.id)
            if found is None:
                continue
            if isinstance(found[1], ast.ClassDef):
                if _is_section(*found):  # type: ignore[arg-type]
                    yield found  # type: ignore[misc]
            elif isinstance(found[1], ast.expr) and not isinstance(found[1], ast.Call):
                yield from _sections(*found)


def _is_section(module: Module, node: ast.ClassDef) -> bool:
    for base in node.bases:
        if isinstance(base, ast.Name):
            of = module.class_(base.id)
            if base.id == "BaseModel" or (of is not None and _is_section(*of)):
                return True
    return False


def _default(module: Module, node: ast.expr) -> Any:
    """Of a field; what pydantic's Field has first, or by name."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Field":
        named = {word.arg: word.value for word in node.keywords}
        if node.args:
            node = node.args[0]
        elif "default" in named:
            node = named["default"]
        elif "default_factory" in named:
            factory = ast.unparse(named["default_factory"])
            return {"dict": {}, "list": [], "tuple": ()}.get(factory, factory)
        else:
            return REQUIRED
    return REQUIRED if isinstance(node, ast.Constant) and node.value is Ellipsis else value(module, node)
