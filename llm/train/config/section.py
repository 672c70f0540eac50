"""What all sections of the run config have in common."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from llm.train.config.explain import by_commas

Count = Annotated[int, Field(ge=1)]
BY_COMMAS = BeforeValidator(by_commas)
ONE_TEXT = BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)


class Section(BaseModel):
    """A part of the config: frozen, no unknown keys, field documentation from the line under the field."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )
