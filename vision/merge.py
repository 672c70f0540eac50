"""Where the vectors of images stand: each takes the place of one token, in order.

Shapes: B rows, T tokens, N = B * T, n tiles, S pixels a side, K slots, D width of the text model.
"""

import torch
from torch import Tensor

from llm.args import VisionArgs
from llm.datatypes import TransformerInput
from vision.levels import normalised


def tiles_of(inputs: TransformerInput, vision: VisionArgs) -> Tensor | None:
    """The tiles (n, 3, S, S) as the tower reads them; None without images. ValueError on another shape or dtype."""
    images, side = inputs.images, vision.image_size
    if images is None or not len(images):
        return None
    if images.ndim != 4 or images.shape[1:] != (3, side, side):
        raise ValueError(
            f"images must be tiles (n, 3, {side}, {side}), as model.vision.image_size says; got {tuple(images.shape)}"
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images must be uint8 levels or floats; got {images.dtype}")
    return normalised(images) if images.dtype == torch.uint8 else images


def blank(vision: VisionArgs, device: torch.device) -> Tensor:
    """One grey tile, for a forward whose ranks must all do the tower's work."""
    return torch.zeros(1, 3, vision.image_size, vision.image_size, device=device)


def slots_of(tokens_BT: Tensor, n_tiles: int, vision: VisionArgs) -> Tensor:
    """Where vectors of images stand in the flattened tokens, (K,) int64. ValueError where there are more or fewer than
    the tiles fill."""
    slots = (tokens_BT.flatten() == vision.patch_token_id).nonzero().flatten()
    expected = n_tiles * vision.tokens_per_tile
    if len(slots) != expected:
        raise ValueError(
            f"{n_tiles} tiles of images fill {expected} slots, but the tokens have {len(slots)} of id "
            f"{vision.patch_token_id} (model.vision.patch_token_id)"
        )
    return slots


def merged(vectors_BTD: Tensor, slots_K: Tensor, seen_KD: Tensor) -> Tensor:
    """Token vectors with those of images in their slots."""
    flat = vectors_BTD.flatten(0, 1).index_copy(0, slots_K, seen_KD.to(vectors_BTD.dtype))
    return flat.view_as(vectors_BTD)
