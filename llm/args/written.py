"""ModelArgs as a file for configs/model/."""

import yaml

from llm.args.model import ModelArgs

WIDTH = 116
"""Characters of a line."""


def model_file(args: ModelArgs, title: str) -> str:
    """YAML of the keys that are not at their defaults, groups of plain values on one line each, under a comment."""
    keys = args.model_dump(mode="json", exclude_defaults=True)
    return f"# {title}\n" + yaml.safe_dump(keys, sort_keys=False, default_flow_style=None, width=WIDTH)
