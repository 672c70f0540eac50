"""Miniformer's `Seq2SeqTransformer` over `LLM`: an encoder that reads a source, and a decoder that writes a target.

Shapes: B rows, S tokens of a source, T of a target, D model width, V vocabulary.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llm.datatypes import TransformerInput
from llm.generate import generate
from llm.siblings.miniformer_config import EncoderDecoderConfig, TransformerConfig
from llm.siblings.miniformer_kept import Kept, filled
from llm.siblings.miniformer_layers import DecoderLayer, EncoderLayer, FeedForward, MultiHeadAttention
from llm.siblings.padding import positions_of, valid_of
from llm.siblings.parts import Parts


class Seq2SeqTransformer(Kept):
    """An encoder and a decoder of config.n_layers each. ValueError in one line where there is no such model."""

    config_class = EncoderDecoderConfig
    bases = {
        "attention": MultiHeadAttention,
        "feed_forward": FeedForward,
        "encoder_layer": EncoderLayer,
        "decoder_layer": DecoderLayer,
    }

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attention: type[MultiHeadAttention] | None = None,
        feed_forward: type[FeedForward] | None = None,
        encoder_layer: type[EncoderLayer] | None = None,
        decoder_layer: type[DecoderLayer] | None = None,
    ) -> None:
        """attention, feed_forward, encoder_layer, decoder_layer: classes of your own in the places of the model's.
        Initial values are drawn by a seed that torch's generator gives (torch.manual_seed)."""
        parts = Parts(attention, feed_forward, encoder_layer, decoder_layer)
        super().__init__(EncoderDecoderConfig.like(config), parts)

    @property
    def encoder_layers(self) -> nn.ModuleList:
        """The encoder's layers."""
        return self.llm.encoder.layers

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The decoder's."""
        return self.llm.layers

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        *,
        memory: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) float32 of the tokens after those of the target (B, T) int64, given the source (B, S): each
        token of the target sees those before it and the whole source.

        src_mask, tgt_mask: (B, S), (B, T), 1 = token, 0 = padding, which no token sees. memory: what `encode` made of
        the same source. ValueError in one line where arguments do not fit together.
        """
        self._check_length("src", src)
        self._check_length("tgt", tgt)
        if len(src) != len(tgt):
            raise ValueError(f"src has {len(src)} rows and tgt {len(tgt)}; each target has its source")
        inputs = TransformerInput(tgt, _positions(tgt, tgt_mask), source=_source(src, src_mask))
        logits = self.llm(inputs, memory=memory).logits
        assert logits is not None
        return logits

    def encode(self, src: Tensor, src_mask: Tensor | None = None) -> Tensor:
        """What the encoder makes of sources: (B, S, D)."""
        self._check_length("src", src)
        return self.llm.encode(_source(src, src_mask))

    @torch.no_grad()
    def generate(
        self,
        src: Tensor,
        max_new_tokens: int,
        num_beams: int = 1,
        bos_id: int = 1,
        eos_id: int | None = 2,
        *,
        src_mask: Tensor | None = None,
        pad_id: int | None = None,
        **settings: Any,
    ) -> Tensor:
        """What the decoder writes of sources (B, S), through a cache: (B, n) int64 of what follows bos_id, n at most
        max_new_tokens; rows that ended at eos_id, which is kept, are filled with pad_id (None = eos_id).

        num_beams: 1 = the likeliest token again and again, more = beam search. src_mask: (B, S), 0 = padding. settings:
        length_penalty, early_stopping, temperature, ... as `llm.generate.generate` has them. ValueError in one line
        where arguments are out of range.
        """
        self._check_length("src", src)
        if max_new_tokens > self.config.max_seq_len:
            raise ValueError(f"max_new_tokens={max_new_tokens} is above max_seq_len={self.config.max_seq_len}")
        valid = valid_of(src_mask, src)
        sources = src.tolist()
        if valid is not None:
            sources = [row[kept].tolist() for row, kept in zip(src.cpu(), valid, strict=True)]
        if not all(sources):
            raise ValueError(f"src_mask: row {sources.index([]) + 1} is padding alone, so there is no source")
        trained = self.training
        self.eval()
        made = generate(
            self.llm,
            [[bos_id]] * len(sources),
            sources=sources,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            stop_ids=() if eos_id is None else (eos_id,),
            **settings,
        )
        self.train(trained)
        return filled(made, eos_id if pad_id is None else pad_id, src.device)

    def _check_length(self, name: str, tokens: Tensor) -> None:
        if tokens.ndim == 2 and tokens.shape[1] > self.config.max_seq_len:
            raise ValueError(
                f"{name} has rows of {tokens.shape[1]} tokens, longer than max_seq_len={self.config.max_seq_len}"
            )


def _positions(tokens: Tensor, mask: Tensor | None) -> Tensor | None:
    """Of each token, negative at padding; None where there is none."""
    valid = valid_of(mask, tokens)
    return None if valid is None else positions_of(valid, np.zeros(len(tokens), dtype=np.int64))


def _source(src: Tensor, mask: Tensor | None) -> TransformerInput:
    return TransformerInput(src, _positions(src, mask))
