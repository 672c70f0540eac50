"""Run under torchrun: one traced run of the tiny model per case, all in one job to save start-up time."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from llm.parallel.launch import process
from llm.train.config import validate

STEPS = 4
MICRO_BATCHES = 2
SPOILED_STEP = 3
FACTOR = 1.001


def _off(value: Tensor) -> Tensor:
    return value * FACTOR


def sound(model: nn.Module) -> None:
    pass


def recomputing(model: nn.Module) -> None:
    model.activation_checkpointing = "selective"  # type: ignore[assignment]


def norm_of_a_layer(model: nn.Module) -> None:
    model.get_submodule("layers.2.ffn_norm").register_forward_hook(lambda module, args, output: _off(output))


def keys_on_the_last_rank(model: nn.Module) -> None:
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        model.get_submodule("layers.1.attention.wk").register_forward_hook(lambda module, args, output: _off(output))


def gradient_of_a_parameter(model: nn.Module) -> None:
    model.get_parameter("layers.3.feed_forward.experts.w2").register_hook(_off)


def weight_after_an_update(model: nn.Module) -> None:
    norm, forwards = model.get_submodule("layers.1.attention_norm"), []

    def spoil(module: nn.Module, args: Any) -> None:
        forwards.append(1)
        if len(forwards) == (SPOILED_STEP - 1) * MICRO_BATCHES + 1:
            with torch.no_grad():
                module.weight[3] += 0.01  # type: ignore[operator]

    norm.register_forward_pre_hook(spoil)


CASES: dict[str, tuple[Callable[[nn.Module], None], dict[str, Any]]] = {
    "sound": (sound, {}),
    "again": (sound, {}),
    "recomputing": (recomputing, {}),
    "zero_3": (sound, {"parallel": {"zero_stage": 3}}),
    "norm": (norm_of_a_layer, {}),
    "one_rank": (keys_on_the_last_rank, {}),
    "gradient": (gradient_of_a_parameter, {}),
    "weight": (weight_after_an_update, {}),
}


def main() -> None:
    config_path, out, *names = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
    base = yaml.safe_load(config_path.read_text())
    process.quiet_libraries()
    world = process.start(60, 1)
    from llm.train.trainer import Trainer

    base["train"]["micro_batch_size"] = base["train"]["global_batch_size"] // (world.size * MICRO_BATCHES)
    for name in names:
        plant, sections = CASES[name]
        raw = {**base, **{key: {**base.get(key, {}), **section} for key, section in sections.items()}}
        trainer = Trainer(validate(raw, str(config_path)), out / f"{name}-{world.size}", world)
        plant(trainer.run.engine.model)
        trainer.fit()


if __name__ == "__main__":
    process.run(main)
