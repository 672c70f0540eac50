"""A small model with a tokenizer, in memory and as a folder."""

from functools import cache
from pathlib import Path

import torch

from llm import LLM
from llm.tokenizer import ByteTokenizer, Tokenizer
from tests.model.models import llama4

CONTEXT = 64


def with_tokenizer(seed: int = 0, **changes: object) -> LLM:
    """More rows than its tokenizer knows (258), one of which is always the likeliest."""
    model = llama4(seed, **(dict(vocab_size=272, max_seq_len=CONTEXT, tie_embeddings=False) | changes))
    model.tokenizer = ByteTokenizer()
    return model


@cache
def shared_model() -> LLM:
    """One that no test may change."""
    return with_tokenizer()


def folder(path: Path, tokenizer: Tokenizer | None = None, **changes: object) -> Path:
    """The model as a folder of ours."""
    with_tokenizer(**changes).save_pretrained(path, tokenizer or ByteTokenizer())
    return path


def with_nan(path: Path) -> Path:
    """A folder of a model one weight of which is no number."""
    model = with_tokenizer()
    with torch.no_grad():
        model.layers[1].feed_forward.w2.weight[0, 0] = torch.nan
    model.save_pretrained(path, ByteTokenizer())
    return path
