"""Every undocumented attribute of DeepSpeed that this project relies on, each behind one function with a meaning.

Written against DeepSpeed 0.19.8; tests/distributed/test_deepspeed_private.py fails by name when one of them moves.

The optimizer steps on flat float32 partitions, and `owned_ranges` says what lies where in them. Stages 1 and 2 flatten
each parameter group and cut it into one contiguous partition per data-parallel rank (class BF16_Optimizer for stage 1
in bf16, else DeepSpeedZeroOptimizer); stage 3 cuts every parameter over the ranks and flattens this rank's shares;
stage 0 has no partitions, the parameters themselves are the masters.
"""

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm.parallel.grid import DeepSpeedGroups, Grid
from llm.parallel.launch.process import quiet_libraries, stdout_to_nowhere

LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _import_deepspeed() -> Any:
    """DeepSpeed, without compiling its shared-memory operator: that serves inference only, costs 20 s of compilation at
    the first start and needs a compiler.
    """
    import deepspeed

    # not `import deepspeed.comm.torch as backend`: that finds torch itself, which deepspeed.comm imports by that name
    backend = importlib.import_module("deepspeed.comm.torch")
    quiet_libraries()
    backend.build_shm_op = lambda: None  # type: ignore[attr-defined]
    if deepspeed.comm.comm.cdb is None:
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], grid: Grid) -> Any:
    """`deepspeed.initialize` on this grid, without its printing."""
    deepspeed = _import_deepspeed()
    mpu = None if grid.layout.tensor == grid.layout.expert == 1 else DeepSpeedGroups(grid)
    deepspeed.utils.groups.mpu = mpu  # it would keep that of an earlier engine
    with stdout_to_nowhere():
        engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)
    return engine


def mark(parameter: Tensor, tensor_parallel: bool, expert_ranks: int) -> None:
    """Say to DeepSpeed how a parameter is cut: its gradient norm counts one that is not by the first tensor-parallel
    rank alone, and gradients of experts are summed over the ranks that hold the same ones.
    """
    parameter.model_parallel = tensor_parallel  # type: ignore[attr-defined]
    if expert_ranks > 1:
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.group_name = f"ep_size_{expert_ranks}"  # type: ignore[attr-defined]


def mark_frozen(parameter: Tensor) -> None:
    """Keep DeepSpeed from sending the parameter around before training: each rank has its own part, experts too, which
    it knows only as members of an optimizer.
    """
    parameter.ds_optim_param = True  # type: ignore[attr-defined]


def expert_group(parameter: Tensor) -> dict[str, Any]:
    """What DeepSpeed wants in the optimizer's group of this parameter: nothing, but for experts on several ranks."""
    if getattr(parameter, "allreduce", True):
        return {}
    return {"moe": True, "name": parameter.group_name}  # type: ignore[attr-defined]


def absent_expert_group(model: nn.Module) -> dict[str, Any]:
    """The same of experts that another stage of the pipeline has."""
    marker = getattr(model, "deepspeed_experts", None)
    return {} if marker is None else {"moe": True, "name": marker.expert_group_name}


def filler(group: dict[str, Any], like: Tensor) -> nn.Parameter:
    """A parameter for an optimizer group that would be empty; it stays 0."""
    made = nn.Parameter(torch.zeros(1, dtype=like.dtype, device=like.device))
    if group.get("moe"):
        made.allreduce, made.group_name = False, group["name"]  # type: ignore[attr-defined]
    return made


def mark_copy(parameter: Tensor) -> None:
    """From now on `is_copy(parameter)`: another rank has its master, steps on it and sends it here."""
    parameter.tied_copy = True  # type: ignore[attr-defined]


def is_copy(parameter: Tensor) -> bool:
    """Whether the parameter is a copy of one that another stage of the pipeline owns."""
    return bool(getattr(parameter, "tied_copy", False))


def register_experts(model: nn.Module, grid: Grid) -> None:
    """Make DeepSpeed use the grid's expert groups, and see that the model has experts: it looks for a module of its own
    class, so the model gets an empty one.
    """
    _import_deepspeed()
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    class Marker(MoE):
        def __init__(self, ranks: int) -> None:
            nn.Module.__init__(self)
            self.num_experts = self.num_local_experts = self.ep_size = ranks
            self.expert_group_name = name

        def set_deepspeed_parallelism(self, *_: Any) -> None:
            pass

    name = f"ep_size_{grid.expert.size}"
    for table, ranks_table, group in (
        (groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_PARALLEL_GROUP_RANKS, grid.expert),
        (groups._EXPERT_DATA_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP_RANKS, grid.expert_data),
    ):
        table.clear()
        ranks_table.clear()
        table[name], ranks_table[name] = group.handle, list(group.ranks)
    # without this BF16_Optimizer's norm would leave out what other tensor-parallel ranks have of an expert
    groups.expert_tensor_parallel_world_size = grid.tensor.size
    model.deepspeed_experts = Marker(grid.expert.size)


def partition_parameters(
    model: nn.Module, dtype: torch.dtype, device: torch.device, group: "torch.distributed.ProcessGroup | None"
) -> None:
    """Turn a model on the meta device into one of ZeRO-3: each rank of `group` allocates its own share of each
    parameter.

    The shares are left unset. `zero.Init` itself would allocate, and broadcast, one whole parameter after the other.
    """
    with stdout_to_nowhere():
        partitioner = _import_deepspeed().zero.Init(
            dtype=dtype, mem_efficient_linear=False, data_parallel_group=group
        )
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # pages that nobody writes cost nothing on a CPU: only this rank's share is copied out of it
            whole = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device))
            setattr(module, name, whole)
            partitioner._convert_to_deepspeed_param(whole)
            whole.partition()  # type: ignore[attr-defined]


def share(parameter: Tensor) -> tuple[int, Tensor]:
    """(start, values) of this rank's share of a ZeRO-3 parameter: a view; empty where the share is only padding."""
    partition = parameter.ds_tensor  # type: ignore[attr-defined]
    rank = torch.distributed.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
    start = partition.ds_numel * rank
    length = max(0, min(partition.ds_numel, parameter.ds_numel - start))  # type: ignore[attr-defined]
    return start, partition.data.narrow(0, 0, length)


@dataclass(frozen=True)
class OwnedRange:
    """Elements [start, start + length) of a rank's flattened box of a parameter: they lie in `flat`, this rank's
    partition number `partition`, from `offset` on.
    """

    name: str
    start: int
    length: int
    partition: int
    flat: Tensor
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """This range of a tensor laid out like `flat`, such as an optimizer state; a view."""
        return flat.view(-1).narrow(0, self.offset, self.length)


def owned_ranges(engine: Any, model: nn.Module) -> list[OwnedRange]:
    """What this rank's optimizer steps on, in the order of the model's parameters; over all data-parallel ranks each
    element once, but at stage 0, where every rank has them all.
    """
    zero, flats, found = engine.optimizer, partitions(engine), []
    number_of = {id(flat): i for i, flat in enumerate(flats)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(zero, "fp32_partitioned_groups_flat"):
            partition, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
            start, values = share(parameter)
            place = (start, values.numel(), partition, flats[partition], offset)
        elif hasattr(zero, "bit16_groups") or hasattr(zero, "bf16_groups"):
            mapping = getattr(parameter, "_hp_mapping", None)  # a copy of a tied weight never has one
            if mapping is None:
                continue
            here, there = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
            partition = mapping.param_group_index
            place = (here.start, here.numel, partition, flats[partition], there.start)
        else:
            place = (0, parameter.numel(), number_of[id(parameter)], parameter, 0)
        if place[1]:
            found.append(OwnedRange(name, *place))
    return found


def partitions(engine: Any) -> list[Tensor]:
    """This rank's flat float32 partitions; the keys of the base optimizer's state."""
    zero = engine.optimizer
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(zero, attribute):
            return list(getattr(zero, attribute))
    return [parameter for group in zero.param_groups for parameter in group["params"]]


def names_by_partition(engine: Any, model: nn.Module) -> list[list[str]]:
    """Names of the parameters that each partition number holds parts of, over all ranks, in the order of flattening."""
    zero = engine.optimizer
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for attribute in ("fp16_groups", "bit16_groups", "bf16_groups"):
        if hasattr(zero, attribute):
            groups = getattr(zero, attribute)
            return [[names[id(parameter)] for parameter in group if id(parameter) in names] for group in groups]
    return [[names[id(parameter)]] for parameter in partitions(engine)]


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that was given to `initialize`; its state is keyed by the partitions."""
    return engine.optimizer.optimizer if hasattr(engine.optimizer, "optimizer") else engine.optimizer


def skip_reduction(engine: Any) -> None:
    """On one rank, do not flatten and unflatten gradients for the sake of a sum over one; the classes that reduce by
    their own hooks are left alone.
    """
    if type(engine.optimizer).__name__ == "BF16_Optimizer" or isinstance(engine.optimizer, torch.optim.Optimizer):
        engine.enable_backward_allreduce = False


def publish_masters(engine: Any) -> None:
    """Copy the masters into the parameters that the forward uses, on all ranks (collective)."""
    zero = engine.optimizer
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        zero._partition_all_parameters()
        for i in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(i)
        if zero.persistent_parameters:  # small ones stay gathered between steps
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
    elif hasattr(zero, "update_lp_params"):
        zero.update_lp_params()


def gradient(engine: Any, parameter: Tensor) -> Tensor | None:
    """The sum of the step's gradients of a parameter so far, where the optimizer will look for it."""
    if hasattr(engine.optimizer, "bf16_groups"):
        return getattr(parameter, "_hp_grad", None)
    if getattr(engine.optimizer, "use_grad_accum_attribute", False):
        return getattr(parameter, "grad_accum", None)
    return parameter.grad


def before_reduction(engine: Any, function: Callable[[], None]) -> None:
    """Have `function` called in each step after the last backward, before gradients are summed over data-parallel
    ranks; not in ZeRO 2 and 3, which do that in every backward.
    """
    reduce = engine.allreduce_gradients

    def call_and_reduce(*args: Any, **kwargs: Any) -> None:
        if engine.is_gradient_accumulation_boundary():
            function()
        reduce(*args, **kwargs)

    engine.allreduce_gradients = call_and_reduce


def loss_scaler_state(engine: Any) -> dict[str, float]:
    """The dynamic loss scaler of fp16, as numbers; empty in other precisions."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if not getattr(scaler, "dynamic", False):
        return {}
    return {field: getattr(scaler, field) for field in LOSS_SCALER_FIELDS}


def set_loss_scaler_state(engine: Any, state: dict[str, float]) -> None:
    """Put back what `loss_scaler_state` gave."""
    for field, value in state.items() if loss_scaler_state(engine) else ():
        setattr(engine.optimizer.loss_scaler, field, value)


def grow_loss_scale_late(engine: Any) -> None:
    """Leave the growth of fp16's loss scale to `end_step`: DeepSpeed grows it before it divides the gradients by
    it, so that a step in which it grows is made with half the gradient, and ZeRO-3 reports half the norm. At its lowest
    scale it is not to end the process: what then happens is decided by guard.nonfinite.
    """
    zero = engine.optimizer
    if loss_scaler_state(engine):
        zero.loss_scaler.raise_error_at_min_scale = False
        update = zero._update_scale
        zero._update_scale = lambda has_overflow=False: update(True) if has_overflow else None


def loss_scale_is_lowest(engine: Any) -> bool:
    """Whether fp16's loss scale cannot fall any further: it is at its minimum, or a fixed one."""
    state = loss_scaler_state(engine)
    return not state or state["cur_scale"] <= engine.optimizer.loss_scaler.min_scale


def end_step(engine: Any) -> float:
    """After a step: the global 2-norm of its gradients, before clipping; inf where it was not applied because that was
    not finite. fp16's loss scaler learns of a step that was.
    """
    norm, zero = float(engine.get_global_grad_norm()), engine.optimizer
    if math.isfinite(norm):
        if loss_scaler_state(engine):
            zero.loss_scaler.update_scale(False)
    elif hasattr(zero, "single_partition_of_fp32_groups") and zero.cpu_offload:
        # it keeps its sums in half precision, and would add every later gradient to what is not finite
        for number in zero.averaged_gradients:
            zero.averaged_gradients[number] = None
    return norm


def states(engine: Any, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor like `flat`) of every element-wise optimizer state of a partition, such as exp_avg; nothing before
    the first step.

    Read from the base optimizer: DeepSpeed's own links stay empty for all groups but the first after the first step
    of ZeRO-1.
    """
    state = base_optimizer(engine).state.get(flat, {})
    for key in sorted(state):
        if torch.is_tensor(state[key]) and state[key].shape == flat.shape:
            yield key, state[key]


def optimizer_scalars(engine: Any) -> dict[str, float]:
    """State that is one number per optimizer, such as AdamW's step count (equal in all partitions that have one)."""
    scalars: dict[str, float] = {}
    for flat in partitions(engine):
        for key, value in base_optimizer(engine).state.get(flat, {}).items():
            if torch.is_tensor(value) and value.numel() == 1 and value.shape != flat.shape:
                scalars[key] = float(value)
    return scalars
