"""Rows of tokens, and of tokens and tiles, by which two models are compared.

Shapes: T tokens, n tiles, S side of a tile.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from llm.args import ModelArgs

ROW = 256
"""Tokens of a row."""
TILES = (1, 3)
"""Tiles of the rows with pictures."""


def random_rows(args: ModelArgs, tokens: int) -> Iterator[Tensor]:
    """Ids at random, which visit all of the table but the slots of images, in rows of up to ROW."""
    generator = torch.Generator().manual_seed(0)
    for ids in torch.randint(args.vocab_size, (tokens,), generator=generator).split(ROW):
        yield without_slots(args, ids)


def without_slots(args: ModelArgs, ids: Tensor) -> Tensor:
    """Ids with others in the place of slots, which no image is there for, and of videos, which are not read."""
    if args.vision is None:
        return ids
    tokens = (args.vision.patch_token_id, args.vision.video_token_id)
    taken = [token for token in tokens if token is not None]
    other = next(i for i in range(args.vocab_size) if i not in taken)
    for token in taken:
        ids = ids.where(ids != token, other)
    return ids


def picture_rows(args: ModelArgs) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids (T,), tiles (n, 3, S, S)) of a model that reads tiles: text around the slots of random ones."""
    vision = args.vision
    if vision is None or vision.kind != "tiles":
        return
    generator = torch.Generator().manual_seed(0)
    for n_tiles in TILES:
        text = torch.randint(args.vocab_size, (n_tiles + 1, 5), generator=generator)
        parts = list(without_slots(args, text))
        slots = torch.full((vision.tokens_per_tile,), vision.patch_token_id)
        ids = torch.cat([part for each in parts[:-1] for part in (each, slots)] + parts[-1:])
        side = vision.image_size
        yield ids, torch.rand((n_tiles, 3, side, side), generator=generator) * 2 - 1
