"""Every undocumented attribute of DeepSpeed's pipeline that this project relies on, each behind one function.

Written against DeepSpeed 0.19.8; tests/distributed/test_deepspeed_pipeline.py fails by name when one of them moves.

The schedules (one forward, one backward in turn; DualPipeV), their sends and receives and the buffers in flight are
DeepSpeed's. It gets a rank's stages as a module of its class PipelineModule or DualPipeVModule whose only content is a
function of ours, and groups from our grid: their own constructors would build layers under names of their own and make
every group of ranks again. Of its instructions one is replaced by ours: where it would sum gradients of tied weights,
what is to happen between the last backward and the reduction of gradients happens.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm.parallel.engine.deepspeed_private import _import_deepspeed
from llm.parallel.grid import DeepSpeedGroups, Grid
from llm.parallel.launch.process import stdout_to_nowhere
from llm.parallel.replica import Replica

Forward = Callable[[Tensor, int], Tensor]
"""Of the tensor that came from the stage before (in the first stage: token ids) to the one for the stage after (in the
last stage: the loss), in the first or second of a rank's stages: 0 or 1."""


class PipelineGroups(DeepSpeedGroups):
    """The grid as DeepSpeed's `mpu` and as its PipelineParallelGrid: there, model parallel means a whole replica."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self._grid = grid
        self.data_parallel_size, self.data_parallel_id = grid.reduce.size, grid.reduce.rank
        self.pipe_parallel_size = grid.pipeline.size
        self.model_parallel_size = grid.tensor.size
        self.pp_group = list(grid.pipeline.ranks)

    def get_global_rank(self) -> int:
        return self._grid.world.rank

    def get_stage_id(self) -> int:
        return self._grid.pipeline.rank

    def stage_to_global(self, stage_id: int) -> int:
        return self._grid.pipeline.ranks[stage_id]

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self._grid.reduce.ranks)

    def get_model_parallel_rank(self) -> int:
        return self._grid.replica.rank

    def get_model_parallel_world_size(self) -> int:
        return self._grid.replica.size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._grid.replica.handle

    def get_pipe_parallel_rank(self) -> int:
        return self._grid.pipeline.rank

    def get_pipe_parallel_world_size(self) -> int:
        return self._grid.pipeline.size

    def get_pipe_parallel_group(self) -> dist.ProcessGroup | None:
        return self._grid.pipeline.handle

    get_pipeline_model_parallel_rank = get_pipe_parallel_rank
    get_pipeline_model_parallel_world_size = get_pipe_parallel_world_size
    get_pipeline_model_parallel_group = get_pipe_parallel_group


def initialize(
    replica: Replica,
    forward: Forward,
    before_reduction: Callable[[], None],
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
) -> Any:
    """DeepSpeed's pipeline engine around this rank's stages, without its printing.

    before_reduction is called in each step after the last backward, before gradients are summed over data-parallel
    ranks. Parameters of `optimizer` that the model does not have become part of the module, so that they get its dtype.
    """
    deepspeed = _import_deepspeed()
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe import schedule
    from deepspeed.runtime.pipe.dualpipev import DualPipeVModule

    model, grid = replica.model, replica.grid

    class Stages(DualPipeVModule if len(replica.stages) > 1 else PipelineModule):  # type: ignore[misc]
        active_phase = 0

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.model = model
            known = {id(parameter) for parameter in model.parameters()}
            members = (parameter for group in optimizer.param_groups for parameter in group["params"])
            self.fillers = nn.ParameterList(parameter for parameter in members if id(parameter) not in known)
            self._grid = PipelineGroups(grid)
            self._local_start, self._local_stop = 0, 1
            self.loss_fn, self.dynamic_shape = None, False
            self.tied_comms: dict[str, Any] = {}
            self.activation_checkpoint_interval, self.activation_checkpoint_func = 0, None

        def mpu(self) -> PipelineGroups:
            return self._grid

        def activate_phase(self, phase: int) -> None:
            self.active_phase = phase

        def forward(self, x: Tensor) -> Tensor:
            return forward(x, self.active_phase)

    config = {**config, "pipeline": {"pipe_partitioned": False, "grad_partitioned": False}}
    with stdout_to_nowhere():
        engine, _, _, _ = deepspeed.initialize(model=Stages(), optimizer=optimizer, config=config)
    engine._INSTRUCTION_MAP = {
        **engine._INSTRUCTION_MAP,
        schedule.ReduceTiedGrads: lambda _: before_reduction(),
    }
    return engine


def train(engine: Any, batches: Iterator[tuple[Tensor, Tensor]], micro_batches: int) -> None:
    """One step over so many micro-batches (tokens, labels): forwards, backwards, and the update if gradients are finite
    (collective).
    """
    engine.micro_batches = micro_batches
    engine.train_batch(batches)


def forget_shape(engine: Any) -> None:
    """Before micro-batches of another shape than the last ones, on all stages."""
    engine.reset_activation_shape()


def count_fillers(engine: Any) -> None:
    """Have BF16_Optimizer take the norm of each group of experts on every stage: it leaves out what has no gradient,
    and the others would wait for that stage.
    """
    fillers = {id(parameter) for parameter in engine.module.fillers}
    for number, group in enumerate(getattr(engine.optimizer, "bf16_groups", [])):
        for i, parameter in enumerate(group):
            if id(parameter) in fillers:
                engine.optimizer.fp32_groups_has_gradients[number][i] = True
