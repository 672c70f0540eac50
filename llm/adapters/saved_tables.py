"""Token table and head that a folder of PEFT holds whole: `modules_to_save`, and what it saves by itself of a model
whose vocabulary was changed.

They come in as rows that train whole (`lora.token_rows`), from the first to the last one that is another than the
base's: what they add to it. A base with fewer tokens is given more first.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm.adapters import peft
from llm.args import ModelArgs
from llm.checkpoint.weights import Weights
from llm.errors import UserError
from llm.foreign.family import Family

TABLES = ("tok_embeddings.weight", "output.weight")
WHOLE, BENEATH = "weight", "base_layer.weight"
"""Ends of the keys of a table that was saved whole: as it is, or beneath an adapter of its own."""
AGAIN, BEFORE = "modules_to_save.weight", "original_module.weight"
"""Ends of the keys by which PEFT writes such a table once more, and what it was before, of a model whose vocabulary was
changed."""
CHUNK_ELEMENTS = 2 << 20
"""Elements of a base's table that are read at a time."""


class Table(NamedTuple):
    """Token table or head."""

    name: str
    """Ours: of a head that is the token table, that one's."""
    module: str
    """As PEFT calls it."""
    twin: bool
    """Whether it is the head that is the token table."""


def tables_of(family: Family, args: ModelArgs) -> list[Table]:
    """Token table and head, as a Hugging Face model has them in memory."""
    sites = [site for row in peft.sites_of(family, args) for site in row]
    found = [Table(site.pairs[0].name, site.module, site.pairs[0].twin) for site in sites]
    return list({(table.name, table.twin): table for table in found if table.name in TABLES}.values())


def saved_tables(
    tables: Sequence[Table], config: Mapping[str, Any], held: Mapping[str, tuple[int, ...]]
) -> dict[Table, str]:
    """The keys of those that are saved whole, of the shapes of a file's tensors. UserError where others are said to be,
    or some are not there."""
    keys = {table: [f"{peft.PREFIX}{table.module}.{end}" for end in (WHOLE, BENEATH)] for table in tables}
    saved = {table: next((key for key in ends if key in held), None) for table, ends in keys.items()}
    named = config.get("modules_to_save") or []
    for name in named if isinstance(named, list) else [named]:
        which = [table for table in tables if f".{table.module}".endswith(f".{name}")]
        if not which:
            raise UserError(
                f"adapter_config.json: modules_to_save={json.dumps(named)} is not supported; read are "
                f"{' and '.join(table.module.rpartition('.')[2] for table in tables)}"
            )
        if absent := [keys[table][0] for table in which if saved[table] is None]:
            raise UserError(f"its adapter is not complete: it misses {absent[0]}")
    found = {table: key for table, key in saved.items() if key is not None}
    if found and config.get("trainable_token_indices"):
        raise UserError("adapter_config.json: trainable_token_indices beside whole tables is not supported")
    return found


def all_keys(saved: Mapping[Table, str]) -> set[str]:
    """Those of tables that are saved whole, and of what may lie beside these."""
    beside = (f"{peft.PREFIX}{table.module}.{end}" for table in saved for end in (AGAIN, BEFORE))
    return {*saved.values(), *beside}


def n_tokens(saved: Mapping[Table, str], held: Mapping[str, tuple[int, ...]], tables: Sequence[Table], n: int) -> int:
    """Tokens of the model, whose base has n. UserError where tables have not the same, or fewer than the base."""
    rows = {key: held[key][0] for key in saved.values()}
    most = max(rows.values(), default=n)
    for key, found in rows.items():
        if found != most or found < n:
            raise UserError(f"{key} has {found:,} rows, expected {max(most, n):,}")
    if most > n and (others := {table.name for table in tables} - {table.name for table in saved}):
        raise UserError(
            f"it has {most:,} tokens, of which its base has {n:,}, and no rows of {min(others)} for the others; save "
            f"it with both tables (save_embedding_layers of PEFT's save_pretrained)"
        )
    return most


def added_rows(
    saved: Mapping[Table, str],
    read: Callable[[str], Tensor],
    args: ModelArgs,
    base: Weights,
    tied: bool,
) -> dict[str, Tensor]:
    """What tables add to those of the base (V, D), by our name. UserError where one has another shape, or table and
    head, which are one matrix here, differ.

    read: a tensor by its key, float32. tied: whether PEFT keeps both the same where it holds one alone.
    """
    found: dict[str, Tensor] = {}
    for table, key in saved.items():
        values, shape = read(key), (args.vocab_size, args.dim)
        if values.shape != shape:
            raise UserError(f"{key} has shape {tuple(values.shape)}, expected {shape}")
        step = max(1, CHUNK_ELEMENTS // args.dim)
        for low in range(0, args.vocab_size, step):
            part = values[low : low + step]
            part -= base.read(table.name, ((low, low + len(part)), (0, args.dim)), torch.empty(part.shape))
        if not torch.equal(found.setdefault(table.name, values), values):
            raise UserError("token table and head are one matrix in this model, and the ones that it holds differ")
    alone = args.tie_embeddings and len(saved) == 1 and not tied
    if alone and not next(iter(saved.values())).endswith(BENEATH):
        (table,) = saved
        raise UserError(
            f"token table and head are one matrix in this model, of which it has the "
            f"{'head' if table.twin else 'table'} alone; ensure_weight_tying of PEFT keeps them one"
        )
    return found


def span_of(added: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """The first row that is another than the base's, and the first after the last one; None where there is none."""
    rows = [values.any(1).nonzero() for values in added.values()]
    rows = [found for found in rows if len(found)]
    return (int(min(found[0] for found in rows)), int(max(found[-1] for found in rows)) + 1) if rows else None
