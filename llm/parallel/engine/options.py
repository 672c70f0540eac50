"""DeepSpeed's JSON for a run: derived from what the engine is asked for, so that there is one surface."""

from collections.abc import Mapping
from typing import Any

import torch

ZERO3_SUB_GROUP = 1 << 24
"""Elements of a rank's share that ZeRO-3 makes masters of, and steps, at a time: twice their float32 size is what it
needs above what it keeps."""


def deepspeed_config(
    precision: str, zero_stage: int, offload_optimizer: bool, clip_norm: float, experts_on_ranks: bool
) -> dict[str, Any]:
    """DeepSpeed's JSON for these settings, less the batch."""
    zero: dict[str, Any] = {"stage": zero_stage, "overlap_comm": False}
    if zero_stage == 1 and not torch.cuda.is_available() and not experts_on_ranks:
        zero["contiguous_gradients"] = False  # against fragmented GPU memory; elsewhere only a copy
    if zero_stage == 3:
        zero["sub_group_size"] = ZERO3_SUB_GROUP
    config: dict[str, Any] = {
        "gradient_clipping": clip_norm if zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        config["zero_force_ds_cpu_optimizer"] = False  # torch's fused AdamW is as fast, and needs no compiler
    if precision == "bf16":
        # without immediate updates BF16_Optimizer adds up the bf16 gradients of earlier micro-batches again (measured)
        config["bf16"] = {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": True}
    if precision == "fp16":
        config["fp16"] = {"enabled": True}  # loss scale 0: dynamic
    if precision != "fp32":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config


def with_extra(config: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """The config with a user's own options, whose sections add to its own."""
    merged = dict(config)
    for key, value in extra.items():
        merged[key] = {**merged[key], **value} if isinstance(merged.get(key), dict) else value
    return merged
