"""What cannot become a graph, by name."""

from llm.args import ModelArgs
from llm.args.layers import FFNS, MIXERS, either
from llm.errors import UserError
from llm.layers.attention import Attention
from llm.layers.ffn import build_feed_forward
from llm.layers.moe import build_moe

EXPORTED_POSITIONS = ("rope", "sinusoidal", "learned", "none")


def refuse_unexportable(args: ModelArgs) -> None:
    """UserError where a graph could not compute what the model does."""
    if args.vision is not None:
        raise UserError(
            "model.vision: pictures are cut into tiles by their contents, which a graph cannot do; a foreign folder "
            "can be read with --text_only"
        )
    if args.rope_scaling is not None and args.rope_scaling.kind == "dynamic":
        raise UserError(
            "model.rope_scaling.kind=dynamic turns by the length of the whole document, which a step does not know; "
            "linear, llama3 and yarn can be exported"
        )
    if args.lora is not None:
        raise UserError("model.lora: adapters are exported merged; LLM.from_pretrained merges those of a run")
    for spec in args.layer_specs():
        mixer = MIXERS[spec.mixer.name]
        if spec.attention is None or not issubclass(mixer, Attention):
            raise UserError(
                f"layer {spec.index} is {spec.mixer.name}; only layers with attention to each token can be exported"
            )
        if FFNS[spec.ffn].build not in (build_feed_forward, build_moe) and spec.ffn != "none":
            raise UserError(f"layer {spec.index} has the feed-forward {spec.ffn}; dense, moe and none can be exported")
    if args.pos not in EXPORTED_POSITIONS:
        raise UserError(f"model.pos={args.pos} is of an extension; {either(EXPORTED_POSITIONS)} can be exported")
