"""A small Hyformer and rows for it, that the tests of this folder share."""

import torch
from torch import Tensor

from llm.siblings.hyformer import Hyformer, HyformerConfig

VOCAB = 50
SIZES = {"vocab_size": VOCAB, "d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 16}


def config(**changes: object) -> HyformerConfig:
    return HyformerConfig(**SIZES | {"model_args": {"ffn_hidden": 32, "init_std": 0.2}} | changes)


def hyformer(seed: int = 0, **changes: object) -> Hyformer:
    """Initial values of a size at which attention prefers something."""
    torch.manual_seed(seed)
    return Hyformer.from_config(config(**changes)).eval()


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, shape or (3, 7), generator=torch.Generator().manual_seed(seed))


def padded(*lengths: int, longest: int = 7) -> Tensor:
    """An attention_mask of rows that are padded on the right."""
    return (torch.arange(longest) < torch.tensor(lengths)[:, None]).float()
