"""What all layers of one forward share.

Shapes: B batch, T tokens, m rotated pairs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llm.args import LayerSpec, ModelArgs
from llm.layers.masks import Attend
from llm.layers.rope import amplitude, dynamic_frequencies, inverse_frequencies, rotation


@dataclass(frozen=True)
class Context:
    """What all layers of one forward share; made once from the positions."""

    rotation_BT1m: Tensor | None
    """complex64, for RoPE layers."""
    temperature_BT11: Tensor | None
    """float32, for layers with temperature tuning."""
    attend: Attend
    """Attention over the batch itself, or over a cache."""
    shape: tuple[int, int]
    """Rows B and tokens T of the batch."""
    valid_BT: Tensor | None = None
    """bool: false for padding; None where there is none."""

    @classmethod
    def build(
        cls,
        args: ModelArgs,
        specs: tuple[LayerSpec, ...],
        positions_BT: Tensor,
        attend: Attend,
        shape: tuple[int, int],
        lengths_BT: Tensor | None = None,
        valid_BT: Tensor | None = None,
    ) -> "Context":
        """positions_BT: int64, (1, T) where all rows agree, on the device of the layers. lengths_BT: positions of each
        token's document, for frequencies that depend on them."""
        width, theta, scaling = args.rotated_width, args.rope_theta, args.rope_scaling
        frequency = inverse_frequencies(width, theta, scaling)
        if scaling is not None and lengths_BT is not None:
            frequency = dynamic_frequencies(lengths_BT, width, theta, scaling)
        rope = any(spec.rope for spec in specs)
        return cls(
            rotation_BT1m=rotation(positions_BT, frequency, amplitude(scaling)) if rope else None,
            temperature_BT11=temperature(args, positions_BT) if any(spec.temperature for spec in specs) else None,
            attend=attend,
            shape=shape,
            valid_BT=valid_BT,
        )


def temperature(args: ModelArgs, positions_BT: Tensor) -> Tensor:
    """Factor on the queries of each position, float32 (B, T, 1, 1); 1 below floor_scale - 1."""
    steps_BT = (positions_BT.clamp(min=0) + 1) // args.floor_scale
    return (1 + args.attn_scale * torch.log1p(steps_BT.float()))[..., None, None]
