"""A replica as DeepSpeed wants one to train: cut by ZeRO-3 from the first moment, and each parameter described."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm.args import ModelArgs
from llm.heads import OUTPUT
from llm.model import EMBEDDING, LLM
from llm.parallel.build import Storage, Whole, draw, drawn, fill_int8
from llm.parallel.engine import deepspeed_private as private
from llm.parallel.grid import Grid
from llm.parallel.replica import Replica
from llm.parameters import ParameterTable

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_replica(
    args: ModelArgs,
    seed: int,
    grid: Grid,
    *,
    zero_stage: int,
    precision: str,
    seq_len: int | None = None,
    source_len: int | None = None,
    logits: bool = True,
    table: ParameterTable | None = None,
) -> Replica:
    """This rank's part of a model that is to be trained (collective). In fp32 it has its initial values, else only what
    is frozen has, as the engine draws the other's float32 masters and rounds them to parameters.

    seq_len, source_len, logits: of training, by which the stages are balanced: see llm.parallel.stages.split. table:
    where some of its parameters are frozen.
    """
    values = seed if precision == "fp32" else None
    storage: Storage = Partitioned(DTYPES[precision], grid.reduce.handle) if zero_stage == 3 else Whole()
    replica = Replica.build(
        args, values, grid, storage=storage, seq_len=seq_len, source_len=source_len, logits=logits, table=table
    )
    replica.model.gathers_weights = zero_stage == 3
    if values is None:
        draw(frozen_parameters(replica.model), replica.table, grid, storage, seed)
    fill_int8(replica.model, replica.table, grid, drawn(replica.table, seed))
    describe(replica)
    return replica


@dataclass(frozen=True)
class Partitioned:
    """ZeRO-3's storage: each rank of `group` has its own share of each parameter, in `dtype`."""

    dtype: torch.dtype
    group: dist.ProcessGroup | None

    def allocate(self, model: LLM, device: torch.device) -> None:
        private.partition_parameters(model, self.dtype, device, self.group)

    def share(self, parameter: nn.Parameter) -> tuple[int, Tensor]:
        return private.share(parameter)


def describe(replica: Replica) -> None:
    """Notify DeepSpeed how each parameter is cut, which ones it is to leave alone, and which one is a copy that another
    rank steps on.
    """
    model, grid, table = replica.model, replica.grid, replica.table
    if grid.layout.expert > 1 and any(row.trainable and row.expert_dim is not None for row in table.values()):
        private.register_experts(model, grid)
    for name, parameter in model.named_parameters():
        row = table[name]
        if not row.trainable:
            private.mark_frozen(parameter)
            continue
        cut = row.cut(grid.layout.tensor) is not None
        private.mark(parameter, cut, grid.expert.size if row.expert_dim is not None else 1)
    if model.args.tie_embeddings and OUTPUT in model.units and EMBEDDING not in model.units:
        for parameter in model.tok_embeddings.parameters():
            private.mark_copy(parameter)


def frozen_parameters(model: LLM) -> dict[str, nn.Parameter]:
    """Those of this rank that do not train, by canonical name; copies of a frozen table among them."""
    return {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
