"""The token table, which may be the output matrix too."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.args.lora import LoraArgs, adapter
from llm.init import Draw
from llm.layers.lora import VocabularyAdapted, adapter_rows, token_row_rows
from llm.layers.output import HeadTargets, adapter_of, head_weight, predict, scaled
from llm.layers.parameter import ParamInfo, Rows
from llm.layers.region import VocabularyShare


class Embedding(VocabularyAdapted):
    """Rows of a (vocab_size, dim) table; with a share of it, zeros for the tokens of other ranks."""

    vocabulary: VocabularyShare | None = None

    def __init__(self, vocab_size: int, dim: int, lora: LoraArgs | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        self.add_adapter(adapter(lora, "tok_embeddings"), dim, vocab_size)
        self.add_token_rows(lora, dim)

    @staticmethod
    def declare(vocab_size: int, dim: int, init: Draw, tied: bool = False, lora: LoraArgs | None = None) -> Rows:
        """Its rows are cut by tensor parallelism. tied: it is the output matrix too."""
        weight = ParamInfo((vocab_size, dim), "embedding", init, tensor_dim=0, active=float(tied))
        return {"weight": weight} | adapter_rows(weight, adapter(lora, "tok_embeddings")) | token_row_rows(weight, lora)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.vocabulary is None:
            return self.vectors(tokens, tokens)
        row = tokens - self.vocabulary.first
        elsewhere = (row < 0) | (row >= len(self.weight))
        return self.vectors(row.masked_fill(elsewhere, 0), tokens).masked_fill(elsewhere.unsqueeze(-1), 0)

    def vectors(self, row: Tensor, tokens: Tensor) -> Tensor:
        """Of tokens whose rows of the table, which are here, are these."""
        found, added = F.embedding(row, self.weight), self.of_tokens(tokens)
        if self.lora_a is not None and self.lora_b is not None:
            found = found + F.embedding(row, self.lora_b) @ self.lora_a * self.scale
        return found if added is None else found + added


class TiedEmbedding(Embedding):
    """A token table that is the output matrix too: given token ids it returns rows, given hidden states what Output
    returns."""

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        softcap: float | None = None,
        lora: LoraArgs | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__(vocab_size, dim, lora)
        self.softcap, self.scale_of_logits = softcap, scale

    def forward(self, x: Tensor, targets: HeadTargets | None = None) -> Tensor:
        if x.is_floating_point():
            weight, x = head_weight(self, self.vocabulary), scaled(x, self.scale_of_logits)
            return predict(x, weight, targets, self.vocabulary, self.softcap, adapter_of(self, x))
        return super().forward(x)
