"""What a model makes of its final hidden states: logits, losses, the results of a forward.

Shapes: B batch, T tokens, D model width, V vocabulary, S documents, n outputs of the prediction head.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from llm.args import ModelArgs
from llm.datatypes import LossSum, RouterStats, TransformerInput, TransformerOutput
from llm.layers.dropout import dropout_at, keys_or_drawn
from llm.layers.embedding import Embedding
from llm.layers.features import FeatureEmbedding, ValueOutput, in_units
from llm.layers.output import HeadTargets, Output
from llm.layers.pooling import pooled
from llm.layers.prediction import PREDICTION, PredictionHead
from llm.layers.region import InRegion

OUTPUT = "output"
"""The unit of the output matrix, or of what predicts values in its place."""
Losses = Callable[[Tensor], Mapping[str, LossSum]]
"""Makes losses of final hidden states (B, T, D), by name, the main one first."""


class Heads(InRegion):
    """Methods of LLM that read final hidden states."""

    tok_embeddings: Embedding | FeatureEmbedding
    output: Output | ValueOutput | None
    """None where the token table is the output matrix too, or another rank has it."""
    prediction: PredictionHead | None
    """None where the model has no such head, or another rank has it."""
    args: ModelArgs
    training: bool

    def results(
        self,
        hidden_BTD: Tensor,
        stats: Sequence[RouterStats],
        tokens_BT: Tensor,
        labels_BT: Tensor | None = None,
        return_hidden: bool = False,
        losses: Losses | None = None,
    ) -> TransformerOutput:
        """What a forward over these tokens was asked for, of what its last unit made; stats: of each MoE layer."""
        out = TransformerOutput(hidden=hidden_BTD if return_hidden else None)
        if stats:
            out.balance_sum, out.z_sum, out.expert_counts, out.rejected = RouterStats.together(stats)
        if labels_BT is not None:
            if self.args.output_dim is not None:
                raise ValueError(f"labels are of tokens; model.output_dim={self.args.output_dim} predicts values")
            if labels_BT.shape != tokens_BT.shape:
                raise ValueError(
                    f"labels {tuple(labels_BT.shape)} must have the shape of tokens {tuple(tokens_BT.shape)}"
                )
            out.loss_sum = self.loss_sum(hidden_BTD, labels_BT)
            out.n_targets = (labels_BT >= 0).sum()
        elif losses is not None:
            out.losses = losses(hidden_BTD)
            out.loss_sum = next(iter(out.losses.values())).total
        elif not return_hidden and self.args.output_dim is not None:
            out.outputs = self.in_units(self.values(hidden_BTD))
        elif not return_hidden:
            out.logits = self.logits(hidden_BTD)
        return out

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Float32 logits (B, T, V) of final hidden states; of a model that predicts values these, as `values`."""
        return self._head(hidden_BTD)

    def loss_sum(
        self,
        hidden_BTD: Tensor,
        labels_BT: Tensor,
        *,
        factors_BT: Tensor | None = None,
        nll_BT: Tensor | None = None,
    ) -> Tensor:
        """Sum of the labels' negative log-likelihood in nats given final hidden states, float32 scalar.

        factors_BT: float32, of each label's part; unset = 1. nll_BT: float32, is filled with what each label's is.
        """
        return self._head(hidden_BTD, HeadTargets(labels_BT, factors_BT, nll_BT))

    def replicated(self, hidden_BTD: Tensor) -> Tensor:
        """Final hidden states for what every tensor-parallel rank computes alike: their gradient counts once, where
        that of `loss_sum` and `logits` is a term of a sum over the ranks.
        """
        return self.region.once(hidden_BTD)

    def token_nll(self, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """Negative log-likelihood in nats of each label given final hidden states, (B, T) float32 without gradient, 0
        where the label is negative."""
        return self._head(hidden_BTD, HeadTargets(labels_BT, each=True))

    def token_hits(self, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """Whether each label is the likeliest token given final hidden states, (B, T) bool; not where it is negative.
        """
        return self._head(hidden_BTD, HeadTargets(labels_BT, hits=True))

    def predictions(self, hidden_BTD: Tensor, inputs: TransformerInput, keys_N: Tensor | None = None) -> Tensor:
        """What the prediction head makes of each document of the inputs (`TransformerInput.resolve`), pooled as
        model.pool says: (S, n) float32, logits or scaled values. With tensor parallelism give it `replicated` hidden
        states, as all ranks compute it alike. keys_N: as of the forward, whose key of a document's first token is the
        document's. ValueError where the model has no such head.
        """
        if self.prediction is None:
            raise ValueError("model.n_prediction=0: the model has no prediction head")
        found: Tensor = self.prediction(self._pooled(hidden_BTD, inputs, keys_N, PREDICTION))
        return found

    def values(self, hidden_BTD: Tensor) -> Tensor:
        """What a model that predicts values makes of final hidden states: (B, T, O) float32, scaled as they are
        learned. With tensor parallelism give it `replicated` hidden states. ValueError of a model that predicts tokens.
        """
        if not isinstance(self.output, ValueOutput):
            raise ValueError("model.output_dim is not set: the model predicts tokens, not values")
        found: Tensor = self.output(hidden_BTD)
        return found

    def pooled_values(self, hidden_BTD: Tensor, inputs: TransformerInput, keys_N: Tensor | None = None) -> Tensor:
        """What it makes of each document of the inputs, pooled as model.pool says: (S, O) float32; otherwise as
        `values`, and keys_N as of `predictions`.
        """
        return self.values(self._pooled(hidden_BTD, inputs, keys_N, OUTPUT))

    def in_units(self, values: Tensor) -> Tensor:
        """Scaled values (..., O) in the units of the data."""
        return in_units(values, self.args.output_mean, self.args.output_std)

    def _pooled(
        self, hidden_BTD: Tensor, inputs: TransformerInput, keys_N: Tensor | None, layer: str
    ) -> Tensor:
        """A vector of each document, (S, D), some of it dropped in training, as of the head of this name."""
        positions_BT, starts_S = inputs.resolve()
        pooled_SD = pooled(hidden_BTD, positions_BT, starts_S, self.args.pool)
        dropout = dropout_at(self.args.head_dropout, "pooled", layer)
        keys_N = keys_or_drawn(keys_N, inputs.tokens, self.training and dropout is not None)
        if dropout is not None and keys_N is not None:
            pooled_SD = dropout(pooled_SD, keys_N[torch.from_numpy(starts_S).to(keys_N.device)])
        return pooled_SD

    @property
    def _head(self) -> nn.Module:
        return self.tok_embeddings if self.output is None else self.output
