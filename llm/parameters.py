"""Every parameter of a model, each with the row that its module declares: from ModelArgs alone, without a model.

Names, shapes and what is to be done with a parameter (how it is cut, whether it decays, what it begins with, in which
unit it lies, whether it trains) are read here and nowhere else.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from llm.args import ModelArgs
from llm.args.lora import adapter, vision_adapters
from llm.boxes import Box
from llm.layers.block import Block
from llm.layers.embedding import Embedding
from llm.layers.encoder import Encoder
from llm.layers.features import FeatureEmbedding, ValueOutput
from llm.layers.inputs import input_rows
from llm.layers.norm import norm_rows
from llm.layers.output import Output
from llm.layers.parameter import VISION, ParamInfo, Rows, in_unit, of_unit, under, weights
from llm.layers.prediction import PREDICTION, PredictionHead
from vision.adapter import Projection
from vision.encoder import Encoder as VisionEncoder


class ParameterTable(Mapping[str, ParamInfo]):
    """Rows by canonical name, in the order of the model's own parameters."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    @classmethod
    def of(cls, args: ModelArgs) -> "ParameterTable":
        """The table of a model with these args, which must have a vocabulary, or values on both sides."""
        rows = vision_rows(args) | in_unit("tok_embeddings", _embedding_rows(args))
        rows |= of_unit("tok_embeddings", input_rows(args))
        rows |= Encoder.declare_embedding(args, "tok_embeddings") | Encoder.declare(args)
        for spec in args.layer_specs():
            rows |= in_unit(spec.unit, Block.declare(args, spec))
        rows |= in_unit("norm", norm_rows(args, args.dim, last=True)) if args.has_final_norm else {}
        rows |= {} if args.tie_embeddings else in_unit("output", _output_rows(args))
        if args.n_prediction:
            rows |= of_unit("output", under(PREDICTION, PredictionHead.declare(args)))
        return cls(rows)

    def __getitem__(self, name: str) -> ParamInfo:
        """Raises KeyError naming the parameter where no module declares it."""
        if name not in self._rows:
            raise KeyError(f"no module of this model declares a parameter {name!r}")
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shape of every parameter."""
        return {name: row.shape for name, row in self.items()}

    @property
    def cut(self) -> dict[str, int | None]:
        """The dimension of every parameter that tensor parallelism cuts, if it is cut."""
        return {name: row.tensor_dim for name, row in self.items()}

    def boxes(self, tensor: tuple[int, int], expert: tuple[int, int]) -> dict[str, Box]:
        """The box of every parameter on a rank; `tensor` and `expert` are (rank, ranks) in its groups."""
        return {name: row.box(tensor, expert) for name, row in self.items()}

    def adapters_alone(self, int8: bool = False) -> "ParameterTable":
        """The table with `trainable` off for all but adapters and what trains beside them, and `int8` on for the others
        where that can be.
        """
        return ParameterTable(
            {
                name: row
                if row.kind == "adapter" or row.beside_adapters
                else replace(row, trainable=False, int8=int8 and row.may_be_int8)
                for name, row in self.items()
            }
        )

    def frozen(self, patterns: Sequence[str]) -> "ParameterTable":
        """The table with `trainable` off where a name matches one of these globs."""
        return ParameterTable(
            {
                name: replace(row, trainable=row.trainable and not any(fnmatchcase(name, p) for p in patterns))
                for name, row in self.items()
            }
        )


def _embedding_rows(args: ModelArgs) -> Rows:
    if args.input_dim is not None:
        return FeatureEmbedding.declare(args)
    return Embedding.declare(args.vocab_size, args.dim, weights(args), args.tie_embeddings, args.lora)


def _output_rows(args: ModelArgs) -> Rows:
    if args.output_dim is not None:
        return ValueOutput.declare(args)
    return Output.declare_head(args.dim, args.vocab_size, weights(args), args.lora)


def vision_rows(args: ModelArgs) -> Rows:
    """Of the tower and its projection; none without."""
    if args.vision is None:
        return {}
    tower = VisionEncoder.declare(args.vision, vision_adapters(args.lora))
    projection = Projection.declare_onto(args.vision.output_dim, args.dim, adapter(args.lora, "vision_projection"))
    return of_unit(VISION, under("vision_embeddings", tower) | under("vision_projection", projection))
