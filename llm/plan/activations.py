"""Bytes of activations that the forward of a micro-batch keeps for its backward, predicted from the numbers of a run.

A layer that is computed again in the backward keeps its input alone, whatever it is made of. Otherwise a layer keeps
what its products, norms and kernels read again. That was counted on CPUs (tests/train/test_activations.py does it
anew); fused kernels of GPUs keep as much or less, and windows and caps of scores count as if they were fused. Of layers
with experts, routes, strided attention, biases, dropout or adapters only the inputs are predicted.

Letters: D model width, H heads, K heads of keys and values, d head width, F width of the feed-forward; of state-space
layers I channels, h heads of P channels, G groups, N width of the state, Q tokens of a chunk.
"""

from typing import NamedTuple

from llm.args import LayerSpec, ModelArgs
from llm.plan.workload import BYTES, Workload

FLOAT32 = 4
CHANNEL = 5 * FLOAT32
"""Bytes of a channel that the recurrence keeps in any precision; as many are kept around its gate and norm."""
DECAY = 34
"""Bytes of a head's time steps and decays, whose sums are float64."""


class Kept(NamedTuple):
    """Of the rank that keeps most, in bytes."""

    layers: int
    """Of all its layers, of as many micro-batches as are under way at a time."""
    one: int | None
    """Of the layer that the backward is computing again; 0 where none is, None where that is not predicted."""


def predict(work: Workload) -> Kept | None:
    """None where a layer keeps what is not predicted here."""
    if work.recompute == "selective":
        return None
    under_way, found = work.layout.stages, []
    for stage in work.stages:
        specs = [*work.args.encoder_specs()][stage.encoder.start : stage.encoder.stop]
        specs += [*work.args.layer_specs()][stage.layers.start : stage.layers.stop]
        whole = [layer_bytes(work, spec) for spec in specs]
        known = [size for size in whole if size is not None]
        if work.recompute == "full":
            inputs = sum(input_bytes(work, spec) for spec in specs)
            found.append(Kept(under_way * inputs, max(known, default=0) if len(known) == len(whole) else None))
        elif len(known) < len(whole):
            return None
        else:
            found.append(Kept(under_way * sum(known), 0))
    return max(found, key=lambda kept: kept.layers)


def input_bytes(work: Workload, spec: LayerSpec) -> int:
    """Of a layer's input, which sequence parallelism cuts."""
    cut = work.layout.tensor if work.layout.sequence_parallel else 1
    return work.tokens_of(spec) * work.args.dim * BYTES[work.precision] // cut


def layer_bytes(work: Workload, spec: LayerSpec) -> int | None:
    """Of all that a layer keeps where nothing is computed again; None where that is not predicted."""
    args, width, ranks = work.args, BYTES[work.precision], work.layout.tensor
    other = args.drops or args.lora or args.qkv_bias or args.o_bias or args.ffn_bias or spec.cross or spec.parallel
    if other or args.norm != "rms" or spec.norms.of_sum:
        return None
    inside = _mixer_bytes(args, spec, width)
    if inside is None or spec.ffn not in ("dense", "none"):
        return None
    parts, token = 1, inside
    if spec.ffn == "dense":
        parts, token = 2, inside + (4 if args.gated else 2) * args.ffn_width() * width
    normed = (spec.norms.before + spec.norms.after) * (args.dim * width + FLOAT32)  # whole on every rank
    return parts * input_bytes(work, spec) + work.tokens_of(spec) * (parts * normed + token // ranks)


def _mixer_bytes(args: ModelArgs, spec: LayerSpec, width: int) -> int | None:
    """Of a token inside a mixer."""
    if spec.mixer.name == "ssm":
        return _ssm_bytes(args, spec.stride, width)
    heads = spec.attention
    if heads is None:
        return None
    values = args.n_heads * (2 + 2 * heads.gate) + 2 * args.kv_heads  # queries, what is made of values, keys, values
    bytes_ = values * args.head_width * width + FLOAT32 * args.n_heads
    if heads.qk_norm is not None:
        normed = args.n_heads + args.kv_heads
        bytes_ += normed * args.head_width * width + FLOAT32 * (2 if heads.qk_norm == "full" else normed)
    return bytes_


def _ssm_bytes(args: ModelArgs, stride: int, width: int) -> int | None:
    ssm = args.ssm
    if ssm is None or ssm.scales is not None or ssm.norm != "after_gate" or ssm.kernel != "torch":
        return None
    inner, heads = ssm.widths(args.dim)
    shared = 2 * ssm.groups * ssm.d_state
    copies = 1 if ssm.groups == 1 else 2  # several groups are laid out anew for their products
    said = inner * (CHANNEL + width) + heads * (DECAY + width) + shared * (FLOAT32 * copies + width)
    said += FLOAT32 * ssm.chunk * (heads + ssm.groups)  # decays and scores within a chunk
    said += FLOAT32 * inner * ssm.d_state // ssm.chunk  # states between chunks
    pooled = args.dim * width * (stride + 1) if stride > 1 else 0  # tokens by chunk, and their mean
    return inner * (CHANNEL + width) + (said + pooled) // stride
