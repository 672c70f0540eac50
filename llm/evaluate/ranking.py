"""Which documents of a task went best and worst, and how sure the model was, from the written samples alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm.evaluate.outputs import Sample

LOWER_IS_BETTER = ("ppl", "perplexity", "bits", "loss", "nll", "rmse", "mae", "brier")
"""Parts of the names of metrics of which less is more."""


def lower_is_better(metric: str) -> bool:
    return any(part in metric for part in LOWER_IS_BETTER)


def column(samples: Sequence[Sample], metric: str) -> NDArray[np.float64]:
    """A metric of each document; NaN where it has none."""
    found = [(sample.get("metrics") or {}).get(metric) for sample in samples]
    return np.array([float("nan") if value is None else float(value) for value in found], dtype=np.float64)


def metrics_in(samples: Sequence[Sample]) -> list[str]:
    """Metrics that any document has a number of, in the order in which they come up."""
    names = dict.fromkeys(
        name
        for sample in samples
        for name, value in (sample.get("metrics") or {}).items()
        if isinstance(value, int | float)
    )
    return list(names)


def comparable(samples: Sequence[Sample], metric: str) -> tuple[str, NDArray[np.float64]]:
    """A metric of each document with what to call it, so that differences and means of it mean something: of a
    perplexity its logarithm, as a single text that was a surprise outweighs all others."""
    values = column(samples, metric)
    if not metric.endswith(("ppl", "perplexity")):
        return metric, values
    return f"ln {metric}", np.log(np.where(values > 0, values, np.nan))


def is_binary(values: NDArray[np.float64]) -> bool:
    """Whether a metric says right or wrong."""
    there = values[~np.isnan(values)]
    return bool(np.isin(there, (0.0, 1.0)).all())


def sureness(samples: Sequence[Sample]) -> tuple[str, NDArray[np.float64]] | None:
    """What distinguishes documents of one score, and its name: how much likelier the likeliest answer is than the next,
    or how likely the only one. None where nothing was scored.
    """
    scored = [_logprobs(sample.get("responses") or ()) for sample in samples]
    if any(len(found) > 1 for found in scored):
        pairs = [sorted(found)[-2:] if len(found) > 1 else None for found in scored]
        margins = [float("nan") if pair is None else pair[1] - pair[0] for pair in pairs]
        return "log prob of the likeliest answer above the next", np.array(margins)
    if any(scored):
        return "log prob of the answer", np.array([found[0] if found else float("nan") for found in scored])
    lengths = [_tokens(sample.get("responses") or ()) for sample in samples]
    if any(length is not None for length in lengths):
        return "tokens of the answer", np.array([float("nan") if n is None else n for n in lengths], dtype=np.float64)
    return None


def worst_and_best(samples: Sequence[Sample], metric: str, most: int) -> tuple[list[int], list[int]]:
    """Places of the documents with the worst and the best value of a metric, at most so many of each and none twice;
    of equal ones those of which the model was surest.
    """
    values = column(samples, metric) * (-1.0 if lower_is_better(metric) else 1.0)
    sure = sureness(samples)
    tie = np.zeros(len(samples)) if sure is None else np.nan_to_num(sure[1], nan=0.0, posinf=0.0, neginf=0.0)
    there = [int(i) for i in np.flatnonzero(~np.isnan(values))]
    most = min(most, (len(there) + 1) // 2)
    worst = sorted(there, key=lambda i: (values[i], -tie[i], i))[:most]
    best = sorted(there, key=lambda i: (-values[i], -tie[i], i))[:most]
    return worst, [i for i in best if i not in worst]


def most_different(first: Sequence[Sample], second: Sequence[Sample], metric: str, most: int) -> list[int]:
    """Places of the documents on which two models differ most."""
    if len(first) != len(second):
        return []
    difference = np.nan_to_num(np.abs(column(first, metric) - column(second, metric)))
    order = np.argsort(-difference, kind="stable")[:most]
    return [int(i) for i in order if difference[i] > 0]


def _logprobs(responses: Sequence[Mapping[str, Any]]) -> list[float]:
    return [float(r["logprob"]) for r in responses if isinstance(r.get("logprob"), int | float)]


def _tokens(responses: Sequence[Mapping[str, Any]]) -> int | None:
    for response in responses:
        tokens = response.get("tokens")
        if tokens is not None:
            return len(tokens) if isinstance(tokens, list) else int(tokens)
    return None
