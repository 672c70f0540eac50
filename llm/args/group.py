"""What all groups of model keys have in common."""

from pydantic import BaseModel, ConfigDict


class Group(BaseModel):
    """Frozen, no unknown keys, field documentation from the line under the field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
