"""The grid of ranks as a picture: a block for each data-parallel rank, in it a row for each place of the pipeline and
a cell for each rank that shares its layers (context x tensor); the colour is the part of the experts that it holds.
"""

from collections.abc import Mapping
from dataclasses import fields
from html import escape
from typing import Any

from llm.parallel.layout import Layout
from llm.report.folder import RunFolder

MOST_BLOCKS, MOST_ROWS, MOST_CELLS = 16, 16, 16
CELL, GAP = 34, 4
COLOURS = 8


def layouts(run: RunFolder) -> list[tuple[str, Layout]]:
    """(from which step on, the layout) of each one that the run has had, as far as it is known."""
    found: list[tuple[str, Layout]] = []
    for start in run.starts:
        layout = _layout(start.get("layout") or {})
        if layout is not None and (not found or found[-1][1] != layout):
            found.append((f"from step {int(start['step']) + 1:,}", layout))
    if not found and run.ranks is not None:
        layout = _layout({**(run.config.get("parallel") or {}), "world": run.ranks})
        found = [("", layout)] if layout is not None else []
    return found


def _layout(values: Mapping[str, Any]) -> Layout | None:
    """None where it is of no grid, as in a file of another version."""
    try:
        layout = Layout(**{f.name: values[f.name] for f in fields(Layout) if f.name in values})
        return layout if layout.data >= 1 and layout.data % layout.expert == 0 else None
    except (TypeError, ValueError, ZeroDivisionError):
        return None


def drawn(layout: Layout) -> str:
    """The picture, blocks side by side as the page has room."""
    shown = min(layout.data, MOST_BLOCKS)
    blocks = "".join(f"<figure>{_block(layout, data)}</figure>" for data in range(shown))
    sizes = {name: int(getattr(layout, name)) for name in ("data", "pipeline", "context", "tensor")}
    words = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name == "data")
    more = [f"{layout.world:,} rank{'' if layout.world == 1 else 's'}: {words}", f"ZeRO-{layout.zero_stage}"]
    if layout.expert > 1:
        more.append(f"experts cut over {layout.expert} of the data ranks, by colour")
    if layout.pipeline > 1:
        more.append(f"a row a place of the pipeline ({layout.pipeline_schedule})")
    if layout.tensor > 1:
        more.append("cells side by side share their layers' weights")
    if shown < layout.data:
        more.append(f"the first {shown} of {layout.data:,} data ranks are drawn")
    if layout.pipeline > MOST_ROWS or layout.context * layout.tensor > MOST_CELLS:
        more.append(f"at most {MOST_ROWS} rows of {MOST_CELLS} ranks of a block are")
    return f'<p class="soft">{escape("; ".join(more))}</p><div class="ranks">{blocks}</div>'


def _block(layout: Layout, data: int) -> str:
    pairs = [(c, t) for c in range(layout.context) for t in range(layout.tensor)]
    columns, rows = min(len(pairs), MOST_CELLS), min(layout.pipeline, MOST_ROWS)
    width, height = columns * (CELL + GAP) - GAP, 16 + rows * (CELL + GAP) - GAP
    name = f"data {data}" + (f", experts {data % layout.expert + 1}/{layout.expert}" if layout.expert > 1 else "")
    wide = max(width, 7 * len(name))
    parts = [
        f'<svg viewBox="0 0 {wide} {height}" width="{wide}" height="{height}" role="img" aria-label="{escape(name)}">'
        f'<text class="label" x="0" y="11">{escape(name)}</text>'
    ]
    for stage in range(rows):
        for column, (context, tensor) in enumerate(pairs[:columns]):
            rank = layout.rank(stage, data, context, tensor)
            x, y = column * (CELL + GAP), 16 + stage * (CELL + GAP)
            holds = ", ".join(str(part + 1) for part in layout.stages_of(stage))
            said = f"rank {rank}: data {data}, pipeline {stage} (stage {holds} of {layout.stages})"
            said += f", context {context}, tensor {tensor}, experts' part {data % layout.expert + 1} of {layout.expert}"
            colour = f"c{data % layout.expert % COLOURS}"
            parts.append(
                f'<g class="{colour}"><title>{said}</title><rect class="rank" x="{x}" y="{y}" width="{CELL}" '
                f'height="{CELL}" rx="5"/><text class="number" x="{x + CELL / 2:g}" y="{y + CELL / 2 + 4:g}" '
                f'text-anchor="middle">{rank}</text></g>'
            )
    return "".join([*parts, "</svg>"])
