"""starts.jsonl of a run folder: what the run was, each time that it began, went on or went back, a line each. Unlike
rows of metrics.jsonl none is ever cut off, so that changes of ranks, layout and data can be seen afterwards.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from llm.data.mixture import Mixture
from llm.train.run import Run

FILE = "starts.jsonl"
COUNTS = (("n_docs", "documents"), ("n_samples", "samples"), ("n_items", "pairs"), ("n_tokens", "tokens"))
"""What sources of rows count, and what these are called."""


def start_record(run: Run, step: int, consumed_rows: int) -> dict[str, Any]:
    """The line of a run that stands after `step` steps, having read so many rows of its present data."""
    return {
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "ranks": run.world.size,
        "device": run.world.device.type,
        "layout": asdict(run.grid.layout),
        "parameters": run.engine.state.n_parameters,
        "seq_len": run.config.train.seq_len,
        "consumed_rows": consumed_rows,
        "sources": list(_sources(run.mixture)),
        "moe_layers": [spec.unit for spec in run.config.model.all_specs() if spec.ffn == "moe"],
    }


def _sources(mixture: Mixture) -> Iterator[dict[str, Any]]:
    """Of each source its rows, its slots of the mixture's cycle, and how much it holds, as far as it counts that."""
    for name, rows, slots in zip(mixture.names, mixture.sources, mixture.slots, strict=True):
        inner = getattr(rows, "inner", rows)  # as rows that a task sees in its own way
        source = getattr(inner, "source", inner)
        counts = {word: getattr(source, attribute, None) for attribute, word in COUNTS}
        known = {word: int(n) for word, n in counts.items() if isinstance(n, int)}
        given = str(getattr(inner, "given", None) or getattr(source, "given", ""))
        given = given.removeprefix("data.train=")
        yield {"name": name, "given": given, "rows": rows.n_rows, "slots": slots, **known}
