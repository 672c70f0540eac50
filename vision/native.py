"""The vision tower of Muse Glimmer: pictures of any size, whose patches lie side by side in one row.

Against Llama 4's: patches of two frames, which a still shows twice; no class token; learned vectors of a grid that is
stretched over each picture; most layers see windows of a picture only; and neighbouring patches that become one vector
are interleaved, not side by side.

Shapes: H x W pixels of a picture, P of a patch, h x w patches of a picture, N patches of all pictures, G patches of a
window's side and of the learned grid's, s of a vector's side, K vectors, C width of the encoder, O of the adapter.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from llm.args import AttentionSpec
from llm.kernels.attention import full_attention
from llm.kernels.scores import PLAIN
from llm.layers.context import Context
from vision.encoder import Encoder, Through, spread
from vision.patches import angles, places, unfolded


class NativeTower(Encoder):
    """See the top of this file; its parameters are an Encoder's."""

    def forward(self, images: Sequence[Tensor], through: Through, keys_K: Tensor | None = None) -> Tensor:
        """(K, O), picture after picture, of float pictures (3, H, W). keys_K: as of `Tower.forward`."""
        vision, side = self.vision, self.vision.shuffled_side
        grids = [(image.shape[1] // vision.patch_size, image.shape[2] // vision.patch_size) for image in images]
        pixels = torch.cat([unfolded(image[None], vision.patch_size)[0] for image in images])
        patches = self.patch(torch.cat([pixels, pixels], dim=-1).to(self.patch.weight.dtype))
        table_GGC = self.pos_embedding.unflatten(0, (vision.grid, vision.grid))
        x = self.norm_pre(patches + torch.cat([stretched(table_GGC, *grid) for grid in grids]))
        in_windows, lengths = windows(grids, vision.grid)
        order_N = in_windows.to(x.device)
        ctx = self._context_of(grids, lengths, order_N, keys_K)
        x = x[order_N][None]
        for layer in range(vision.n_layers):
            x, _ = through(f"layers.{layer}", x, ctx)
        x = self.norm(x[0][order_N.argsort()])
        parts = x.split([rows * columns for rows, columns in grids])
        merged = torch.cat([interleaved(part, *grid, side) for part, grid in zip(parts, grids, strict=True)])
        vectors: Tensor = self.adapter(merged, keys_K)
        return vectors

    def _context_of(
        self, grids: Sequence[tuple[int, int]], lengths: Sequence[int], order_N: Tensor, keys_K: Tensor | None
    ) -> Context:
        """What the layers share, of patches in the order of windows of these lengths."""
        vision, sizes = self.vision, [rows * columns for rows, columns in grids]
        where_2N = torch.cat([places(*grid, order_N.device) for grid in grids], dim=1)[:, order_N]
        keys_N = None
        if keys_K is not None:
            starts = [sum(sizes[:i]) // vision.shuffled_side**2 for i in range(len(sizes))]
            of_each = [spread(keys_K[start : start + 1], size) for start, size in zip(starts, sizes, strict=True)]
            keys_N = torch.cat(of_each)[order_N]
        return Context(
            shape=(1, sum(sizes)),
            attend=partial(_attend, {"full": sizes, "window": lengths}),
            rotation_BT1m=angles(where_2N, vision.dim // vision.n_heads, vision.rope_theta),
            keys_N=keys_N,
        )


def _attend(
    lengths: dict[str, Sequence[int]],
    layer: int,
    spec: AttentionSpec,
    q_BTHd: Tensor,
    k_BTKd: Tensor,
    v_BTKd: Tensor,
) -> Tensor:
    """Attention within each picture, or within each window."""
    parts = (x.split(list(lengths[spec.mask]), dim=1) for x in (q_BTHd, k_BTKd, v_BTKd))
    return torch.cat([full_attention(q, k, v, PLAIN) for q, k, v in zip(*parts, strict=True)], dim=1)


def windows(grids: Sequence[tuple[int, int]], side: int) -> tuple[Tensor, list[int]]:
    """(numbers of all patches (N,) int64 in the order of windows, row by row in each, patches of each window): every
    picture is cut from its upper left corner, so that the last ones may be smaller."""
    order, lengths, first = [], [], 0
    for rows, columns in grids:
        number = torch.arange(first, first + rows * columns).view(rows, columns)
        for band in number.split(side):
            for window in band.split(side, dim=1):
                order.append(window.flatten())
                lengths.append(window.numel())
        first += rows * columns
    return torch.cat(order), lengths


def stretched(table_GGC: Tensor, rows: int, columns: int) -> Tensor:
    """The learned vectors of a grid as those of another, (h w, C): bilinear between centres, with zeros around."""
    across_hG, along_wG = (_taps(n, len(table_GGC), table_GGC) for n in (rows, columns))
    return torch.einsum("hi,wj,ijc->hwc", across_hG, along_wG, table_GGC).flatten(0, 1)


def _taps(n: int, grid: int, like: Tensor) -> Tensor:
    """How much of each of `grid` places stands in each of n that cover the same length, (n, grid)."""
    at = (torch.arange(n, device=like.device, dtype=torch.float32) + 0.5) * grid / n - 0.5
    far = (at[:, None] - torch.arange(grid, device=like.device)).abs()
    return (1 - far).clamp(min=0).to(like.dtype)


def interleaved(patches: Tensor, rows: int, columns: int, side: int) -> Tensor:
    """(h w, C) -> (h w / s^2, C s^2), row by row: of each s x s patches first the values of channel 0, then of 1."""
    cut = patches.view(rows // side, side, columns // side, side, -1)
    return cut.permute(0, 2, 4, 1, 3).reshape(rows * columns // side**2, -1)
