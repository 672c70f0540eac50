"""The section `pair`: how pairs of a source and a target are read; and which tasks and data a model with an encoder is
trained on.
"""

from collections.abc import Sequence

from llm.args import ModelArgs
from llm.data.labels import MaxLength
from llm.train.config.section import Section

SEQ2SEQ = "seq2seq"
"""The task whose rows have a source."""
WITHOUT_SOURCE = ("lm", "mlm", "dpo", "prediction", "regression", "autoregressive")
"""Tasks whose rows have nothing for an encoder to read."""
NO_PAIRS = ("chat", "completion", "preference", "image_text", "labelled")
"""Kinds of data of which no source and target are made."""


class PairConfig(Section):
    max_length: MaxLength = "error"
    """A pair whose source or target is longer than its side of a row: stop, leave it out, or keep the beginning."""


def check_tasks_of_sources(model: ModelArgs, tasks: Sequence[str], source_len: int | None) -> None:
    """ValueError where tasks, `data.source_len` and a model do not go together."""
    layers = model.encoder_layers
    if SEQ2SEQ in tasks and not layers:
        raise ValueError("task=seq2seq: the model has no encoder to read sources with; set model.encoder_layers")
    other = next((name for name in tasks if name in WITHOUT_SOURCE), None)
    if layers and other is not None:
        raise ValueError(
            f"model.encoder_layers={layers}: task={other} has no source for the encoder to read; set task=seq2seq, or "
            f"leave the encoder out"
        )
    if source_len is not None and not layers:
        raise ValueError(f"data.source_len={source_len}: is for the encoder of a model (model.encoder_layers)")
    if source_len is not None and source_len > model.max_seq_len:
        raise ValueError(f"data.source_len={source_len} is above model.max_seq_len={model.max_seq_len}")


def pair_problem(task: str, kind: str) -> str | None:
    """Why a task cannot read data of a kind; None where it can, or where others say so."""
    if task == SEQ2SEQ and kind in NO_PAIRS:
        return "task=seq2seq trains on kind pair (source, target), or on text"
    if task in WITHOUT_SOURCE and kind == "pair":
        return f"has sources, which task={task} does not read; set task=seq2seq"
    return None
