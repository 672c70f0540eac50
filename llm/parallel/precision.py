"""Which arithmetic a device has: DeepSpeed's accelerator is asked, as it refuses what it does not know."""

from llm.errors import UserError


def has_arithmetic(precision: str) -> bool:
    """Whether this device computes in fp32, bf16 or fp16, as DeepSpeed sees it (a CPU without fp16 units does not)."""
    from deepspeed.accelerator import get_accelerator

    if precision == "fp16":
        return bool(get_accelerator().is_fp16_supported())
    return precision != "bf16" or bool(get_accelerator().is_bf16_supported())


def check_precision(precision: str) -> None:
    """UserError where the device lacks this arithmetic, naming those that it has."""
    if not has_arithmetic(precision):
        others = [other for other in ("bf16", "fp32") if other != precision and has_arithmetic(other)]
        raise UserError(
            f"train.precision={precision}: this device has no {precision} arithmetic; use {' or '.join(others)}"
        )
