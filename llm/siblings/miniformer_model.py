"""Miniformer's `Transformer` over `LLM`: one stack of layers that gives plain tensors.

Shapes: B rows, T tokens of a row, D model width, V vocabulary, n labels of a row.
"""

from typing import Any

import torch
from torch import Tensor, nn

from llm.cache import Cache
from llm.datatypes import TransformerInput
from llm.generate import generate
from llm.layers.prediction import in_units_of_labels
from llm.siblings.miniformer_config import TransformerConfig
from llm.siblings.miniformer_kept import Kept, filled
from llm.siblings.miniformer_layers import EncoderLayer, FeedForward, MultiHeadAttention
from llm.siblings.padding import check_rows, positions_of, valid_of
from llm.siblings.parts import Parts


class Transformer(Kept):
    """A stack of layers over tokens. ValueError in one line where there is no such model."""

    config_class = TransformerConfig
    bases = {"attention": MultiHeadAttention, "feed_forward": FeedForward, "encoder_layer": EncoderLayer}

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attention: type[MultiHeadAttention] | None = None,
        feed_forward: type[FeedForward] | None = None,
        encoder_layer: type[EncoderLayer] | None = None,
    ) -> None:
        """attention, feed_forward, encoder_layer: classes of your own in the places of the model's. Initial values are
        drawn by a seed that torch's generator gives (torch.manual_seed)."""
        super().__init__(config, Parts(attention, feed_forward, encoder_layer))

    @property
    def layers(self) -> nn.ModuleList:
        """The layers."""
        return self.llm.layers

    def forward(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        *,
        causal: bool | None = None,
        cache: Cache | None = None,
        return_hidden: bool = False,
    ) -> Tensor:
        """Logits (B, T, V) of tokens (B, T) int64, or of feature vectors (B, T, input_dim) floats; with a head for rows
        (B, n), with head="values" (B, T, output_dim), in the units of what was learned; with head="none", or
        return_hidden, the states (B, T, D) after the last norm. All float32 but states.

        attention_mask: (B, T), 1 = token, 0 = padding, which no token sees. causal: whether a token sees none behind
        it; None = as the config says. cache: of `new_cache`; the tokens continue its rows, without gradients.
        ValueError in one line where arguments do not fit together.
        """
        self._check_kind(inputs)
        tokens = inputs if self.config.input_dim is None else inputs[..., 0]
        valid = valid_of(attention_mask, tokens, 0 if cache is None else cache.length)
        n_rows, row_length = inputs.shape[:2]
        first = torch.zeros(n_rows, dtype=torch.int64).numpy() if cache is None else cache.first_positions(n_rows)
        if (longest := int(first.max(initial=0)) + row_length) > self.config.max_seq_len:
            raise ValueError(f"rows of {longest} tokens are longer than max_seq_len={self.config.max_seq_len}")
        positions = None if valid is None else positions_of(valid, first)
        reads = self.config.is_causal if causal is None else causal
        if self.config.input_dim is None:
            given = TransformerInput(inputs, positions, causal=reads)
        else:
            given = TransformerInput.of_features(inputs, tokens_position=positions, causal=reads)
        if self.config.head == "none" or return_hidden:
            return self._hidden(given, cache)
        if not self.config.of_rows:
            out = self.llm(given, cache=cache)
            found: Tensor | None = out.outputs if self.config.head == "values" else out.logits
            assert found is not None
            return found
        if cache is not None:
            raise ValueError(f"head={self.config.head} predicts labels of whole rows, which no cache continues")
        check_rows(valid)
        hidden, regression = self._hidden(given, None), self.config.head == "regression"
        if self.config.input_dim is not None:
            pooled = self.llm.pooled_values(hidden, given)
            return self.llm.in_units(pooled) if regression else pooled
        predicted = self.llm.predictions(hidden, given)
        return in_units_of_labels(self.llm.args, predicted) if regression else predicted

    def _check_kind(self, inputs: Tensor) -> None:
        """ValueError where these are tokens and the model reads feature vectors, or the other way round."""
        n = self.config.input_dim
        if n is None and inputs.is_floating_point():
            raise ValueError(f"inputs are {inputs.dtype}: the model reads tokens (B, T) int64; for feature vectors its "
                             f"config needs input_dim")  # fmt: skip
        if n is not None and (not inputs.is_floating_point() or inputs.ndim != 3 or inputs.shape[-1] != n):
            raise ValueError(f"inputs are {inputs.dtype} {tuple(inputs.shape)}: the model reads feature vectors "
                             f"(B, T, {n}) of floats (input_dim)")  # fmt: skip

    def _hidden(self, given: TransformerInput, cache: Cache | None) -> Tensor:
        hidden = self.llm(given, cache=cache, return_hidden=True).hidden
        assert hidden is not None
        return hidden

    def new_cache(self) -> Cache:
        """Memory for rows that are continued call by call: keys and values of all layers."""
        return Cache(self.llm.args)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        eos_id: int | None = None,
        pad_id: int | None = None,
        **settings: Any,
    ) -> Tensor:
        """What continues rows (B, T), through a cache: (B, n) int64 of new tokens, n at most max_new_tokens; rows that
        ended at eos_id, which is kept, are filled with pad_id (None = eos_id). Dropout is off.

        settings: temperature (0 = greedy), top_k, top_p, num_beams, ... as `llm.generate.generate` has them.
        """
        if self.config.head != "tokens" or not self.config.is_causal or self.config.input_dim is not None:
            raise ValueError("only a causal model of tokens with head=tokens continues rows")
        trained = self.training
        self.eval()
        made = generate(
            self.llm,
            input_ids.tolist(),
            max_new_tokens=max_new_tokens,
            stop_ids=() if eos_id is None else (eos_id,),
            **settings,
        )
        self.train(trained)
        return filled(made, eos_id if pad_id is None else pad_id, input_ids.device)
