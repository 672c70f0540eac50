"""The sums that preferences are compared with: how likely each answer was to the model that the run began with.

They are made once, before the first step, by the very replica that will be trained, so no second model is ever in
memory; with adapters, which begin as nothing, they are the base's. `reference.safetensors` in the run folder keeps
them, with what they were made by; the checkpoints keep its digest, and a run that goes on reads them again.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm.atomic import write_file
from llm.batch import Batch
from llm.checkpoint.reader import resolve
from llm.data.heldout import HeldOut
from llm.data.packed import PAIR, Packed
from llm.errors import UserError
from llm.objectives import NextToken
from llm.parallel.collectives import agreed_error, all_or_none, main_decides, sum_over_ranks
from llm.parallel.replica import EVALUATED_AT_ONCE
from llm.pretrained import taken_from
from llm.safetensors_file import SafetensorsFile, header_bytes
from llm.tasks import REFERENCE
from llm.train.run import Run

FILE = "reference.safetensors"


class Sums(NamedTuple):
    """The content of a file."""

    made_by: dict[str, Any]
    """The weights, and what else decides the sums beside the data."""
    of_sources: dict[str, NDArray[np.float32]]
    """By the fingerprint of the source, (samples,); NaN where no row holds the sample."""
    digest: str
    """Of all of it."""

    @classmethod
    def of(cls, made_by: Mapping[str, Any], of_sources: Mapping[str, NDArray[np.float32]]) -> "Sums":
        """With its digest."""
        found = hashlib.blake2b(json.dumps(made_by, sort_keys=True).encode(), digest_size=16)
        for name in sorted(of_sources):
            found.update(name.encode() + of_sources[name].tobytes())
        return cls(dict(made_by), dict(of_sources), found.hexdigest())


def make(run: Run) -> tuple[str, list[str]]:
    """Give the rows of a new run the sums of its present weights (collective): the digest of these, and lines that say
    where they are. A file that the same weights made of the same data, for a run that did not get to its first
    checkpoint, is taken as it is.
    """
    path, sources = run.folder / FILE, _sources(run)
    made_by = main_decides(partial(_made_by, run), run.world)
    if not main_decides(lambda: _is_there(path, made_by, sources), run.world):
        of_sources = {source.fingerprint: _sums(run, source) for source in sources}
        main_decides(lambda: _write(path, Sums.of(made_by, of_sources)), run.world)
    found = all_or_none(partial(read, path), run.world)
    _give(sources, found)
    n = sum(len(sums) for sums in found.of_sources.values())
    return found.digest, [f"{n:,} answers have a sum by the weights that the run began with: {path}"]


def reuse(run: Run, digest: str | None) -> None:
    """Give the rows of a run that goes on the sums that it began with (collective). UserError where they are not there,
    or are not those of its checkpoints, which have this digest, or of its data.
    """
    sources = _sources(run)

    def find() -> str:
        path = _path(run)
        found = read(path)
        if found.digest != digest:
            raise UserError(f"{path}: are other sums than those that the checkpoint was trained against ({digest})")
        for source in sources:
            if not _covers(found, source):
                raise UserError(
                    f"{path}: lacks answers of {source.given}; the sums are of the data that the run began with. For "
                    f"other data begin a new run, with model.init_from"
                )
        if path.parent != run.folder:  # the run begins with a checkpoint of another one
            write_file(run.folder / FILE, path.read_bytes())
        return str(path)

    path = Path(main_decides(find, run.world))
    _give(sources, all_or_none(partial(read, path), run.world))


def read(path: Path) -> Sums:
    """The content of a file. UserError where it is none."""
    file = SafetensorsFile(path)
    if not {"made_by", "digest"} <= file.metadata.keys():
        raise UserError(f"{path}: holds no sums of a reference model")
    of_sources = {}
    for name, entry in file.entries.items():
        values = torch.empty(entry.shape)
        file.read(name, tuple((0, size) for size in entry.shape), values)
        of_sources[name] = values.numpy()
    found = Sums.of(json.loads(file.metadata["made_by"]), of_sources)
    if found.digest != file.metadata["digest"]:
        raise UserError(f"{path}: is damaged: its digest is {found.digest}, and should be {file.metadata['digest']}")
    return found


def _write(path: Path, sums: Sums) -> None:
    tensors = {name: (torch.float32, values.shape) for name, values in sums.of_sources.items()}
    metadata = {"made_by": json.dumps(sums.made_by, sort_keys=True), "digest": sums.digest}
    write_file(path, header_bytes(tensors, metadata) + b"".join(v.tobytes() for v in sums.of_sources.values()))


def _path(run: Run) -> Path:
    """The file of a run that goes on."""
    own, mode = run.folder / FILE, run.config.checkpoint.resume
    if own.exists() or mode in ("auto", "never"):
        return own
    return resolve(mode).path.resolve().parents[1] / FILE


def _is_there(path: Path, made_by: Mapping[str, Any], sources: list[Packed]) -> bool:
    if not path.exists():
        return False
    try:
        found = read(path)
    except UserError:
        return False  # it is made anew
    return found.made_by == made_by and all(_covers(found, source) for source in sources)


def _covers(sums: Sums, source: Packed) -> bool:
    known = sums.of_sources.get(source.fingerprint)
    return known is not None and bool(np.isfinite(known[source.samples_in_rows()]).all())


def _sources(run: Run) -> list[Packed]:
    """The sources of pairs, to train on and held out. UserError where one has no pairs."""
    found = []
    for source in [*run.mixture.sources, *(run.held_out.sources if run.held_out else [])]:
        if not isinstance(source, Packed) or PAIR not in source.values:
            raise agreed_error(f"task={run.task.name}: {source.described()}, but no pairs; give kind preference")
        found.append(source)
    return found


def _made_by(run: Run) -> dict[str, Any]:
    config = run.config
    model, train = config.model, config.train
    source = model.init_from
    begun: dict[str, Any] = {"seed": train.seed} if source is None else {"weights": taken_from(source).digest}
    if config.lora is not None and config.lora.init_from is not None:
        begun["adapter"] = taken_from(config.lora.init_from).digest
    said = model.model_dump(mode="json", exclude={"init_from"})
    return {**begun, "model": said, "precision": train.precision, "seq_len": train.seq_len}


def _give(sources: list[Packed], sums: Sums) -> None:
    for source in sources:
        source.with_numbers(REFERENCE, sums.of_sources[source.fingerprint])


def _sums(run: Run, source: Packed) -> NDArray[np.float32]:
    """(samples,) of a source by the present weights, NaN where no row holds a sample (collective): rows are cut over
    the ranks as those of a validation.
    """
    ranks, size = run.grid.rows, run.config.train.micro_batch_size
    rows = HeldOut([source], run.config.train.seq_len, None, run.tokenizer.eos_id)
    batches = rows.batches(size, ranks.rank, ranks.size)
    sums = np.zeros(source.source.n_samples)
    first = ranks.rank * size  # row of the next batch
    while chunk := list(islice(batches, EVALUATED_AT_ONCE * run.grid.pipeline.size)):
        # where another rank has the output there are none, but as many forwards
        found = run.engine.replica.token_losses(NextToken(run.task.name), chunk)
        for nll_BT, batch in zip(found if run.grid.reports_loss else [], chunk, strict=False):
            for row, sums_P in enumerate(_of_pairs(nll_BT, batch), first):
                for p, item in enumerate(source.items(row, 0).tolist() if row < source.n_rows else (), 1):
                    sums[2 * item : 2 * item + 2] = sums_P[p]
            first += ranks.size * size
    together = np.array(sum_over_ranks(sums.tolist(), run.world), dtype=np.float32)
    missing = np.ones(len(together), dtype=bool)
    missing[source.samples_in_rows()] = False
    together[missing] = np.nan
    return together


def _of_pairs(nll_BT: Tensor, batch: Batch) -> Iterator[NDArray[np.float64]]:
    """For each row (1 + most pairs, 2): the log-probability of the chosen and the rejected answer of its p-th pair."""
    pair_BT = batch.values[PAIR].long()
    for nll_T, pair_T in zip(nll_BT.cpu().double(), pair_BT, strict=True):
        sums = torch.zeros(2 * len(pair_T) + 2, dtype=torch.float64)
        sums.index_add_(0, 2 * pair_T.abs() + (pair_T < 0), -nll_T)
        yield sums.view(-1, 2).numpy()
