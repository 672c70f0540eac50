"""The section `lora`: adapters that a run trains beside weights that it leaves as they are."""

from llm.args.lora import LoraArgs
from llm.paths import PathText


class LoraConfig(LoraArgs):
    init_from: PathText | None = None
    """Begin with the adapter of this run, checkpoint or folder of PEFT, whose rank, alpha and targets hold, and whose
    base too where model.init_from names none."""

    @property
    def args(self) -> LoraArgs:
        """What it says of the model."""
        return LoraArgs(**{key: getattr(self, key) for key in LoraArgs.model_fields})
