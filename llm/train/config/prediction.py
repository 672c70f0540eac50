"""The section `prediction`: how labels of whole samples are learned."""

from pydantic import Field

from llm.data.labels import MaxLength
from llm.train.config.section import Section


class PredictionConfig(Section):
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Of a classification: the share of a label's probability that is spread over all classes."""
    causal: bool = False
    """Read samples from left to right alone; false = both ways."""
    max_length: MaxLength = "error"
    """A labelled sample longer than a row: stop, leave it out, or keep its beginning."""
