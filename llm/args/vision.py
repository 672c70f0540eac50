"""The vision tower of a model: from pictures to vectors in the place of token vectors."""

from typing import Literal

from pydantic import Field, model_validator

from llm.args.group import Group


class VisionArgs(Group):
    """Patches, an encoder, and an adapter that makes one vector of several patches. The defaults are those of the
    released Llama 4."""

    kind: Literal["tiles", "native"] = "tiles"
    """tiles: pictures are cut into squares of image_size, each with a class token (Llama 4). native: pictures of any
    size, with windows of image_size in all layers but each fourth and the last (Muse Glimmer)."""
    image_size: int = Field(336, gt=0)
    """Side of a tile or window in pixels."""
    patch_size: int = Field(14, gt=0)
    """Side of a patch in pixels; divides image_size."""
    dim: int = Field(1408, gt=0)
    """Width of the encoder."""
    n_layers: int = Field(34, gt=0)
    """Layers of the encoder."""
    n_heads: int = Field(16, gt=0)
    """Heads of the encoder's attention."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden width of the encoder's feed-forward, in widths of the encoder."""
    output_dim: int = Field(4096, gt=0)
    """Width of what the adapter makes."""
    pixel_shuffle_ratio: float = Field(0.5, gt=0, le=1)
    """Side of the grid of vectors, in sides of the grid of patches."""
    patch_token_id: int = -1
    """Token whose places the vectors take; -1 = the tokenizer's `<|patch|>`."""
    video_token_id: int | None = Field(None, exclude_if=lambda token: token is None)
    """Token whose places vectors of videos take, which are not read: it is refused."""
    max_tiles: int = Field(16, gt=0)
    """Most tiles of a picture, beside the one that shows all of it."""
    norm_eps: float = Field(1e-5, gt=0)
    """Added to the variance in every norm."""
    rope_theta: float = Field(1e4, gt=0)
    """Base of the rotation by rows and columns."""

    @property
    def grid(self) -> int:
        """Patches along a side of a tile or window."""
        return self.image_size // self.patch_size

    @property
    def places(self) -> int:
        """Places that have a learned vector: those of the grid, and the class token's."""
        return self.grid**2 + (self.kind == "tiles")

    @property
    def patch_width(self) -> int:
        """Values of a patch: native ones are of two frames, which a still shows twice."""
        return 3 * self.patch_size**2 * (2 if self.kind == "native" else 1)

    @property
    def ffn_width(self) -> int:
        """Hidden width of the encoder's feed-forward."""
        return round(self.dim * self.mlp_ratio)

    @property
    def shuffled_side(self) -> int:
        """Patches along a side of those that become one vector."""
        return round(1 / self.pixel_shuffle_ratio)

    @property
    def tokens_per_tile(self) -> int:
        """Vectors, and so tokens, of a tile, or of a picture of that size."""
        return (self.grid // self.shuffled_side) ** 2

    @model_validator(mode="after")
    def _check(self) -> "VisionArgs":
        if self.image_size % self.patch_size:
            raise ValueError(f"model.vision.patch_size={self.patch_size} does not divide image_size={self.image_size}")
        if self.dim % self.n_heads or self.dim // self.n_heads % 4:
            raise ValueError(
                f"model.vision.n_heads={self.n_heads}: heads of dim={self.dim} must have a width that 4 divides, as "
                f"pairs are rotated by rows and by columns"
            )
        side = 1 / self.pixel_shuffle_ratio
        if not side.is_integer() or self.grid % round(side):
            raise ValueError(
                f"model.vision.pixel_shuffle_ratio={self.pixel_shuffle_ratio} must be 1/n with n a divisor of the "
                f"{self.grid} patches of a side"
            )
        return self
