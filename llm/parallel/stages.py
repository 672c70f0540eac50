"""Which layers each stage of a pipeline has: consecutive ones, cut so that the slowest stage is as fast as can be.

The layers of an encoder come before the others. A stage costs what its arithmetic for a token does (llm/flops.py), of
an encoder for the source tokens that there are for each. The embedding is a copy of a row and weighs nearly
nothing: 6 for each of its elements. A vision tower lies beside it and weighs what llm/flops.py says of a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from llm.args import ModelArgs
from llm.flops import unit_flops
from llm.layers.parameter import VISION, ParamInfo
from llm.parallel.layout import PipelineSchedule


@dataclass(frozen=True)
class Stage:
    """A stage's number, of how many, and its layers."""

    number: int
    count: int
    blocks: range
    """Its layers, numbered through the whole model in the order in which vectors pass them."""
    share: float
    """Its part of the model's work; 1 / count where all have as much."""
    vision: bool = False
    """Whether the model has a vision tower, which is the first stage's."""
    encoder_layers: int = 0
    """Of the whole model: the first of its blocks."""

    @property
    def encoder(self) -> range:
        """The numbers of its layers of the encoder."""
        return range(*(min(end, self.encoder_layers) for end in (self.blocks.start, self.blocks.stop)))

    @property
    def layers(self) -> range:
        """The numbers of its other layers."""
        return range(*(max(0, end - self.encoder_layers) for end in (self.blocks.start, self.blocks.stop)))

    @property
    def first(self) -> bool:
        """Whether it embeds."""
        return self.number == 0

    @property
    def last(self) -> bool:
        """Whether it predicts."""
        return self.number == self.count - 1

    @property
    def units(self) -> tuple[str, ...]:
        """The units of the model (ParamInfo.unit) that are its own, in their order."""
        encoder = [f"encoder.layers.{number}" for number in self.encoder]
        encoder += ["encoder.norm"] * (self.encoder_layers - 1 in self.encoder)
        layers = (f"layers.{number}" for number in self.layers)
        first = [*[VISION] * self.vision, "tok_embeddings"] * self.first
        return (*first, *encoder, *layers, *["norm", "output"] * self.last)

    def owns(self, row: ParamInfo) -> bool:
        """Whether this parameter is one of the stage's own: a tied table is the first stage's."""
        return row.unit in self.units


def split(
    args: ModelArgs, stages: int, seq_len: int | None = None, logits: bool = True, source_len: int | None = None
) -> list[Stage]:
    """The stages of a model, each with one layer at least. seq_len, source_len: target and source tokens of a row; by
    default the most that the model is for, and as many of the source. logits: whether any loss reads them, as none does
    where labels alone are learned. ValueError where it has fewer layers.
    """
    flops = unit_flops(args, seq_len or args.max_seq_len, source_len=source_len)
    weights = [flops[spec.unit] for spec in args.all_specs()]
    weights[0] += flops.get("tok_embeddings", 6 * args.dim) + flops.get(VISION, 0)
    weights[-1] += flops["output"] if logits else 0
    bounds, total = balanced(weights, stages), sum(weights)
    ends = list(zip(bounds, bounds[1:], strict=False))
    of_model = args.vision is not None, args.encoder_layers
    return [Stage(i, stages, range(a, b), sum(weights[a:b]) / total, *of_model) for i, (a, b) in enumerate(ends)]


def balanced(weights: Sequence[int], parts: int) -> list[int]:
    """Bounds of `parts` consecutive non-empty parts, whose heaviest is as light as can be; of several such cuts that
    with the smallest sum of squares, and then the first.
    """
    if not 1 <= parts <= len(weights):
        raise ValueError(f"{len(weights)} layers cannot be cut into {parts} stages")
    sums = [0, *accumulate(weights)]
    best: list[tuple[int, int, list[int]]] = [(end, end * end, [0, i]) for i, end in enumerate(sums)]  # of one part
    for part in range(2, parts + 1):
        best = [
            min(
                (max(best[j][0], sums[i] - sums[j]), best[j][1] + (sums[i] - sums[j]) ** 2, [*best[j][2], i])
                for j in range(part - 1, i)
            )
            if i >= part
            else best[i]
            for i in range(len(sums))
        ]
    return best[-1][2]


def bubble(ranks: int, micro_batches: int, schedule: PipelineSchedule) -> float:
    """The part of a step in which a rank waits, where all have as much work, a backward takes two forwards and sending
    takes no time.

    A rank's forward and backward of a micro-batch are 3. With one forward and one backward in turn it waits for those
    of each other rank once. DualPipeV, as DeepSpeed 0.19.8 runs it (it makes weight gradients with the others), waits
    5/2 for each rank less 3, as playing its instructions shows (tests/parallel/test_stages.py).
    """
    waits = 3 * (ranks - 1) if schedule == "1f1b" or ranks == 1 else 2.5 * ranks - 3
    return waits / (3 * micro_batches + waits)
