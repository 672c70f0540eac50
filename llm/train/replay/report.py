"""A replayed step in words and as JSON: against its record, its documents and its rows, the highest loss first."""

import math
from collections import defaultdict
from dataclasses import asdict
from typing import Any

from llm.train.replay.spans import Span, loss_order

WORST = 5
"""Documents whose excerpt is printed and whose own gradient is computed."""
PRINTED_ROWS = 24
OF_ROW = ("row", "source", "source_row")
"""Fields of a Span that say where the row comes from; the others are of the document."""


def rows_of(spans: list[Span]) -> list[dict[str, Any]]:
    """The step's rows with their documents, both by mean loss, highest first."""
    by_row: dict[int, list[Span]] = defaultdict(list)
    for span in spans:
        by_row[span.row].append(span)
    rows = []
    for parts in by_row.values():
        n_targets, loss_sum = sum(part.n_targets for part in parts), math.fsum(part.loss_sum for part in parts)
        weight = math.fsum(part.weight for part in parts)
        rows.append(
            {
                **{key: getattr(parts[0], key) for key in OF_ROW},
                "n_targets": n_targets,
                "weight": weight,
                "loss_sum": loss_sum,
                "loss": loss_sum / weight if weight else None,
                "documents": [
                    {key: value for key, value in asdict(part).items() if key not in OF_ROW} | {"loss": part.loss}
                    for part in parts
                ],
            }
        )
    return sorted(rows, key=lambda row: -loss_order(row["loss"]))


def report_lines(report: dict[str, Any], spans: list[Span]) -> list[str]:
    """What is printed: the step against its record, the worst documents, then the rows."""
    row, note = report["replayed"], report["gradient_note"]
    meaning = note or "share: norm of the gradient of what the document adds to the step's loss"
    lines = [
        f"steps computed again before it: {report['recomputed_steps']}",
        f"step {report['step']}: loss {row['loss']:.6f}, gradient norm {row['grad_norm']:.6f}, lr {row['lr']:.3e}, "
        f"{row['targets']} targets; mean loss of its documents' targets {report['documents_loss']:.6f}",
        *_verdict(report),
        "",
        f"documents with the highest mean loss, nats per target ({meaning}):",
    ]
    for span in [span for span in spans if span.weight][:WORST]:
        share = "" if span.grad_norm is None else f"  share {span.grad_norm:.4f}"
        lines += [f"{_loss_columns(span)}{share}  {span.where()}, row {span.row}", f"    {span.excerpt}"]
    lines += ["", "rows by mean loss:"]
    by_row: dict[int, list[Span]] = defaultdict(list)
    for span in spans:
        by_row[span.row].append(span)
    for found in report["rows"][:PRINTED_ROWS]:
        loss = "no targets" if found["loss"] is None else f"{found['loss']:.4f}"
        lines.append(f"row {found['row']} = row {found['source_row']} of {found['source']}: {loss}")
        lines += [f"  {_loss_columns(span)}  {span.where()}" for span in by_row[found["row"]]]
    if len(report["rows"]) > PRINTED_ROWS:
        lines.append(f"... and {len(report['rows']) - PRINTED_ROWS} more rows, in the file")
    return lines


def _verdict(report: dict[str, Any]) -> list[str]:
    """How the step compares with its record, and whether it was applied at all."""
    comparison, lines = report["comparison"], []
    if report["skipped"]:
        lines = [f"no update was made: {report['skipped']}", *report["culprits"]]
    if comparison is None:
        return [*lines, "not in metrics.jsonl, so there is nothing to compare it with"]
    relative = comparison["relative_difference"]
    differing = [key for key, equal in comparison["equal"].items() if not equal]
    if not differing:
        return [*lines, "bit for bit as recorded in metrics.jsonl"]
    parts = [f"{key} by {relative[key]:.1e}" if key in relative else f"{key} (absent in one)" for key in differing]
    lines.append(f"differs from metrics.jsonl: {', '.join(parts)}; first in step {report['first_difference']}")
    given = [key for key in ("lr", "tokens") if key in differing]
    if given:
        lines.append(f"the config has changed since ({', '.join(given)}): pass what it was, such as --train.steps")
    return lines


def _loss_columns(span: Span) -> str:
    loss = "      -" if span.loss is None else f"{span.loss:7.4f}"
    return f"{loss}  sum {span.loss_sum:9.3f}  {span.n_targets:5d} targets"
