"""HYDRA's models over `LLM`: what `create_model` gives.

Shapes: B rows, T tokens of a row, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from llm.datatypes import TransformerInput
from llm.model import LLM
from llm.siblings.hydra_config import ModelType, TrainConfig


class Hydra(nn.Module):
    """A hybrid that gives a loss and logits."""

    def __init__(self, kind: ModelType, config: TrainConfig, llm: LLM) -> None:
        super().__init__()
        self.kind, self.config, self.llm = kind, config, llm

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, T, V) float32 of tokens (B, T) int64; with labels (B, T), the mean loss of the next ones in nats,
        too, before the logits.

        labels: of the same tokens as input_ids, as usual these themselves: that at t + 1 is what t is to say. Negative
        ones count for nothing. ValueError where they have another shape.
        """
        logits = self.llm(TransformerInput(input_ids)).logits
        assert logits is not None
        if labels is None:
            return logits
        if labels.shape != input_ids.shape:
            raise ValueError(f"labels {tuple(labels.shape)} must have the shape of input_ids {tuple(input_ids.shape)}")
        said, wanted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        total = cross_entropy(said, wanted.where(wanted >= 0, -100), ignore_index=-100, reduction="sum")
        return total / (wanted >= 0).sum().clamp(min=1), logits

    def get_num_params(self) -> int:
        """Numbers in the model, those that head and token table share counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


def create_model(kind: ModelType | str, config: TrainConfig | None = None) -> Hydra:
    """One of the models, whose initial values are drawn by a seed that torch's generator gives (torch.manual_seed).
    ValueError in one line, naming the key, where there is no such model."""
    kind = kind if isinstance(kind, ModelType) else ModelType.named(kind, "model_type")
    config = TrainConfig() if config is None else config
    seed = int(torch.randint(1 << 31, (), device="cpu"))
    return Hydra(kind, config, LLM(config.model_args(kind), seed=seed))
