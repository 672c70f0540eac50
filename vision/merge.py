"""Where the vectors of images stand: each takes the place of one token, in order.

Shapes: B rows, T tokens, n tiles, S pixels a side, H x W of a picture, K slots, D width of the text model.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from llm.args import VisionArgs
from llm.datatypes import TransformerInput
from llm.layers.context import Context
from vision.encoder import Through
from vision.levels import normalised

Images = Tensor | Sequence[Tensor]
"""Tiles (n, 3, S, S), or, for a native tower, pictures (3, H, W)."""


def images_of(inputs: TransformerInput, vision: VisionArgs) -> Images | None:
    """The images as the tower reads them; None without. ValueError on another shape or dtype."""
    images = inputs.images
    if images is None or not len(images):
        return None
    if vision.kind == "native":
        return [_read(image, vision) for image in images]
    side = vision.image_size
    if not isinstance(images, Tensor) or images.shape[1:] != (3, side, side):
        raise ValueError(
            f"images must be tiles (n, 3, {side}, {side}), as model.vision.image_size says; got {_shapes(images)}"
        )
    return _floats(images)


def _read(image: Tensor, vision: VisionArgs) -> Tensor:
    unit = vision.patch_size * vision.shuffled_side
    if image.ndim != 3 or len(image) != 3 or any(side == 0 or side % unit for side in image.shape[1:]):
        raise ValueError(
            f"images must be (3, H, W) with sides that {unit} divides (model.vision.patch_size times the patches of a "
            f"vector); got {tuple(image.shape)}"
        )
    return _floats(image)


def _floats(images: Tensor) -> Tensor:
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images must be uint8 levels or floats; got {images.dtype}")
    return normalised(images) if images.dtype == torch.uint8 else images


def _shapes(images: Images) -> str:
    return str(tuple(images.shape)) if isinstance(images, Tensor) else str([tuple(image.shape) for image in images])


def blank(vision: VisionArgs, device: torch.device) -> Images:
    """One grey image, as small as can be, for a forward whose ranks must all do the tower's work."""
    if vision.kind == "native":
        side = vision.patch_size * vision.shuffled_side
        return [torch.zeros(3, side, side, device=device)]
    return torch.zeros(1, 3, vision.image_size, vision.image_size, device=device)


def slots_of(tokens_BT: Tensor, images: Images | None, vision: VisionArgs) -> Tensor:
    """Where vectors of images stand in the flattened tokens, (K,) int64. ValueError where there are more or fewer than
    the images fill, or, on a CPU, one of a video.
    """
    video = vision.video_token_id
    if video is not None and tokens_BT.device.type == "cpu" and bool((tokens_BT == video).any()):
        raise ValueError(f"token {video} stands for a video (model.vision.video_token_id), and only images are read")
    slots = (tokens_BT.flatten() == vision.patch_token_id).nonzero().flatten()
    images = () if images is None else images
    if vision.kind == "native":
        what, unit = "images", (vision.patch_size * vision.shuffled_side) ** 2
        expected = sum(image.shape[1] * image.shape[2] // unit for image in images)
    else:
        what, expected = "tiles of images", len(images) * vision.tokens_per_tile
    if len(slots) != expected:
        raise ValueError(
            f"{len(images)} {what} fill {expected} slots, but the tokens have {len(slots)} of id "
            f"{vision.patch_token_id} (model.vision.patch_token_id)"
        )
    return slots


def merged(vectors_BTD: Tensor, slots_K: Tensor, seen_KD: Tensor) -> Tensor:
    """Token vectors with those of images in their slots."""
    flat = vectors_BTD.flatten(0, 1).index_copy(0, slots_K, seen_KD.to(vectors_BTD.dtype))
    return flat.view_as(vectors_BTD)


def with_images(
    x_BTD: Tensor,
    inputs: TransformerInput,
    ctx: Context,
    vision: VisionArgs,
    tower: nn.Module,
    projection: nn.Module,
    through: Through,
    gathers_weights: bool,
) -> Tensor:
    """Token vectors x with those of the inputs' images in their slots. Where the tower or its projection trains, or
    ranks with other rows gather weights together, and there are no images, a blank one, whose vectors go nowhere, gives
    each rank the same work and gradients. Rows that continue a cache are those of all ranks.
    """
    images, grad = images_of(inputs, vision), torch.is_grad_enabled()
    tower_trains, projection_trains = (
        grad and any(p.requires_grad for p in part.parameters()) for part in (tower, projection)
    )
    on_cpu = inputs.tokens.device.type == "cpu"
    together = gathers_weights and ctx.states is None
    if images is None and not (tower_trains or projection_trains or together):
        if on_cpu and ctx.states is None:  # a text that goes on may have made the token by itself
            slots_of(inputs.tokens, None, vision)
        return x_BTD
    slots_K = slots_of(inputs.tokens, images, vision)
    keys_K = None if images is None or ctx.keys_N is None else ctx.keys_N[slots_K]
    with nullcontext() if tower_trains else torch.no_grad():
        seen = tower(blank(vision, x_BTD.device) if images is None else images, through, keys_K)
    return merged(x_BTD, slots_K, projection(seen.flatten(0, -2), keys_K)[: len(slots_K)])
