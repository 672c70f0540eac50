"""A model on its device, as its ZeRO stage wants it: whole, or from the first moment only this rank's share."""

import torch

from llm import init
from llm.args import ModelArgs
from llm.model import LLM
from llm.parallel import deepspeed_private as private
from llm.parallel.launch import World

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(args: ModelArgs, seed: int, world: World, *, zero_stage: int, precision: str) -> LLM:
    """The model with its initial values.

    Under ZeRO-3 no rank ever holds more than its share: an initial value is a function of its index, so each rank draws
    its own. Below, the parameters are float32 until the engine casts them.
    """
    if zero_stage < 3:
        return LLM(args, seed=seed).to(world.device)
    model = LLM(args, device="meta")
    for module in model.modules():  # buffers are few and whole
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros_like(buffer, device=world.device)
    private.partition_parameters(model, DTYPES[precision], world.device)
    for name, parameter in model.named_parameters():
        start, values = private.share(parameter)
        values.copy_(init.initial_values(args, name, seed, start, start + values.numel()))
    return model
