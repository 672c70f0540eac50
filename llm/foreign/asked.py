"""A config that notes which of its keys are asked for: what nobody asked for, nobody understood."""

from collections.abc import Mapping
from typing import Any

GROUPS = ("text_config", "vision_config")
"""Keys whose value is a config itself."""


class AskedConfig(dict[str, Any]):
    """A Hugging Face config. `asked` grows as keys are read, by `get` and by index; it is shared with its groups, whose
    keys stand in it as `text_config.hidden_size`, and with copies that `with_values` makes.
    """

    def __init__(self, values: Mapping[str, Any], asked: set[str] | None = None, above: str = "") -> None:
        self.asked: set[str] = set() if asked is None else asked
        self.above = above
        super().__init__(
            {
                key: AskedConfig(value, self.asked, f"{above}{key}.")
                if key in GROUPS and isinstance(value, dict)
                else value
                for key, value in values.items()
            }
        )

    def __getitem__(self, key: str) -> Any:
        self.asked.add(self.above + key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As of any mapping."""
        self.asked.add(self.above + key)
        return super().get(key, default)

    def with_values(self, values: Mapping[str, Any]) -> "AskedConfig":
        """Another config in the place of this one."""
        return AskedConfig(values, self.asked, self.above)


def with_values(config: Mapping[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """`values`, which are noted as `config` is."""
    return config.with_values(values) if isinstance(config, AskedConfig) else values


def unasked(config: Mapping[str, Any], above: str = "") -> list[str]:
    """Keys of a config and its groups by their whole names, those of groups that nobody asked for left out."""
    assert isinstance(config, AskedConfig)
    found = []
    for key, value in config.items():
        if above + key not in config.asked:
            found.append(above + key)
        elif isinstance(value, AskedConfig):
            found += unasked(value, f"{above}{key}.")
    return found
