"""The vision tower of Llama 4: tiles of pixels become vectors that stand in the place of token vectors.

A tile is cut into patches, each a linear map of its pixels; a class token follows them, learned vectors are added for
places, and the layers of the text model's own kind follow, in which everything within a tile sees everything else. The
adapter makes one vector of several patches.

Shapes: n tiles, S pixels a side, P pixels of a patch, G = S / P patches a side, L = G^2 + 1 with the class token, C
width of the encoder, O width of the adapter's output, H heads, d head width.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from llm.args import AttentionSpec, ModelArgs, VisionArgs
from llm.args.lora import LoraArgs
from llm.datatypes import RouterStats
from llm.init import Draw, Normal
from llm.kernels.attention import full_attention
from llm.kernels.keyed import with_numbers
from llm.layers.block import Block
from llm.layers.context import Context
from llm.layers.linear import Linear
from llm.layers.masks import scores_of
from llm.layers.norm import make_norm, norm_rows
from llm.layers.parameter import ParamInfo, Rows, under
from vision.adapter import Adapter, shuffled
from vision.patches import angles, places, unfolded

FULL_EVERY = 4
"""Of the layers of a native tower each so many-th, and the last, sees a picture as a whole."""
Through = Callable[[str, Tensor, Context], tuple[Tensor, RouterStats | None]]
"""Runs a layer of the tower, by its name in the tower, compiled or recomputed as the model wants it."""


def layer_args(vision: VisionArgs, lora: LoraArgs | None = None) -> ModelArgs:
    """Those of a text model with the tower's layers."""
    windows: dict[str, Any] = {}
    if vision.kind == "native":
        full = [(i + 1) % FULL_EVERY == 0 or i == vision.n_layers - 1 for i in range(vision.n_layers)]
        pattern = ["attn:full" if everything else "attn:window" for everything in full]
        windows = {"layer_pattern": pattern, "sliding_window": vision.grid**2, "rope_interleaved": False}
    return ModelArgs(
        dim=vision.dim,
        n_layers=vision.n_layers,
        n_heads=vision.n_heads,
        ffn_hidden=vision.ffn_width,
        act="gelu",
        gated=False,
        ffn_bias=True,
        qkv_bias=True,
        o_bias=True,
        norm="layer",
        norm_eps=vision.norm_eps,
        rope_theta=vision.rope_theta,
        lora=lora,
        **windows,
    )


class Encoder(nn.Module):
    """What the towers have in common: their parameters. With tensor parallelism the layers are cut by heads and widths
    as the text model's are, and what lies between them is whole on every rank."""

    def __init__(self, vision: VisionArgs, lora: LoraArgs | None = None) -> None:
        """lora: its targets are names within the tower."""
        super().__init__()
        self.vision, args = vision, layer_args(vision, lora)
        if vision.kind == "tiles":
            self.class_embedding = nn.Parameter(torch.empty(vision.dim))
        self.pos_embedding = nn.Parameter(torch.empty(vision.places, vision.dim))
        self.patch = Linear(vision.patch_width, vision.dim)
        self.norm_pre = make_norm(args, vision.dim)
        self.layers = nn.ModuleList(Block(args, spec) for spec in args.layer_specs())
        self.norm = make_norm(args, vision.dim)
        self.adapter = Adapter(vision, lora)

    @staticmethod
    def declare(vision: VisionArgs, lora: LoraArgs | None = None) -> Rows:
        """What the parameters are: see llm/layers/parameter.py. A matrix begins with the variance 1 / n_in: with one
        value for all, as the text model has, small towers were measured to stay blind.
        """
        args, draw = layer_args(vision, lora), Normal(1 / math.sqrt(vision.dim))
        learned = ParamInfo((vision.dim,), "embedding", draw, in_region=False, active=0.0)
        patch = Linear.declare(vision.patch_width, vision.dim, False, draw, tensor_dim=None)["weight"]
        rows = {"class_embedding": learned} if vision.kind == "tiles" else {}
        rows["pos_embedding"] = replace(learned, shape=(vision.places, vision.dim))
        rows["patch.weight"] = replace(patch, in_region=False, may_be_int8=False)
        rows |= under("norm_pre", norm_rows(args, vision.dim))
        for spec in args.layer_specs():
            rows |= under(f"layers.{spec.index}", Block.declare(args, spec))
        rows |= under("norm", norm_rows(args, vision.dim))
        rows |= under("adapter", Adapter.declare(vision, draw, lora))
        return {name: replace(row, init=_begins(row)) for name, row in rows.items()}


class Tower(Encoder):
    """See the top of this file."""

    def forward(self, tiles: Tensor, through: Through, keys_K: Tensor | None = None) -> Tensor:
        """(n, tokens_per_tile, O) of float tiles (n, 3, S, S). keys_K: of the vectors that it makes (see
        `Context.keys_N`)."""
        vision = self.vision
        patches = self.patch(unfolded(tiles.to(self.class_embedding.dtype), vision.patch_size))
        x = torch.cat([patches, self.class_embedding.expand(len(tiles), 1, -1)], dim=1) + self.pos_embedding
        x, ctx = self.norm_pre(x), self._context(x, keys_K)
        for layer in range(vision.n_layers):
            x, _ = through(f"layers.{layer}", x, ctx)
        vectors: Tensor = self.adapter(shuffled(self.norm(x)[:, :-1], vision.shuffled_side), keys_K)
        return vectors

    def _context(self, x_nLC: Tensor, keys_K: Tensor | None) -> Context:
        """What the layers share; no rank has tokens of its own: tiles are few, and their tokens odd in number."""
        vision, (n_tiles, length, _) = self.vision, x_nLC.shape
        where_2L = pad(places(vision.grid, vision.grid, x_nLC.device), (0, 1))
        return Context(
            shape=(n_tiles, length),
            attend=_attend,
            rotation_BT1m=angles(where_2L, vision.dim // vision.n_heads, vision.rope_theta),
            keys_N=None if keys_K is None else spread(keys_K[:: vision.tokens_per_tile], length),
        )


def _attend(layer: int, spec: AttentionSpec, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
    return full_attention(q_BTHd, k_BTKd, v_BTKd, scores_of(spec))


def spread(keys_n: Tensor, length: int) -> Tensor:
    """A key for each place of each tile, of a key for each tile."""
    return with_numbers(keys_n[:, None], torch.arange(length, device=keys_n.device)).flatten()


def _begins(row: ParamInfo) -> Draw:
    return Normal(1 / math.sqrt(row.shape[1])) if row.kind == "matrix" else row.init
