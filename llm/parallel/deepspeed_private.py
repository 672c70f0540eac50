"""Every undocumented attribute of DeepSpeed that this project relies on, each behind one function with a meaning.

Written against DeepSpeed 0.19.8; tests/distributed/test_deepspeed_private.py fails by name when one of them moves.
ZeRO-1 has two classes: DeepSpeedZeroOptimizer (float32 parameters) and BF16_Optimizer (bf16 parameters, float32
accumulation). Both flatten each parameter group, cut it into one contiguous piece per data-parallel rank, and keep
the float32 masters of theirs.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llm.parallel.launch import quiet_libraries, stdout_to_nowhere


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """`deepspeed.initialize` without its printing and without compiling its shared-memory operator.

    That operator serves inference only, costs 20 s of compilation at the first start and needs a compiler.
    """
    import deepspeed
    import deepspeed.comm.torch as backend

    quiet_libraries()
    backend.build_shm_op = lambda: None
    with stdout_to_nowhere():
        if deepspeed.comm.comm.cdb is None:
            deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def master_partitions(engine: Any) -> list[Tensor]:
    """This rank's flat float32 piece of each parameter group; the keys of the base optimizer's state."""
    zero = engine.optimizer
    if hasattr(zero, "single_partition_of_fp32_groups"):
        return list(zero.single_partition_of_fp32_groups)
    return list(zero.fp32_groups_flat_partition)


def _mapping(parameter: Tensor) -> Any:
    """DeepSpeed's record of which part of the parameter this rank owns, set on the parameter itself; None for no
    part.
    """
    return parameter._hp_mapping  # type: ignore[attr-defined]


def owned_range(parameter: Tensor) -> tuple[int, int] | None:
    """(start, length) of the part of the flattened parameter whose master this rank owns; None when it owns none."""
    mapping = _mapping(parameter)
    if mapping is None:
        return None
    return mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel


def owned_master(parameter: Tensor) -> Tensor:
    """The float32 master values of the owned range, a view into the partition."""
    return _mapping(parameter).get_hp_fragment()


def owned_states(engine: Any, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(key, view) of every optimizer state of the owned range, such as exp_avg; nothing before the first step.

    Read from the base optimizer: DeepSpeed's own links stay empty for all groups but the first after the first step
    of ZeRO-1.
    """
    mapping = _mapping(parameter)
    partition = master_partitions(engine)[mapping.param_group_index]
    address = mapping.get_hp_fragment_address()
    state = engine.optimizer.optimizer.state.get(partition, {})
    for key in sorted(state):
        if torch.is_tensor(state[key]) and state[key].shape == partition.shape:
            yield key, state[key].narrow(0, address.start, address.numel)


def optimizer_scalars(engine: Any) -> dict[str, float]:
    """State that is one number per optimizer, such as AdamW's step count (equal in all groups)."""
    scalars: dict[str, float] = {}
    for partition in master_partitions(engine):
        for key, value in engine.optimizer.optimizer.state.get(partition, {}).items():
            if torch.is_tensor(value) and value.numel() == 1 and value.shape != partition.shape:
                scalars[key] = float(value)
    return scalars


def create_optimizer_state(engine: Any, keys: list[str], scalars: dict[str, float]) -> None:
    """Zeroed optimizer state, as if a first step had been made, so that `owned_states` yields it."""
    for partition in master_partitions(engine):
        state: dict[str, Tensor] = {
            name: torch.tensor(value, device=partition.device) for name, value in scalars.items()
        }
        state.update({key: torch.zeros_like(partition, requires_grad=False) for key in keys})
        if state:
            engine.optimizer.optimizer.state[partition] = state


def publish_masters(engine: Any) -> None:
    """Copy the masters into the parameters that the forward uses, on all ranks (collective)."""
    engine.optimizer.update_lp_params()


def gradient_norm(engine: Any) -> float:
    """Global 2-norm of the gradients of the last step, before clipping."""
    return float(engine.get_global_grad_norm())
