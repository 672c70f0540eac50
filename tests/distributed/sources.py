"""Sources beside the rows of tests/distributed/engine_job.py: two documents for the two of each row, and padding."""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from llm.batch import Batch
from llm.data.batch import StepBatch
from llm.datatypes import TransformerInput

SOURCE_LEN, VOCAB = 40, 64


def with_sources(step: StepBatch, packed: bool = True) -> StepBatch:
    """The step, each of whose rows has a source that its number decides. packed: or rows and sources are one document.
    """
    micro_batches = [_with_source(batch, packed) for batch in step.micro_batches]
    added = step.n_rows * SOURCE_LEN
    layers = {name: count + added for name, count in step.counts.objectives.items() if name.startswith("moe_")}
    counts = replace(
        step.counts, tokens=step.counts.tokens + added, objectives={**step.counts.objectives, **layers}
    )
    return replace(step, micro_batches=micro_batches, counts=counts)


def _with_source(batch: Batch, packed: bool) -> Batch:
    assert batch.rows is not None
    rows, ends, bounds = batch.rows.global_row.tolist(), np.arange(0, SOURCE_LEN + 1, SOURCE_LEN), []
    tokens = torch.from_numpy(np.stack([_tokens(row) for row in rows]))
    if not packed:
        return replace(batch, inputs=TransformerInput(batch.inputs.tokens, source=TransformerInput(tokens)))
    positions = np.full(tokens.shape, -1)
    for b, row in enumerate(rows):
        first, end = np.cumsum(_lengths(row))
        positions[b, :end] = np.concatenate([np.arange(first), np.arange(end - first)])
        bounds.append(b * SOURCE_LEN + np.array([*ends, first, end]))
    cu_seqlens = torch.from_numpy(np.unique(np.concatenate(bounds)).astype(np.int32))
    source = TransformerInput(tokens, torch.from_numpy(positions), cu_seqlens=cu_seqlens)
    return replace(batch, inputs=replace(batch.inputs, source=source))


def _tokens(row: int) -> NDArray[np.int64]:
    return np.random.default_rng(row).integers(0, VOCAB, SOURCE_LEN)


def _lengths(row: int) -> NDArray[np.int64]:
    """Of the two documents of a row's source."""
    return np.random.default_rng([row, 1]).integers(3, SOURCE_LEN // 2 - 1, 2)
