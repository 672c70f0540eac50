"""Keys of models that read or say values instead of tokens, and what they must agree with."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm.args.model import ModelArgs

SCALES = (("input_dim", "input_mean", "input_std"), ("output_dim", "output_mean", "output_std"))
"""Of each side: how many numbers there are, and how they are scaled."""


def check_values(args: "ModelArgs") -> None:
    """ValueError naming the key where these do not go with the rest of the model."""
    side = next((key for key, _, _ in SCALES if getattr(args, key) is not None), None)
    if side is not None and args.tie_embeddings:
        raise ValueError(
            f"model.tie_embeddings=true: one table is of models of tokens on both sides; model.{side}="
            f"{getattr(args, side)}"
        )
    if args.input_dim is not None and args.vision is not None:
        raise ValueError(f"model.input_dim={args.input_dim}: a model of values has no slots for images (model.vision)")
    named = () if args.lora is None else args.lora.targets or ()
    for side, target in (("input_dim", "tok_embeddings"), ("output_dim", "output")):
        if getattr(args, side) is None:
            continue
        if target in named:
            raise ValueError(f"lora.targets={target}: adapters are of tables of tokens; model.{side}="
                             f"{getattr(args, side)}")  # fmt: skip
        if args.lora is not None and args.lora.token_rows is not None:
            raise ValueError(f"lora.token_rows: of tables of tokens; model.{side}={getattr(args, side)}")
    for side, *keys in SCALES:
        n = getattr(args, side)
        for key in keys:
            numbers = getattr(args, key)
            if numbers is None:
                continue
            given = f"model.{key}={list(numbers)}"
            if n is None or len(numbers) != n:
                raise ValueError(f"{given}: there must be one number for each of model.{side}={n}")
            low = "std" in key
            if not all(math.isfinite(number) for number in numbers) or (low and min(numbers) <= 0):
                raise ValueError(f"{given}: numbers must be finite{', and above 0' if low else ''}")
