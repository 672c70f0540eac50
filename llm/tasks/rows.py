"""Opening the rows of a run, of whatever kinds: what tasks that read them have in common."""

from functools import partial
from pathlib import Path

from llm.data.contamination import contamination_notes
from llm.data.heldout import HeldOut
from llm.data.kinds import Asked, Opened
from llm.data.mixture import Mixture
from llm.data.opening import check_rows, open_rows, prepare_rows
from llm.data.sources import Side, sides
from llm.parallel.collectives import all_or_none, main_decides
from llm.parallel.launch.world import World
from llm.tasks.base import OpenedRows, RowsWanted, Task
from llm.tokenizer import Tokenizer


def opened_rows(wanted: RowsWanted, tokenizer: Tokenizer, world: World, task: Task) -> OpenedRows:
    """The training and held-out rows of a task, each source as `task.view` has it (collective). What is made of files
    is made by rank 0. UserError on all ranks where rows cannot be read, or are none that the task can read.
    """
    of_role = sides(wanted.train, wanted.valid)
    for side in of_role.values():  # both before the first is prepared, which may take long
        main_decides(partial(check_rows, side, wanted.cache_dir), world)
    opened: dict[str, list[tuple[str, Opened, float]]] = {"data.train": [], "data.valid": []}
    for role, side in of_role.items():
        asked = asked_of(wanted, tokenizer, role, side)
        main_decides(partial(prepare_rows, side, asked), world)
        opened[role] = all_or_none(partial(_viewed, side, asked, wanted, task), world)
        for _, source, _ in opened[role]:
            if source.verify is not None:
                main_decides(source.verify, world)
    train, valid = ([source for _, source, _ in opened[role]] for role in ("data.train", "data.valid"))
    contamination = main_decides(partial(contamination_notes, train, valid), world)
    rows = [(name, source.rows, weight) for name, source, weight in opened["data.train"]]
    of_rows = tokenizer.eos_id, wanted.source_len
    mixture = all_or_none(lambda: Mixture(rows, wanted.seq_len, wanted.seed, *of_rows), world)
    held_out = None
    if valid:
        held = ([source.rows for source in valid], wanted.seq_len, wanted.held_out_rows, tokenizer.eos_id)
        names = [name for name, _, _ in opened["data.valid"]]
        held_out = all_or_none(lambda: HeldOut(*held, names, wanted.source_len), world)
    notes = [note for source in train + valid for note in source.notes] + contamination
    return OpenedRows(mixture, held_out, notes)


def asked_of(wanted: RowsWanted, tokenizer: Tokenizer, role: str, side: Side) -> Asked:
    """What a run asks of the sources of a side; role: data.train or data.valid."""
    return Asked(
        tokenizer=tokenizer,
        cache_dir=Path(wanted.cache_dir),
        seq_len=wanted.seq_len,
        seed=wanted.seed,
        held_out=role == "data.valid",
        split=side.split,
        packing=wanted.packing,
        chat=wanted.chat,
        tokenizer_path=wanted.tokenizer_path,
        vision=wanted.vision,
        images=wanted.images,
        source_len=wanted.source_len,
        pair_max_length=wanted.pair_max_length,
        labels=wanted.labels,
        values=wanted.values,
    )


def _viewed(side: Side, asked: Asked, wanted: RowsWanted, task: Task) -> list[tuple[str, Opened, float]]:
    return [
        (name, task.view(name, source, wanted, asked.tokenizer, asked.held_out), weight)
        for name, source, weight in open_rows(side, asked)
    ]
