"""What an evaluation will do and need, from tasks and args alone: for a dry run."""

from collections.abc import Iterator, Sequence
from math import prod

import torch

from llm.args.layers import attention_specs
from llm.boxes import box_shape
from llm.evaluate.evaluation import Model, Questions, Settings, described
from llm.evaluate.requests import Predict, Request, Score
from llm.generation.device import device, dtype_for
from llm.parallel.layout import Layout
from llm.parallel.stages import split
from llm.parameters import ParameterTable


def report(settings: Settings, layout: Layout, asking: Questions) -> str:
    """Tasks with documents, requests and tokens; the layout; memory of a rank and bytes that ranks send."""
    return "".join(f"{line}\n" for line in _lines(settings, layout, asking))


def _lines(settings: Settings, layout: Layout, asking: Questions) -> Iterator[str]:
    model, asked = asking.model, asking.asked
    dtype = dtype_for(settings.model, settings.dtype, device())
    for part in asking.parts:
        requests = [request for document in part.documents for request in document.requests]
        tokens = sum(map(tokens_of, requests))
        yield f"{part.task.name}: {len(part.documents):,} documents, {len(requests):,} requests, {tokens:,} tokens"
    tokens = sum(map(tokens_of, asked.requests))
    yield f"all: {len(asked.requests):,} different requests, {tokens:,} tokens at most"
    yield f"layout of {layout.world} rank{'s' * (layout.world > 1)}: {described(layout)}"
    weights = weight_bytes(model, layout, dtype)
    cache = cache_bytes_per_token(model, layout, dtype) * settings.batch_tokens
    hidden = settings.batch_tokens * model.args.dim * dtype.itemsize
    yield f"in {str(dtype).removeprefix('torch.')}, bytes of a rank:"
    yield _row("weights", weights)
    yield _row("keys, values", [cache], f"at most, of --batch_tokens={settings.batch_tokens}")
    yield _row("hidden states", [hidden], "of each tensor between layers")
    if layout.pipeline > 1:
        sent = model.args.dim * dtype.itemsize * (layout.stages - 1) * tokens
        yield f"  stages send {sent:,} bytes in all: the hidden state of each token to each next stage"
    if layout.tensor > 1:
        reduced = 2 * model.args.n_layers * model.args.dim * dtype.itemsize * tokens
        sent = 2 * (layout.tensor - 1) * reduced
        yield f"  tensor ranks send {sent:,} bytes in all for sums after attention and feed-forward, as rings do"


def tokens_of(request: Request) -> int:
    """Tokens that the model reads for a request, and those that it may write."""
    if isinstance(request, Score):
        return len(request.context) + len(request.target) - 1
    return len(request.tokens) if isinstance(request, Predict) else len(request.prompt) + request.max_new_tokens


def weight_bytes(model: Model, layout: Layout, dtype: torch.dtype) -> list[int]:
    """Of each place of a replica: pipeline first, tensor innermost."""
    table = ParameterTable.of(model.args)
    found = []
    for stage in split(model.args, layout.stages):
        tied = model.args.tie_embeddings and stage.last and not stage.first
        rows = [row for row in table.values() if stage.owns(row) or (tied and row.unit == "tok_embeddings")]
        for rank in range(layout.tensor):
            boxes = [row.box((rank, layout.tensor), (0, layout.expert)) for row in rows]
            found.append(sum(prod(box_shape(box)) for box in boxes) * dtype.itemsize)
    return found


def cache_bytes_per_token(model: Model, layout: Layout, dtype: torch.dtype) -> int:
    """Keys and values of the rank that has most of them."""
    args = model.args
    heads = max(1, args.kv_heads // layout.tensor)
    specs = args.layer_specs()
    layers = max(len(attention_specs(specs[i] for i in stage.layers)) for stage in split(args, layout.stages))
    return 2 * layers * heads * args.head_width * dtype.itemsize


def _row(name: str, values: Sequence[int], note: str = "") -> str:
    low, high = min(values), max(values)
    return f"  {name:<14} {f'{low:,}' if low == high else f'{low:,} to {high:,}':>22}  {note}".rstrip()
