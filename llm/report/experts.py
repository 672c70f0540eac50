"""The load of experts as a map: a row an expert, a column a stretch of steps, in shares of an even load."""

from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from llm.report.folder import RunFolder
from llm.report.thin import packed

MOST_ROWS = 1024
"""Experts of all layers that have a row each; of more, each layer has the one of its busiest expert."""
MOST_CELLS = 120_000
SCALE = 64
"""Colours go in steps of 1/64 of an even load."""
BUSIEST = "busiest expert of each layer"


@dataclass
class LoadMap:
    """Loads (rows, columns) of one run, 1 = an even share."""

    title: str
    labels: list[str]
    groups: list[tuple[int, str]]
    """First row of each layer, and what the layer is called."""
    steps: NDArray[np.int64]
    loads: NDArray[np.float64]

    def to_json(self, cells: int = MOST_CELLS) -> dict[str, object]:
        """Columns stand for means over their steps, as many as `cells` allow."""
        columns = max(1, min(len(self.steps), cells // len(self.labels)))
        edges = np.linspace(0, len(self.steps), columns + 1).astype(np.int64)
        sums = np.add.reduceat(self.loads, edges[:-1], axis=1) / np.diff(edges)
        return {
            "title": self.title,
            "labels": [escape(label) for label in self.labels],
            "groups": [(row, escape(name)) for row, name in self.groups],
            "steps": self.steps[edges[1:] - 1].tolist(),
            "scale": SCALE,
            "loads": packed(np.clip(np.round(sums * SCALE), 0, 255), "u1"),
        }


def load_map(run: RunFolder, title: str = "") -> LoadMap | None:
    """None where the run has written no loads. Where a run changed its model, what has the newest shape counts."""
    if not run.experts:
        return None
    shape = np.shape(run.experts[-1][1])
    kept = dict((step, counts) for step, counts in run.experts if np.shape(counts) == shape)
    steps = np.array(sorted(kept), np.int64)
    counts_SME = np.array([kept[step] for step in steps.tolist()], np.float64)
    even_SM1 = counts_SME.mean(2, keepdims=True)
    loads_SME = np.divide(counts_SME, even_SM1, out=np.zeros_like(counts_SME), where=even_SM1 > 0)
    n_layers, n_experts = shape
    names = _layers(run, n_layers)
    if n_layers * n_experts > MOST_ROWS:
        rows = loads_SME.max(2).T
        return LoadMap(f"{title}{BUSIEST}", names, list(enumerate(names)), steps, rows)
    labels = [f"{layer}, expert {expert}" for layer in names for expert in range(n_experts)]
    groups = [(i * n_experts, name) for i, name in enumerate(names)]
    return LoadMap(f"{title}load of each expert", labels, groups, steps, loads_SME.reshape(len(steps), -1).T)


def _layers(run: RunFolder, n_layers: int) -> list[str]:
    """What the layers with experts are called, by the newest start that has as many."""
    for start in reversed(run.starts):
        names = start.get("moe_layers")
        if isinstance(names, list) and len(names) == n_layers:
            return [str(name).replace("layers.", "layer ") for name in names]
    return [f"MoE layer {i + 1}" for i in range(n_layers)]
