"""What enters the first layer: vectors of tokens and of pictures, or of values, and what is added to them.

Shapes: B batch, T tokens, S source tokens, D model width; with sequence parallelism each rank has its own n of the
tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llm.args import ModelArgs
from llm.args.lora import TOWER
from llm.datatypes import RouterStats, TransformerInput
from llm.kernels.norms import rms_normalise
from llm.layers.context import Context
from llm.layers.dropout import Dropout
from llm.layers.embedding import Embedding
from llm.layers.encoder import Encoder
from llm.layers.features import FeatureEmbedding
from llm.layers.region import InRegion
from vision.adapter import Projection
from vision.encoder import Encoder as VisionEncoder
from vision.merge import with_images


class Embeds(InRegion):
    """Methods of LLM that embed."""

    args: ModelArgs
    tok_embeddings: Embedding | FeatureEmbedding
    embed_dropout: Dropout | None
    vision_embeddings: VisionEncoder
    vision_projection: Projection
    encoder: Encoder
    gathers_weights: bool
    _through: Callable[..., tuple[Tensor, RouterStats | None]]

    def embed(self, inputs: TransformerInput, ctx: Context) -> Tensor:
        """(B, T, D), or (n, D) of this rank's tokens where they are cut."""
        return self._embedded(inputs, ctx, self)  # type: ignore[arg-type]  # a model is a module

    def embed_source(self, inputs: TransformerInput, ctx: Context) -> Tensor:
        """The same of the source's side, by the token table of both sides and what the encoder has of its own."""
        assert inputs.source is not None and ctx.source is not None
        return self._embedded(inputs.source, ctx.source, self.encoder)

    def _embedded(self, inputs: TransformerInput, ctx: Context, side: nn.Module) -> Tensor:
        """Token vectors, and in the slots of images the tower's: both are terms of one sum over the ranks. Of values
        what the linear map makes, which is whole. side: what has the modules of this side."""
        if isinstance(self.tok_embeddings, FeatureEmbedding):
            x_BTD: Tensor = side.tok_embeddings(inputs.features, ctx.cut_sequence)  # type: ignore[operator]
        else:
            x_BTD = self.tok_embeddings(inputs.tokens)
            if self.args.vision is not None:
                parts = self.args.vision, self.vision_embeddings, self.vision_projection
                x_BTD = with_images(x_BTD, inputs, ctx, *parts, self._through_tower, self.gathers_weights)
            x_BTD = self.region.leave(x_BTD, ctx.cut_sequence)
        if self.args.embed_scale is not None:
            # rounded on the host: a number made on a GPU would make the host wait for it
            x_BTD = x_BTD * torch.tensor(self.args.embed_scale, dtype=x_BTD.dtype, device="cpu").item()
        if self.args.embed_norm:
            x_BTD = rms_normalise(x_BTD, self.args.norm_eps)
        if ctx.positions_BT is not None:
            x_BTD = x_BTD + self._of_positions(side, ctx.positions_BT.clamp(min=0), ctx).to(x_BTD.dtype)
        if self.args.input_norm:
            x_BTD = side.input_norm(x_BTD)  # type: ignore[operator]
        return x_BTD if self.embed_dropout is None else self.embed_dropout(x_BTD, ctx.residual_keys_n)

    def _of_positions(self, side: nn.Module, positions_BT: Tensor, ctx: Context) -> Tensor:
        """What is added to token vectors, of this rank's tokens alone where they are cut."""
        if ctx.cut_sequence:
            positions_BT = self.region.own(positions_BT.expand(ctx.shape).flatten())
        vectors: Tensor = side.pos_embeddings(positions_BT)  # type: ignore[operator]  # a module or a function
        return vectors

    def _through_tower(self, name: str, x: Tensor, ctx: Context) -> tuple[Tensor, RouterStats | None]:
        return self._through(f"{TOWER}.{name}", x, ctx)
