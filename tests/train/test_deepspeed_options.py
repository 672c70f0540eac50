"""The `deepspeed:` section: every option is known and of its type before anything else of a run, in one line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm.errors import UserError
from llm.train.config import validate
from llm.train.config.deepspeed_options import DECIDED, GROUPS, NOT_USED, PLAIN_GROUPS, PLAIN_OPTIONS, REMOVED, model_of
from tests.distributed.harness import tiny_config


def read(**options: Any) -> dict[str, Any]:
    return validate({**tiny_config(Path("unused")), "deepspeed": options}, "c.yaml").deepspeed


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"no_such_option": 1}, "unknown option deepspeed.no_such_option; known here: "),
        ({"wall_clock_brakdown": True}, "did you mean deepspeed.wall_clock_breakdown?"),
        ({"wall_clock_breakdown": "maybe"}, "deepspeed.wall_clock_breakdown='maybe': input should be a valid boolean"),
        ({"steps_per_print": True}, "deepspeed.steps_per_print=true: expected a value other than true or false"),
        ({"communication_data_type": "fp8"}, "deepspeed.communication_data_type='fp8': possible are fp16, bf16, fp32"),
        ({"zero_optimization": {"reduce_bucket_size": "abc"}}, "deepspeed.zero_optimization.reduce_bucket_size='abc'"),
        ({"zero_optimization": {"reduce_buket_size": 1}}, "did you mean deepspeed.zero_optimization.reduce_bucket_siz"),
        ({"zero_optimization": {"offload_param": {"devise": "cpu"}}}, "deepspeed.zero_optimization.offload_param.devi"),
        ({"zero_optimization": {"stage": 2}}, "deepspeed.zero_optimization.stage is set by parallel.zero_stage"),
        ({"zero_optimization": True}, "deepspeed.zero_optimization=true: expected a mapping of options"),
        ({"flops_profiler": "yes"}, "deepspeed.flops_profiler='yes': expected a mapping of options"),
        ({"flops_profiler": {"enable": True}}, "did you mean deepspeed.flops_profiler.enabled?"),
        ({"timers": {"throughput": {"enabled": "perhaps"}}}, "deepspeed.timers.throughput.enabled='perhaps'"),
        ({"gradient_clipping": 1.0}, "deepspeed.gradient_clipping is set by optim.clip_norm; leave it out"),
        ({"autotuning": {}}, "deepspeed.autotuning has no effect here"),
        ({"elasticity": {}}, "deepspeed.elasticity: DeepSpeed has removed this option"),
    ],
)
def test_a_wrong_option_is_one_line_with_its_key(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as error:
        read(**options)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_known_options_come_out_as_values_of_their_types() -> None:
    zero = {"reduce_bucket_size": 5e8, "stage3_max_live_parameters": "1000", "allgather_bucket_size": "auto"}
    assert read(zero_optimization=zero, wall_clock_breakdown="yes") == {
        "zero_optimization": {"reduce_bucket_size": 500_000_000, "stage3_max_live_parameters": 1000},
        "wall_clock_breakdown": True,
    }


class Asked(dict[str, Any]):
    """A dict that notes which keys it was asked for."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.names: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.names.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.names.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()


def test_the_options_at_the_top_are_those_that_this_version_of_deepspeed_asks_for() -> None:
    """A new version that knows more or fewer fails here by name."""
    from deepspeed.runtime.config import DeepSpeedConfig

    asked = Asked(train_micro_batch_size_per_gpu=1)
    DeepSpeedConfig(asked)
    tables = (*PLAIN_OPTIONS, *PLAIN_GROUPS, *GROUPS, *DECIDED, *NOT_USED, *REMOVED)
    assert asked.names == {name.split(".")[0] for name in tables}


def test_options_that_are_not_free_are_still_deepspeeds() -> None:
    names = {name for name in (*DECIDED, *NOT_USED) if name.startswith("zero_optimization.")}
    fields = model_of("zero_optimization").model_fields
    assert {name.removeprefix("zero_optimization.") for name in names} <= set(fields)
    assert all(model_of(group).model_fields for group in GROUPS)
