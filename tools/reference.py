"""docs/reference.md: every key of a run config and every flag of the commands that read one, from the schema itself.

    python tools/reference.py            # writes the page
    python tools/reference.py --check    # exit status 1 where the page says something else than the schema

What the page says of a key is the line under the field (llm/train/config/, llm/args/); nothing is written by hand here
but the order of the sections.
"""

import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import llm.installed  # noqa: F401  (says in one line what is missing)

from llm.args.model import DROPPED_BY_ONE_KEY
from llm.cli import run_cli, stop
from llm.jobs.evaluate import LAYOUT_FLAGS, read_flags
from llm.train.config import RunConfig
from llm.train.config.deepspeed_options import DECIDED, GROUPS, PLAIN_GROUPS, PLAIN_OPTIONS
from llm.train.config.explain import section_of
from llm.train.config.flags import OWN_FLAGS
from llm.train.config.tasks import TaskEntry

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference.md"
WIDTH = 120
ELSEWHERE = {"model.lora": "lora", "data.valid": "data.train"}
"""Groups whose keys stand under another one."""
BESIDE = {"task": TaskEntry}
"""Keys that may be a list of entries, of which the schema's type alone does not say which keys they have."""
COMPARISONS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
PLAIN = {"integer": "int", "number": "float", "string": "text", "boolean": "bool", "null": "null"}
DEEPSPEED = (
    "options that DeepSpeed's JSON has and no key above decides. With DeepSpeed's own names and defaults these are "
    "taken, groups among them:"
)

INTRODUCTION = """\
# Reference: every key

Made from the schema by `python tools/reference.py`; a test fails where this page and the schema differ. One line for
each key: its name, what it may be, its default, what it does. `--help` of a command prints the same.

A key stands in the YAML file under its sections, or on the command line with dots: `optim.lr` is `optim: {lr: 1e-3}`
there and `--optim.lr=1e-3` here. The command line wins over the file. Unknown keys, wrong types and impossible
combinations end a command before it does anything, with a line that names the key.

`pretrain` and `finetune` read the same config; `finetune` turns `eval.at_start` on where there is held-out data and the
config does not say. `evaluate` has flags of its own, [at the end](#evaluate-flags). Files of evaluation tasks are
described in [their page](evaluation_tasks.md).

"null" means that a key may be left empty; "required" that there is no default.
"""


@dataclass(frozen=True)
class Row:
    """A line of the page."""

    key: str
    kind: str
    default: str
    text: str

    def lines(self) -> str:
        """As an item of a list, wrapped."""
        said = f" ({self.kind}; {f'default {self.default}' if self.default else 'required'})" if self.kind else ""
        body = f"**`{self.key}`**{said}: {_sentence(self.text)}"
        return textwrap.fill(
            body, WIDTH - 2, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )

DROPOUT = Row(
    "model.dropout", "float >= 0 and < 1", "null",
    f"sets {', '.join(DROPPED_BY_ONE_KEY)} where these are not given themselves.",
)  # fmt: skip
"""A key that the schema replaces before it has fields."""


def main(check: bool = False) -> None:
    """Write docs/reference.md from the schema.

    check: write nothing; exit status 1 where the page is not what would be written
    """
    made = page()
    if check:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != made:
            stop("docs/reference.md is not what the schema says; python tools/reference.py writes it", code=1)
        return
    PAGE.write_text(made, encoding="utf-8")
    print(f"{PAGE}: {made.count('- **')} keys and flags")


def page() -> str:
    """The whole page."""
    sections = {name: info for name, info in RunConfig.model_fields.items() if section_of(info.annotation) is not None}
    plain = [name for name in RunConfig.model_fields if name not in sections and name != "deepspeed"]
    last = ("deepspeed", "pretrain and finetune flags", "evaluate flags")
    contents = ["whole config", *sections, *last]
    links = " · ".join(f"[{name}](#{anchor(name)})" for name in contents)
    parts = [INTRODUCTION, textwrap.fill(links, WIDTH, break_long_words=False, break_on_hyphens=False) + "\n"]
    parts.append(_titled("whole config", rows_of(RunConfig, only=plain)))
    for name, info in sections.items():
        if name in BESIDE:
            parts.append(_titled(name, rows_of(RunConfig, only=[name])))
            continue
        more = [DROPOUT] if name == "model" else []
        parts.append(_titled(name, [_group_row(name, info), *_inside(name, info), *more]))
    decided = [Row(f"deepspeed.{name}", "", "", f"not taken: it is set by {by}.") for name, by in DECIDED.items()]
    options = ", ".join(f"`{name}`" for name in (*PLAIN_OPTIONS, *PLAIN_GROUPS, *GROUPS))
    parts.append(_titled("deepspeed", [Row("deepspeed", "mapping", "`{}`", f"{DEEPSPEED} {options}"), *decided]))
    flags = [Row(f"--{name}", "", "", text) for name, text in OWN_FLAGS.items()]
    parts.append(_titled("pretrain and finetune flags", flags))
    parts.append(_titled("evaluate flags", list(evaluate_rows())))
    return "\n".join(parts)


def rows_of(schema: type[BaseModel], prefix: str = "", only: list[str] | None = None) -> list[Row]:
    """All keys of a schema, groups within it after their own row."""
    rows: list[Row] = []
    for name, info in schema.model_fields.items():
        key = prefix + name
        if only is not None and name not in only:
            continue
        if key in BESIDE:
            rows += [_row(key, info), *rows_of(BESIDE[key], f"{key}.N.")]
        elif section_of(info.annotation) is None:
            rows.append(_row(key, info))
        else:
            rows += [_group_row(key, info), *_inside(key, info)]
    return rows


def evaluate_rows() -> Iterator[Row]:
    """The flags of an evaluation, each with what the docstring of `read_flags` says of it."""
    texts = dict(_paragraphs(inspect.getdoc(read_flags) or ""))
    for name, parameter in inspect.signature(read_flags, eval_str=True).parameters.items():
        required = parameter.default is parameter.empty
        kind = _words(TypeAdapter(parameter.annotation).json_schema())
        yield Row(f"--{name}", kind, "" if required else _default(parameter.default), texts[name])
    for name, text in LAYOUT_FLAGS.items():
        yield Row(f"--{name}", "int >= 1", "`1`", text)


def anchor(heading: str) -> str:
    """What a link to a heading of a page is called."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _inside(key: str, info: FieldInfo) -> list[Row]:
    schema = section_of(info.annotation)
    assert schema is not None
    return [] if key in ELSEWHERE else rows_of(schema, f"{key}.")


def _group_row(key: str, info: FieldInfo) -> Row:
    """What stands before the keys of a group; a group that has all its keys by default needs no default itself."""
    text = _documented(key, info)
    if key in ELSEWHERE:
        text = f"{_sentence(text)} Its keys are those of `{ELSEWHERE[key]}`."
    forms = [form for form in get_args(info.annotation) if section_of(form) is None and form is not NoneType]
    kind = " | ".join(["group", *(_words(TypeAdapter(form).json_schema()) for form in forms)])
    optional = NoneType in get_args(info.annotation)
    default = "" if info.is_required() else "null" if optional else "the defaults of its keys"
    return Row(key, f"{kind} | null" if optional else kind, default, text)


def _row(key: str, info: FieldInfo) -> Row:
    default = "" if info.is_required() else _default(info.get_default(call_default_factory=True))
    annotation: Any = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
    schema = TypeAdapter(annotation).json_schema()
    return Row(key, _words(schema, schema.get("$defs", {})), default, _documented(key, info))


def _documented(key: str, info: FieldInfo) -> str:
    """The line under a field. ValueError where there is none."""
    if not info.description:
        raise ValueError(f"{key}: its field has no line of documentation under it")
    return info.description


def _default(value: Any) -> str:
    """As it would stand in a YAML file."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple | list):
        return "`[" + ", ".join("null" if item is None else '""' if item == "" else str(item) for item in value) + "]`"
    return '`""`' if value == "" else f"`{value}`"


def _words(schema: dict[str, Any], named: dict[str, Any] | None = None) -> str:
    """A JSON schema in a few words: `int >= 1`, `cosine | linear`, `list of text`."""
    if "$ref" in schema:
        return "{" + ", ".join((named or {})[schema["$ref"].split("/")[-1]]["properties"]) + "}"
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(_words(option, named) for option in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " | ".join(map(str, schema.get("enum", [schema.get("const")])))
    kind = schema.get("type")
    if kind == "array" and "prefixItems" in schema:
        return "[" + ", ".join(_words(item, named) for item in schema["prefixItems"]) + "]"
    if kind == "array":
        return f"list of {_words(schema.get('items', {}), named)}"
    if kind == "object":
        inner = schema.get("additionalProperties")
        return f"mapping to {_words(inner, named)}" if isinstance(inner, dict) and inner else "mapping"
    bounds = " and ".join(f"{sign} {schema[name]:,}" for name, sign in COMPARISONS.items() if name in schema)
    return f"{PLAIN.get(str(kind), 'anything')} {bounds}".strip()


def _paragraphs(docstring: str) -> Iterator[tuple[str, str]]:
    """(parameter, what is said of it) of a docstring as launch/ and tools/ write them."""
    for found in re.finditer(r"^(\w+): (.*(?:\n[ ]+.*)*)", docstring, flags=re.M):
        yield found[1], " ".join(found[2].split())


def _sentence(text: str) -> str:
    """On one line, with an end."""
    text = " ".join(text.split())
    return text if text.endswith(".") else text + "."


def _titled(heading: str, rows: list[Row]) -> str:
    return f"## {heading}\n\n" + "\n".join(row.lines() for row in rows) + "\n"


if __name__ == "__main__":
    run_cli(main)
