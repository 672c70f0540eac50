"""Keys of layers in which a state-space mixer and attention are added."""

from pydantic import Field

from llm.args.group import Group


class SumArgs(Group):
    """The mixers called sum in the layer pattern."""

    attn: tuple[float, float] = Field((1.0, 1.0))
    """Factors on what attention reads and on what it makes."""
    ssm: tuple[float, float] = Field((1.0, 1.0))
    """The same of the state-space mixer."""
