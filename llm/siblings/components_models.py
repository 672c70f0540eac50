"""Transformer Components' three models over `LLM`: values in, values out.

Shapes: B rows, T positions of a row, S of its source, F = input_dim, D = embed_dim, O = output_dim.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from llm.cache import Cache
from llm.datatypes import RouterStats, TransformerInput
from llm.errors import UserError
from llm.layers.encoder import encoder_units
from llm.model import EMBEDDING, LLM
from llm.siblings.components_config import ComponentsConfig, FFNConfig
from llm.siblings.components_layers import (
    FeedForward,
    MultiHeadAttention,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
    overflow_rate,
    without_calls,
)
from llm.siblings.folder import open_folder, save_folder
from llm.siblings.loading import compared, fill, usable
from llm.siblings.padding import positions_of, valid_of
from llm.siblings.parts import Parts, installed
from llm.sides import apart

Kind = Literal["regression", "autoregressive", "encoder_decoder"]


class _Model(nn.Module):
    """What the three have in common."""

    kind: ClassVar[Kind]
    bases: ClassVar[Mapping[str, type]] = {
        "attention": MultiHeadAttention, "feed_forward": FeedForward, "encoder_layer": TransformerEncoderLayer
    }  # fmt: skip
    aux_loss: Tensor | None = None
    """Balance loss of the last call, times alpha, summed over layers: a scalar to add to the loss; None without
    experts."""
    overflow_rate: float | None = None
    """Share of the assignments of the last call that found their expert full; None without a capacity."""
    _cache: Cache | None = None

    def __init__(self, config: ComponentsConfig, parts: Parts) -> None:
        """Initial values are drawn by a seed that torch's generator gives (torch.manual_seed)."""
        super().__init__()
        parts.check(self.bases)
        kind = parts.attention
        if kind is not None and config.attention_type == "mha":  # the default: the class says which it is
            config = replace(config, attention_type=kind.attention_type)
        self.config, self.parts = config, parts
        self.llm = installed(LLM(config.args(), seed=int(torch.randint(1 << 31, (), device="cpu"))), parts)

    def __getstate__(self) -> dict[str, Any]:
        return without_calls(self)

    def reset_cache(self) -> None:
        """Forget the rows of earlier calls."""
        self._cache = None

    def _caches(self) -> bool:
        """Whether calls continue each other: in evaluation mode alone, so that training sees whole rows."""
        return self.config.use_kv_cache and self.config.apply_causal_mask and not self.training

    def _continued(self, n_rows: int, expanding_context: bool) -> Cache:
        """The cache of so many rows, new where there was none or one of others."""
        cache = self._cache
        if cache is None or (cache.next_position is not None and len(cache.next_position) != n_rows):
            cache = self._cache = Cache(self.llm.args)
        cache.window = None if expanding_context else self.config.max_seq_len
        return cache

    def _note(self, sides: Sequence[tuple[RouterStats | None, TransformerInput]]) -> None:
        """Keep what the experts of a call report, by the side of the model."""
        known = [(stats, _n_tokens(inputs)) for stats, inputs in sides if stats is not None]
        self.aux_loss = sum((stats.balance_sum / n for stats, n in known), torch.zeros(())) if known else None
        self.overflow_rate = overflow_rate([stats for stats, _ in known])

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write config.json and model.safetensors, and without classes of your own a manifest that makes the folder
        one of ours. UserError where the folder holds something else."""
        save_folder(Path(save_directory), self.llm, self.config, None, self.parts)

    @classmethod
    def from_pretrained(cls, name: str | Path, device: str | torch.device | None = None, **parts: Any) -> Self:
        """The model in a folder that `save_pretrained` wrote, in evaluation mode. parts: the classes that it was saved
        with, as the constructor takes them. UserError in one line where it is not there, is damaged, or does not fit.
        """
        place, path, given = usable(device), Path(name), Parts(**parts)
        config, tensors = open_folder(path, ComponentsConfig, given)
        model = cls.__new__(cls)
        _Model.__init__(model, cls._checked(config, path), given)
        compared({key: tuple(value.shape) for key, value in model.state_dict().items()}, tensors, path, strict=True)
        model = model.to(tensors.dtype)
        fill(model, tensors)
        model.llm.origin = path
        return model.to(place).eval()

    @classmethod
    def _checked(cls, config: ComponentsConfig, path: Path) -> ComponentsConfig:
        if config.kind != cls.kind:
            raise UserError(f"{path}: holds a model of kind {config.kind}, and {cls.__name__} is {cls.kind}")
        return config


def _n_tokens(inputs: TransformerInput) -> int:
    """Positions that are no padding."""
    positions = inputs.tokens_position
    return int((positions >= 0).sum()) if isinstance(positions, Tensor) else inputs.tokens.numel()


def _inputs(name: str, x: Tensor, mask: Tensor | None = None) -> TransformerInput:
    """Rows of values. mask: (B, T), 1 = a position, 0 = padding."""
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"{name} must be floats of shape (B, T, input_dim); got {x.dtype} of shape {tuple(x.shape)}")
    inputs = TransformerInput.of_features(x)
    valid = valid_of(mask, inputs.tokens)
    if valid is None:
        return inputs
    return replace(inputs, tokens_position=positions_of(valid, np.zeros(len(x), dtype=np.int64)))


class TransformerModel(_Model):
    """Regression: values of a row (B, T, F) to what is predicted of the row, (B, O), by the mean of its positions."""

    kind = "regression"

    def __init__(
        self,
        input_dim: int,
        embed_dim: int,
        ffn_latent_dim: int,
        num_layers: int,
        num_heads: int,
        output_dim: int,
        apply_causal_mask: bool = False,
        max_seq_len: int = 512,
        attention_type: str = "mha",
        ffn_config: FFNConfig | None = None,
        use_kv_cache: bool = False,
        num_groups: int | None = None,
        dropout: float = 0.0,
        *,
        attention: type[MultiHeadAttention] | None = None,
        feed_forward: type[FeedForward] | None = None,
        encoder_layer: type[TransformerEncoderLayer] | None = None,
    ) -> None:
        """attention, feed_forward, encoder_layer: classes of your own in the places of the model's. use_kv_cache: an
        encoder reads whole rows, so it is accepted and changes nothing. ValueError in one line, naming the argument,
        where there is no such model."""
        config = ComponentsConfig(
            kind=self.kind, input_dim=input_dim, embed_dim=embed_dim, ffn_latent_dim=ffn_latent_dim,
            num_layers=num_layers, num_heads=num_heads, output_dim=output_dim, apply_causal_mask=apply_causal_mask,
            max_seq_len=max_seq_len, attention_type=attention_type, ffn_config=ffn_config, use_kv_cache=use_kv_cache,
            num_groups=num_groups, dropout=dropout,
        )  # fmt: skip
        super().__init__(config, Parts(attention, feed_forward, encoder_layer))

    def forward(self, x: Tensor, expanding_context: bool = True, mask: Tensor | None = None) -> Tensor:
        """(B, O) float32. mask: (B, T), 1 = a position, 0 = padding, which nothing sees and no mean counts."""
        inputs = _inputs("x", x, mask)
        out = self.llm(inputs, return_hidden=True)
        self._note([(out.router, inputs)])
        return self.llm.in_units(self.llm.pooled_values(out.hidden, inputs))


class AutoregressiveTransformerModel(_Model):
    """Values of a row (B, T, F) to what is predicted at each of its positions, (B, T, O): in a causal model of it and
    those before it."""

    kind = "autoregressive"

    def __init__(
        self,
        input_dim: int,
        embed_dim: int,
        ffn_latent_dim: int,
        num_layers: int,
        num_heads: int,
        output_dim: int,
        apply_causal_mask: bool = True,
        max_seq_len: int = 512,
        attention_type: str = "mha",
        ffn_config: FFNConfig | None = None,
        use_kv_cache: bool = False,
        num_groups: int | None = None,
        dropout: float = 0.0,
        *,
        attention: type[MultiHeadAttention] | None = None,
        feed_forward: type[FeedForward] | None = None,
        encoder_layer: type[TransformerEncoderLayer] | None = None,
    ) -> None:
        """attention, feed_forward, encoder_layer: classes of your own in the places of the model's. use_kv_cache: in
        evaluation mode calls continue each other, where apply_causal_mask allows it. ValueError in one line, naming the
        argument, where there is no such model."""
        config = ComponentsConfig(
            kind=self.kind, input_dim=input_dim, embed_dim=embed_dim, ffn_latent_dim=ffn_latent_dim,
            num_layers=num_layers, num_heads=num_heads, output_dim=output_dim, apply_causal_mask=apply_causal_mask,
            max_seq_len=max_seq_len, attention_type=attention_type, ffn_config=ffn_config, use_kv_cache=use_kv_cache,
            num_groups=num_groups, dropout=dropout,
        )  # fmt: skip
        super().__init__(config, Parts(attention, feed_forward, encoder_layer))

    def forward(self, x: Tensor, expanding_context: bool = True, mask: Tensor | None = None) -> Tensor:
        """(B, T, O) float32. With the cache x are new positions of its rows, without gradients, and expanding_context
        says whether these see all before them or the max_seq_len newest; positions count on. Another number of rows, or
        `reset_cache`, begins anew. mask: (B, T), 1 = a position, 0 = padding, which nothing sees; not with the cache.
        """
        inputs = _inputs("x", x, mask)
        cache = None
        if self._caches():
            if mask is not None:
                raise ValueError("mask: rows that a cache continues have no padding; call without use_kv_cache")
            cache = self._continued(len(x), expanding_context)
        out = self.llm(inputs, cache=cache, return_hidden=True)
        self._note([(out.router, inputs)])
        return self.llm.in_units(self.llm.values(out.hidden))

    @torch.no_grad()
    def generate_next_token(self, x: Tensor, expanding_context: bool = True) -> Tensor:
        """What follows the last position of rows (B, T, F): (B, 1, O), as in evaluation mode. With the cache x are new
        positions, as in a call."""
        trained = self.training
        if not trained:
            return self(x, expanding_context)[:, -1:]
        self.eval()
        try:
            return self.llm(_inputs("x", x)).outputs[:, -1:]
        finally:
            self.train(trained)

    @torch.no_grad()
    def generate(self, x: Tensor, steps: int) -> Tensor:
        """(B, steps, O): what the model predicts, position by position, when each prediction is the next input; with a
        cache of its own where the model is causal. ValueError where output_dim is not input_dim."""
        _same_dims(self.config)
        trained = self.training
        self.eval()
        cache = Cache(self.llm.args) if self.config.apply_causal_mask else None
        found, given = [], x
        try:
            for _ in range(steps):
                found.append(self.llm(_inputs("x", given), cache=cache).outputs[:, -1:])
                given = found[-1] if cache is not None else torch.cat([given, found[-1]], dim=1)
        finally:
            self.train(trained)
        return torch.cat(found, dim=1) if found else x.new_zeros(len(x), 0, self.config.output_dim)


def _same_dims(config: ComponentsConfig) -> None:
    if config.output_dim != config.input_dim:
        raise ValueError(
            f"output_dim={config.output_dim} is not input_dim={config.input_dim}: what the model predicts cannot be "
            f"its next input"
        )


class EncoderDecoder(_Model):
    """Values of a source (B, S, F) and of a target (B, T, F) to what is predicted at each position of the target,
    (B, T, O), of it, those before it, and the source."""

    kind = "encoder_decoder"
    bases = {**_Model.bases, "decoder_layer": TransformerDecoderLayer}
    _read: tuple[weakref.ref[Tensor], RouterStats | None, TransformerInput] | None = None
    """What `encode` made last, and of what."""
    _written: "_Written | None" = None
    """What `decode` made with the cache."""

    def __init__(
        self,
        input_dim: int,
        embed_dim: int,
        ffn_latent_dim: int,
        num_encoder_layers: int,
        num_decoder_layers: int,
        num_heads: int,
        output_dim: int,
        apply_causal_mask: bool = True,
        max_seq_len: int = 512,
        attention_type: str = "mha",
        ffn_config: FFNConfig | None = None,
        use_kv_cache: bool = False,
        num_groups: int | None = None,
        dropout: float = 0.0,
        *,
        attention: type[MultiHeadAttention] | None = None,
        feed_forward: type[FeedForward] | None = None,
        encoder_layer: type[TransformerEncoderLayer] | None = None,
        decoder_layer: type[TransformerDecoderLayer] | None = None,
    ) -> None:
        """apply_causal_mask: of the decoder. attention, feed_forward, encoder_layer, decoder_layer: classes of your own
        in the places of the model's. use_kv_cache: in evaluation mode `decode` computes what is new of its target
        alone. ValueError in one line, naming the argument, where there is no such model."""
        config = ComponentsConfig(
            kind=self.kind, input_dim=input_dim, embed_dim=embed_dim, ffn_latent_dim=ffn_latent_dim,
            num_layers=num_decoder_layers, num_heads=num_heads, output_dim=output_dim,
            num_encoder_layers=num_encoder_layers, apply_causal_mask=apply_causal_mask, max_seq_len=max_seq_len,
            attention_type=attention_type, ffn_config=ffn_config, use_kv_cache=use_kv_cache, num_groups=num_groups,
            dropout=dropout,
        )  # fmt: skip
        super().__init__(config, Parts(attention, feed_forward, encoder_layer, decoder_layer))

    def encode(self, source: Tensor, expanding_context: bool = True, mask: Tensor | None = None) -> Tensor:
        """What the encoder makes of sources: (B, S, D). expanding_context is accepted; an encoder reads whole rows.
        mask: (B, S), 1 = a position, 0 = padding, which nothing sees; `decode` then takes it, too."""
        inputs = _inputs("source", source, mask)
        both = replace(inputs, source=inputs)
        ctx = self.llm.context(both)
        streams, stats = self.llm.run((EMBEDDING, *encoder_units(self.llm.args)), None, both, ctx)
        memory = apart(streams, ctx)[1]
        report = RouterStats.together(stats) if stats else None
        self._read = weakref.ref(memory), report, inputs
        self._note([(report, inputs)])
        return memory

    def decode(
        self,
        target: Tensor,
        encoder_output: Tensor,
        expanding_context: bool = True,
        source_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, T, O) float32 of targets (B, T, F) and of what `encode` made. source_mask: as encode's mask.

        With the cache a target that begins as the one before is that one, continued: what is new of it is computed, and
        all of it returned. One that begins otherwise holds new positions alone, whose results are returned. An
        encoder_output of another shape or content, or `reset_cache`, begins anew. expanding_context: whether a position
        sees all before it or the max_seq_len newest.
        """
        inputs = self._pair(target, encoder_output, source_mask)
        if self._caches():
            return self._extended(inputs, encoder_output, expanding_context)
        return self._decoded(inputs, encoder_output)

    def forward(self, source: Tensor, target: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """(B, T, O) float32: `decode` of the target and of what `encode` makes of the source; whole rows, without the
        cache."""
        memory = self.encode(source, mask=source_mask)
        return self._decoded(self._pair(target, memory, source_mask), memory)

    def _pair(self, target: Tensor, memory: Tensor, source_mask: Tensor | None) -> TransformerInput:
        """What the model reads, the encoder aside."""
        if memory.ndim != 3 or len(memory) != len(target):
            raise ValueError(
                f"encoder_output {tuple(memory.shape)} must have shape (B, S, embed_dim) with the {len(target)} rows "
                f"of the target"
            )
        inputs = _inputs("target", target)
        if source_mask is None:
            return inputs
        features = memory.new_zeros(*memory.shape[:2], self.config.input_dim)
        return replace(inputs, source=_inputs("source", features, source_mask))

    def _decoded(self, inputs: TransformerInput, memory: Tensor) -> Tensor:
        out = self.llm(inputs, memory=memory, return_hidden=True)
        report, source = None, inputs
        if self._read is not None and self._read[0]() is memory:
            _, report, source = self._read
        self._note([(report, source), (out.router, inputs)])
        return self.llm.in_units(self.llm.values(out.hidden))

    def reset_cache(self) -> None:
        super().reset_cache()
        self._written = None

    @torch.no_grad()
    def _extended(self, inputs: TransformerInput, memory: Tensor, expanding_context: bool) -> Tensor:
        target = inputs.features
        assert target is not None
        written = self._written
        if written is None or not written.reads(memory) or len(written.target) != len(target):
            self.reset_cache()
            written = None
        whole = written is not None and torch.equal(written.target[:, :1], target[:, :1])
        if whole and written is not None and not written.begins(target):
            self.reset_cache()  # the same first position, and then another target
            written = None
        if written is None:
            written = self._written = _Written(memory.clone(), target[:, :0], target.new_zeros(len(target), 0, 0))
            whole = True
        done = written.target.shape[1] if whole else 0
        if done < target.shape[1]:
            new = target[:, done:]
            cache = self._continued(len(target), expanding_context)
            first = cache.next_position is None
            given = replace(TransformerInput.of_features(new), source=inputs.source if first else None)
            out = self.llm(given, memory=memory if first else None, cache=cache)
            written.add(new, out.outputs)
        outputs = written.outputs
        return outputs[:, : target.shape[1]] if whole else outputs[:, outputs.shape[1] - target.shape[1] :]

    @torch.no_grad()
    def generate(self, source: Tensor, start: Tensor, steps: int) -> Tensor:
        """(B, steps, O): what the model predicts behind the first positions (B, T, F) of a target, when each prediction
        is the next input; keys and values are computed once where the model is causal. ValueError where output_dim is
        not input_dim."""
        _same_dims(self.config)
        trained = self.training
        self.eval()
        cache = Cache(self.llm.args) if self.config.apply_causal_mask else None
        found: list[Tensor] = []
        given = start
        try:
            memory = self.encode(source)
            for _ in range(steps):
                known = cache is not None and bool(found)
                out = self.llm(_inputs("start", given), memory=None if known else memory, cache=cache)
                found.append(out.outputs[:, -1:])
                given = found[-1] if cache is not None else torch.cat([given, found[-1]], dim=1)
        finally:
            self.train(trained)
        return torch.cat(found, dim=1) if found else start.new_zeros(len(start), 0, self.config.output_dim)


class _Written:
    """What `decode` has made of a target so far."""

    def __init__(self, memory: Tensor, target: Tensor, outputs: Tensor) -> None:
        self.memory, self.target, self.outputs = memory, target, outputs

    def reads(self, memory: Tensor) -> bool:
        """Whether it is of this memory."""
        return self.memory.shape == memory.shape and torch.equal(self.memory, memory)

    def begins(self, target: Tensor) -> bool:
        """Whether it is the beginning of this target, or this one of it."""
        both = min(self.target.shape[1], target.shape[1])
        return torch.equal(self.target[:, :both], target[:, :both])

    def add(self, new: Tensor, outputs: Tensor) -> None:
        """New positions and what was made of them."""
        self.target = torch.cat([self.target, new], dim=1)
        self.outputs = outputs if not self.outputs.shape[1] else torch.cat([self.outputs, outputs], dim=1)
