"""What llm/parallel/engine/deepspeed_pipeline.py relies on in DeepSpeed's pipeline: this fails by name when one of it
moves.
That the whole works is the matter of test_layouts.py.
"""

import inspect
from itertools import product

import pytest

STAGES, MICRO_BATCHES = (2, 3, 4), (1, 2, 5, 8)


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("micro_batches", MICRO_BATCHES)
def test_every_stage_has_its_forwards_and_backwards_in_the_order_of_micro_batches(
    stages: int, micro_batches: int
) -> None:
    """The queue of a stage's forwards counts on it; and the sum over ranks before the reduction, on all being done."""
    from deepspeed.runtime.pipe import schedule

    for stage in range(stages):
        made = schedule.TrainSchedule(micro_batches=micro_batches, stages=stages, stage_id=stage)
        commands = [command for step in made for command in step]
        names = [type(command).__name__ for command in commands]
        assert names[-3:] == ["ReduceTiedGrads", "ReduceGrads", "OptimizerStep"]
        assert names.count("ForwardPass") == names.count("BackwardPass") == micro_batches
        buffers = [c.kwargs["buffer_id"] for c in commands if isinstance(c, schedule.ForwardPass)]
        assert buffers == [m % made.num_pipe_buffers() for m in range(micro_batches)]


@pytest.mark.parametrize("ranks", STAGES)
@pytest.mark.parametrize("more", [0, 1, 8])
def test_with_dualpipev_too_each_of_a_ranks_two_stages_has_its_own_in_order(ranks: int, more: int) -> None:
    """Our Layout.stages_of says which stages these are."""
    from deepspeed.runtime.pipe import schedule

    micro_batches = 2 * ranks + more
    for place in range(ranks):
        made = schedule.DualPipeVSchedule(micro_batches=micro_batches, stages=ranks, stage_id=place)
        commands = [command for step in made for command in step]
        names = [type(command).__name__ for command in commands]
        assert names[-4:] == ["CommitP2P", "ReduceTiedGrads", "ReduceGrads", "OptimizerStep"]
        for phase, kind in product((0, 1), (schedule.ForwardPass, schedule.BackwardPass)):
            buffers = [c.buffer_id for c in commands if isinstance(c, kind) and c.phase == phase]
            assert buffers == [phase * micro_batches + m for m in range(micro_batches)]


def test_dualpipev_is_an_engine_chosen_by_the_class_of_module_that_it_tells_its_phase() -> None:
    import deepspeed
    from deepspeed.runtime.pipe.dualpipev import DualPipeVEngine, DualPipeVModule
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.pipe.module import PipelineModule

    assert "DualPipeVEngine if isinstance(model, DualPipeVModule)" in inspect.getsource(deepspeed.initialize)
    assert issubclass(DualPipeVEngine, PipelineEngine) and issubclass(DualPipeVModule, PipelineModule)
    engine, made = inspect.getsource(DualPipeVEngine), inspect.getsource(DualPipeVEngine.__init__)
    assert "self.module.activate_phase(phase)" in engine and "self.micro_batches >= 2 * self.num_stages" in made
    of_module = {"activate_phase", "phase_funcs", "phase_bounds", "active_phase"}
    used = {name for name in of_module if f"module.{name}" in engine}
    assert used == {"activate_phase"}, "the module's other attributes are not made"


def test_the_instruction_that_is_replaced_is_there_and_looked_up_on_the_engine() -> None:
    from deepspeed.runtime.pipe import schedule
    from deepspeed.runtime.pipe.engine import PipelineEngine

    assert schedule.ReduceTiedGrads in PipelineEngine._INSTRUCTION_MAP
    source = inspect.getsource(PipelineEngine._exec_schedule)
    assert "MethodType(self._INSTRUCTION_MAP[type(cmd)], self)" in source


def test_the_engine_has_the_attributes_that_are_set_and_called() -> None:
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.pipe.module import PipelineModule

    made = inspect.getsource(PipelineEngine.__init__)
    for attribute in ("self.micro_batches", "self.module._grid", "self.module.tied_comms"):
        assert attribute in made, attribute
    assert "self.micro_batches" in inspect.getsource(PipelineEngine._train_schedule)
    assert callable(PipelineEngine.reset_activation_shape) and callable(PipelineModule.mpu)


def test_the_optimizers_keep_gradients_where_they_are_looked_for() -> None:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    bf16 = inspect.getsource(BF16_Optimizer)
    for attribute in ("self.bf16_groups", "self.fp32_groups_has_gradients", "lp._hp_grad = hp_grad"):
        assert attribute in bf16, attribute
    assert "param.grad_accum if self.use_grad_accum_attribute else param.grad" in inspect.getsource(
        DeepSpeedZeroOptimizer.get_param_gradient_attribute
    )
