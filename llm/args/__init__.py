"""What a model is: `ModelArgs`, and the layer-pattern grammar that resolves it to one frozen `LayerSpec` a layer.

Everything that differs between layers (mask, RoPE or not, QK norm, temperature, dense or MoE) is decided here, once;
building, attention masks and caches read the specs and never the args.
"""

from llm.args.layers import AttentionSpec, LayerSpec, Mask, QKNorm
from llm.args.lora import LoraArgs
from llm.args.model import ModelArgs
from llm.args.moe import MoEArgs
from llm.args.rope import RopeScaling
from llm.args.route import RouteArgs
from llm.args.ssm import SSMArgs
from llm.args.vision import VisionArgs

__all__ = [
    "AttentionSpec", "LayerSpec", "LoraArgs", "Mask", "ModelArgs", "MoEArgs", "QKNorm",
    "RopeScaling", "RouteArgs", "SSMArgs", "VisionArgs",
]  # fmt: skip
