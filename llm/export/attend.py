"""Attention by masks of positions, as tensors of the graph; what a graph gives the layers as their Context.

Shapes: B batch, T new tokens, S earlier ones, L layers, H query heads, K kv heads, d head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llm.args import AttentionSpec, LayerSpec, ModelArgs
from llm.args.layers import attention_specs
from llm.kernels.attention import masked_attention
from llm.layers.context import Context, temperature
from llm.layers.masks import Attend, scores_of, seen_by_position
from llm.layers.positions import POSITIONS
from llm.layers.rope import amplitude, inverse_frequencies, turns


class GraphAttend:
    """Attention of tokens to those of the same row, by position; a negative one is padding. Each row is one document.
    """

    def __init__(self, positions_BT: Tensor, causal: bool, keys_positions_BS: Tensor | None = None) -> None:
        """keys_positions_BS: of all keys, where those are not the tokens' own alone. B = 1 where rows have the same."""
        self._query = positions_BT[:, None, :, None]
        keys = positions_BT if keys_positions_BS is None else keys_positions_BS
        self._key = keys[:, None, None, :]
        self._causal = causal

    def __call__(self, layer: int, spec: AttentionSpec, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        seen = seen_by_position(self._query, self._key, spec.mask, spec.span, self._causal)
        return _attended(spec, q_BTHd, k_BTKd, v_BTKd, seen)


class StepAttend(GraphAttend):
    """The same to what went before, too: keys and values of earlier tokens come with the call, and leave it longer."""

    def __init__(
        self, positions_BT: Tensor, past_positions_BS: Tensor, past_keys: Tensor, past_values: Tensor
    ) -> None:
        """past_keys, past_values: (L, B, S, K, d)."""
        self.positions = torch.cat([past_positions_BS, positions_BT], dim=1)
        super().__init__(positions_BT, True, self.positions)
        self._past = past_keys, past_values
        self._made: list[tuple[Tensor, Tensor]] = []

    def __call__(self, layer: int, spec: AttentionSpec, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        k, v = (torch.cat([past[layer], new], dim=1) for past, new in zip(self._past, (k_BTKd, v_BTKd), strict=True))
        self._made.append((k, v))
        return super().__call__(layer, spec, q_BTHd, k, v)

    def remembered(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, (L, B, S + T, K, d)."""
        keys, values = zip(*self._made, strict=True)
        return torch.stack(keys), torch.stack(values)


class GraphAcross:
    """Attention of a decoder's tokens to the source of the same row, which is one document; padding is not seen."""

    def __init__(
        self, source_positions_BS: Tensor, keys: Tensor | None = None, values: Tensor | None = None
    ) -> None:
        """keys, values: (L, B, S, K, d), where they come with the call; otherwise the layers make them of a memory."""
        self._seen = (source_positions_BS >= 0)[:, None, None, :]
        self._keys, self._values = keys, values

    def __call__(
        self, layer: int, spec: AttentionSpec, q_BTHd: Tensor, k_BSKd: Tensor | None, v_BSKd: Tensor | None
    ) -> Tensor:
        if k_BSKd is None or v_BSKd is None:
            assert self._keys is not None and self._values is not None
            k_BSKd, v_BSKd = self._keys[layer], self._values[layer]
        return _attended(spec, q_BTHd, k_BSKd, v_BSKd, self._seen)


def _attended(spec: AttentionSpec, q_BTHd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor, seen_B1TS: Tensor) -> Tensor:
    groups = q_BTHd.shape[2] // k_BSKd.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) if groups > 1 else x for x in (k_BSKd, v_BSKd))
    q, k, v = (x.transpose(1, 2) for x in (q_BTHd, k, v))
    return masked_attention(q, k, v, seen_B1TS, scores_of(spec)).transpose(1, 2)


def graph_context(
    args: ModelArgs, specs: Sequence[LayerSpec], tokens_BT: Tensor, positions_BT: Tensor, attend: Attend
) -> Context:
    """What the layers of these specs share in one forward of a graph: as llm/contexts.py makes it, of tensors alone."""
    attention = attention_specs(specs)
    rotation = None
    if any(spec.rope for spec in attention):
        frequency = inverse_frequencies(args.rotated_width, args.rope_theta, args.rope_scaling)
        rotation = turns(positions_BT, frequency, amplitude(args.rope_scaling))
    return Context(
        shape=(tokens_BT.shape[0], tokens_BT.shape[1]),
        attend=attend,
        rotation_BT1m=rotation,
        positions_BT=None if POSITIONS[args.pos].build is None else positions_BT,
        temperature_BT11=temperature(args, positions_BT) if any(spec.temperature for spec in attention) else None,
    )
