"""The first rows of a run as the model will see them: text, which of its tokens train, how much of a row is filled up.

A token is written as its text, a control token as its name or <number>, an image as the grid of its tiles; what trains
stands in brackets, with its weight where that is not 1; of tokens that are to be guessed what the model sees and,
behind an arrow, what they are. The labels of a sample stand above its text, and so does what an encoder reads. Values
are written as numbers.
"""

from collections.abc import Iterator, Mapping
from itertools import groupby, takewhile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llm.args import ModelArgs
from llm.data.labelled_rows import PREDICTION
from llm.data.masked import TARGET as MASKED
from llm.data.mixture import Mixture
from llm.data.pair_rows import source_of
from llm.data.rows import Row
from llm.tokenizer import Tokenizer
from llm.train.config import RunConfig
from llm.train.preflight import ALONE, UnstartedRun, preflight
from llm.train.resume.choose import checkpoint_to_continue
from llm.train.settle import rows_wanted, settle_model, task_in
from vision.tokens import NAMES, ImageTokens

OPEN, CLOSE = "\u27e6", "\u27e7"
"""Around what trains."""
MOST_POSITIONS = 12
"""Positions of values that are shown of a sample."""
ARROW = "\u2192"
"""Between what a model sees in the place of tokens, and these."""


def show(config: RunConfig, run_dir: Path, n_rows: int) -> Iterator[str]:
    """Lines about the first rows that the run will read; what they are made of is made and kept, as the run does.
    UserError where the run would be refused.
    """
    preflight(config, run_dir)
    run = UnstartedRun(config, run_dir)
    task = task_in(config)
    opened = task.open_rows(rows_wanted(run.settled), run.tokenizer, ALONE)
    goes_on = checkpoint_to_continue(run.settled, run.checkpoints) is not None
    args = settle_model(run.settled, task, opened, goes_on).model
    yield from opened.notes
    yield from _settled(args)
    if opened.train.features is None:
        yield f"what trains stands between {OPEN} and {CLOSE}"
    for i in range(n_rows):
        yield from show_row(opened.train, i, run.tokenizer, args)


def show_row(mixture: Mixture, i: int, tokenizer: Tokenizer, args: ModelArgs | None = None) -> Iterator[str]:
    """Lines about row i, from 0, of the order of the data. args: the model, which says what labels are called."""
    (number,), (k,), (epoch,) = (found.tolist() for found in mixture.locate(i))
    row = mixture.read(number, k, epoch)
    assert row is not None
    target, targets = next(iter(row.targets.items()))
    labels, weights = targets.labels, targets.weights
    weight = (labels >= 0).astype(np.float32) if weights is None else np.where(labels >= 0, weights, 0)
    n, room = len(row.tokens), mixture.seq_len
    filled = f", {room - n:,} filled up" if n < room else ""
    if row.source is not None:
        filled += f"; {len(row.source.tokens):,} of {mixture.source_len:,} positions of sources"
    images = "" if row.images is None else f", {_count(len(row.images), 'tile')}"
    yield (
        f"=== row {i + 1}: row {k + 1} of {mixture.names[number]} in pass {epoch + 1}; {n:,} of {room:,} positions used"
        f"{filled}; {_count(len(row.starts), 'sample')}, {_count(int((labels >= 0).sum()), 'target')}{images}"
    )
    names = {number: name for name, number in tokenizer.control_tokens.items()}
    bounds = zip(row.starts.tolist(), [*row.starts[1:].tolist(), n], strict=True)
    for document, (start, end) in enumerate(bounds):
        place = mixture.sources[number].origin(k, epoch, start)
        part = f", from token {place.offset + 1}" if place.offset else ""
        n_targets = _count(int((labels[start:end] >= 0).sum()), "target")
        of_sample = _labels(row, start, args) if target == PREDICTION else n_targets
        yield f"--- {place.origin}{part}{_side(row, start)}: {of_sample}, {_count(end - start, 'position')}"
        if row.features is not None:
            yield numbers(row.features[start:end])
            continue
        if target == PREDICTION:
            yield _text(row.tokens[start:end].tolist(), tokenizer, names)
            continue
        if target == MASKED:
            yield guessed(row.tokens[start:end], labels[start:end], tokenizer, names)
            continue
        if row.source is not None:
            yield f"source: {_text(source_of(row, document).tolist(), tokenizer, names)}"
        ids, weight_of = row.tokens[start:end], np.concatenate(([0], weight[start:end]))
        if labels[end - 1] >= 0:  # the last token is only a label
            ids = np.append(ids, labels[end - 1])
        yield marked(ids, weight_of[: len(ids)], tokenizer, names)


def numbers(features_nF: NDArray[np.float32]) -> str:
    """The values of a sample, position by position, those of one in brackets where they are several."""
    shown = [" ".join(f"{value:.6g}" for value in of_one) for of_one in features_nF[:MOST_POSITIONS].tolist()]
    parts = shown if features_nF.shape[1] == 1 else [f"({of_one})" for of_one in shown]
    return " ".join([*parts, *["..."] * (len(features_nF) > MOST_POSITIONS)])


def marked(ids: NDArray[np.int64], weights: NDArray, tokenizer: Tokenizer, names: Mapping[int, str]) -> str:
    """The text of tokens, in brackets where their weights are above 0."""
    parts, at = [], 0
    for weight, group in groupby(weights.tolist()):
        end = at + len(list(group))
        text = _text(ids[at:end].tolist(), tokenizer, names)
        factor = "" if weight in (0, 1) else f"{weight:g}:"
        parts.append(f"{OPEN}{factor}{text}{CLOSE}" if weight else text)
        at = end
    return "".join(parts)


def guessed(ids: NDArray[np.int64], labels: NDArray[np.int64], tokenizer: Tokenizer, names: Mapping[int, str]) -> str:
    """The text of tokens as the model sees them, in brackets where they are to be guessed, with what they are."""
    parts, at = [], 0
    for hidden, group in groupby((labels >= 0).tolist()):
        end = at + len(list(group))
        seen, meant = (_text(of[at:end].tolist(), tokenizer, names) for of in (ids, labels.clip(0)))
        parts.append(f"{OPEN}{seen}{ARROW}{meant}{CLOSE}" if hidden else seen)
        at = end
    return "".join(parts)


def _text(ids: list[int], tokenizer: Tokenizer, names: Mapping[int, str]) -> str:
    """Nothing in it that a terminal would take for a command."""
    parts: list[str] = []
    plain: list[int] = []
    known = tokenizer.token_bytes()
    begin, end = (tokenizer.control_tokens.get(NAMES[mark], -1) for mark in ("image_start", "image_end"))
    left = iter(ids)
    for number in left:
        if number == begin:
            inside = list(takewhile(lambda other: other != end, left))
            parts += [tokenizer.decode(plain), _image(inside, tokenizer)]
            plain = []
            continue
        control = number in names or number >= len(known) or not known[number]
        if control:
            parts += [tokenizer.decode(plain), names.get(number, f"<{number}>")]
            plain = []
        else:
            plain.append(number)
    text = "".join([*parts, tokenizer.decode(plain)])
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _image(ids: list[int], tokenizer: Tokenizer) -> str:
    """What stands for an image, from its first mark to its last, in words."""
    count = {name: ids.count(number) for name, number in vars(ImageTokens.of(tokenizer)).items()}
    rows = count["tile_y_separator"]
    columns = count["tile_x_separator"] // max(1, rows) + 1
    tiles = f"{rows} x {columns} tiles and the whole" if rows else "1 tile"
    return f"[image: {tiles}, {_count(count['patch'], 'slot')}]"


def _side(row: Row, start: int) -> str:
    """Which answer of a pair a sample is."""
    pair = row.values.get("pair")
    if pair is None:
        return ""
    return f", pair {abs(int(pair[start]))}, {'chosen' if pair[start] > 0 else 'rejected'}"


def _settled(args: ModelArgs) -> Iterator[str]:
    """What the rows say of the model's outputs, and of values."""
    for side in ("input", "output"):
        mean, std = (getattr(args, f"{side}_{key}") for key in ("mean", "std"))
        if mean is not None and std is not None:
            of_each = [f"(x - {m:.6g}) / {s:.6g}" for m, s in zip(mean, std, strict=True)][:MOST_POSITIONS]
            yield f"{side}: x is scaled as {', '.join(of_each)}{', ...' if len(mean) > MOST_POSITIONS else ''}"
    if args.prediction_names is None:
        return
    for i, name in enumerate(args.prediction_names):
        scales = ""
        if args.prediction_mean is not None and args.prediction_std is not None:
            scales = f", learned as (label - {args.prediction_mean[i]:.6g}) / {args.prediction_std[i]:.6g}"
        yield f"output {i} is {name!r}{scales}"


def _labels(row: Row, start: int, args: ModelArgs | None) -> str:
    """The labels of the sample that begins there, by name, and its weight where that is not 1."""
    numbers = [float(value[start]) for name, value in row.values.items() if name.startswith(f"{PREDICTION}.")]
    names = None if args is None else args.prediction_names
    if args is not None and args.prediction == "classification" and names is not None:
        parts = ["no label" if np.isnan(x) else f"label {names[int(x)]!r}" for x in numbers]
    else:
        called = names or [f"label {i}" if row.features is not None else str(i) for i in range(len(numbers))]
        parts = [f"{name} {'missing' if np.isnan(x) else f'{x:.6g}'}" for name, x in zip(called, numbers, strict=True)]
    weights = row.targets[PREDICTION].weights
    weight = [] if weights is None or weights[start] == 1 else [f"weight {weights[start]:g}"]
    return ", ".join([*parts, *weight])


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
