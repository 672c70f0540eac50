"""What is traced: six run configs of tiny models, each on every one of five layouts that the validator accepts.

A config is a file NAME.yaml of this folder; it gives whatever the numbers depend on, so that a new default moves none.
Text and layout are added here.
"""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from llm.errors import UserError
from llm.train.config import check_layout, validate

FOLDER = Path(__file__).parent
CONFIGS = ("dense", "llama4", "gemma", "tied", "neox", "muon")
LAYOUTS: dict[str, dict[str, int]] = {
    "one": {},
    "tensor2": {"tensor": 2},
    "pipeline2": {"pipeline": 2},
    "expert2": {"expert": 2},
    "zero3": {"zero_stage": 3},
}
PROMPTS = ("ab", "feed a cab, ")


class Case(NamedTuple):
    """A config on a layout; both by name."""

    config: str
    layout: str

    def __str__(self) -> str:
        return f"{self.config}-{self.layout}"

    @property
    def ranks(self) -> int:
        return 1 if self.layout == "one" else 2


SHORT = (
    Case("dense", "one"),
    Case("llama4", "expert2"),
    Case("gemma", "tensor2"),
    Case("tied", "pipeline2"),
    Case("neox", "zero3"),
    Case("muon", "one"),
)
"""Every config and every layout: what `make test` runs."""


@cache
def _read(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text()


def config_of(name: str) -> dict[str, Any]:
    """The file of a config, without text and layout."""
    raw: dict[str, Any] = yaml.safe_load(_read(name))
    return raw


def run_config(case: Case, text: Path, threads: int | None = None) -> dict[str, Any]:
    """The whole run config of a case, on the text in the folder `text`; with other `threads` than the file's."""
    raw = config_of(case.config)
    raw["data"] = {
        "train": str(text / "train.jsonl"),
        "valid": str(text / "valid.jsonl"),
        "cache_dir": str(text / "cache"),
    }
    raw["parallel"] = {"zero_stage": 1, "timeout_s": 300, **LAYOUTS[case.layout]}
    if threads is not None:
        raw["train"]["threads"] = threads
    return raw


def refusal(case: Case) -> str | None:
    """Why the validator refuses the layout for the config; None where it accepts it."""
    try:
        check_layout(validate(run_config(case, Path("text")), case.config), case.ranks)
    except UserError as error:
        return str(error)
    return None


@cache
def every_case() -> tuple[Case, ...]:
    """All that the validator accepts, config by config."""
    every = [Case(config, layout) for config in CONFIGS for layout in LAYOUTS]
    return tuple(case for case in every if refusal(case) is None)
