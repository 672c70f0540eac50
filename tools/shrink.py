"""A config made small, which every layout of the full one still fits: for checks that a laptop can run."""

import math
from typing import Any

from llm.args import ModelArgs
from llm.train.config import RunConfig, validate

WIDTH, HEAD_WIDTH, HIDDEN, SEQ_LEN = 64, 16, 64, 128
"""Smallest sizes worth a check: small enough to run anywhere, large enough that every cut leaves several of each."""
CHUNKS_PER_ROW = 4
"""Chunks or windows of a row, and steps of the attention temperature in it."""


def shrunk(config: RunConfig, ranks: int) -> RunConfig:
    """The config with fewer layers, all kinds among them, narrower, with fewer experts and shorter, fewer rows.

    What a layout of up to `ranks` ranks must divide keeps its divisors up to `ranks`, and heads keep their numbers.
    """
    args, train = config.model, config.train
    seq_len = alike(train.seq_len, SEQ_LEN, ranks)
    source_len = alike(config.source_len or seq_len, SEQ_LEN, ranks)
    stages = ranks * (2 if config.parallel.pipeline_schedule == "dualpipev" else 1)  # at most
    batch = alike(math.gcd(train.global_batch_size, *(size for _, size in train.batch_schedule)), stages, ranks)
    model = args.model_dump(mode="json") | {
        "init_from": None,
        "n_layers": max(layers_of_every_kind(args), min(args.n_layers, stages)),  # as many stages as before
        "dim": min(args.dim, WIDTH),
        "head_dim": min(args.head_width, HEAD_WIDTH),
        "ffn_hidden": alike(args.ffn_width(), HIDDEN, ranks),
        "max_seq_len": seq_len,
        "floor_scale": min(args.floor_scale, max(seq_len // CHUNKS_PER_ROW, 1)),
    }
    if args.encoder_layers:
        model["encoder_layers"] = max(layers_of_every_kind(args, encoder=True), min(args.encoder_layers, stages))
        model["max_seq_len"] = max(seq_len, source_len)
    for key in ("attention_chunk_size", "sliding_window"):
        if model[key] is not None:
            model[key] = min(model[key], max(seq_len // CHUNKS_PER_ROW, 1))
    if args.moe is not None:
        model["moe"] |= {
            "n_experts": alike(args.moe.n_experts, args.moe.top_k + 1, ranks),
            "hidden": alike(args.moe_width(), HIDDEN, ranks),
            "dense_layers": [layer for layer in args.moe.dense_layers if layer < _most_layers(model)],
        }
    raw: dict[str, Any] = config.model_dump(mode="json")
    raw["model"] = model
    if config.data.source_len is not None:
        raw["data"]["source_len"] = source_len
    raw["train"] |= {
        "seq_len": seq_len,
        "global_batch_size": batch,
        "micro_batch_size": min(train.micro_batch_size, batch),
        "batch_schedule": [],
        "seq_len_schedule": [],
        "compile": False,
    }
    return validate(raw, "the config made small")


def _most_layers(model: dict[str, Any]) -> int:
    """Of the two sides."""
    return int(max(model["n_layers"], model.get("encoder_layers", 0)))


def layers_of_every_kind(args: ModelArgs, encoder: bool = False) -> int:
    """How many of the first layers, or of an encoder's, have every kind that the model has there."""
    kinds = [spec.kind for spec in (args.encoder_specs() if encoder else args.layer_specs())]
    return max(kinds.index(kind) for kind in set(kinds)) + 1


def alike(number: int, at_least: int, ranks: int) -> int:
    """The smallest number, `at_least` or more, that is divisible by just those of 1 to `ranks` that divide `number`;
    `number` itself where none is smaller."""

    def divisors(n: int) -> list[int]:
        return [rank for rank in range(1, ranks + 1) if n % rank == 0]

    return next((n for n in range(at_least, number) if divisors(n) == divisors(number)), number)
