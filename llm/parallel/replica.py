"""A model on the ranks that hold it together: no optimizer, no DeepSpeed. It scores, and continues, on every layout.

Each rank has one run of the model's units, a stage, or with the DualPipeV schedule two: one on the way from the first
rank to the last, one on the way back. Where nothing cuts the layers there is one stage of all units. One tensor goes
from stage to stage: the residual stream, or of an encoder-decoder both of them (llm/sides.py). Token ids, labels and
document boundaries are the same on all stages, because each rank reads the same micro-batches.

Without gradients there is no schedule: all micro-batches go through one stage of a rank and then through the other, and
ranks only wait for what they need.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from llm.args import ModelArgs
from llm.batch import Batch
from llm.cache import Cache, Remembered
from llm.datatypes import LossSum, Predictions, RouteCounts, TransformerInput, TransformerOutput
from llm.decoder import Decoder, inputs_of
from llm.heads import Losses
from llm.layers.moe import routing_shape
from llm.layers.routed import moved
from llm.model import LLM
from llm.objectives import Objective, Objectives, TokenObjective
from llm.parallel.build import Storage, build_model
from llm.parallel.collectives import gather_rows, sum_over_ranks
from llm.parallel.grid import Grid
from llm.parallel.stages import Stage, split
from llm.parameters import ParameterTable

EVALUATED_AT_ONCE = 4
"""Micro-batches that go through a pipeline together, for each rank of it."""
MOST_DIMENSIONS = 3
"""Of what goes from stage to stage."""


class Predicted(NamedTuple):
    """What was predicted of labelled documents, in the order of their rows. S documents, n outputs, L labels."""

    outputs_Sn: NDArray[np.float64]
    labels_SL: NDArray[np.float64]
    """NaN where one is missing."""

    @classmethod
    def of(cls, documents: NDArray[np.float64], n_outputs: int) -> "Predicted":
        """Of documents as `_numbered` writes them down, in any order."""
        ordered = documents[np.lexsort((documents[:, 1], documents[:, 0]))] if len(documents) else documents
        return cls(ordered[:, 2 : 2 + n_outputs], ordered[:, 2 + n_outputs :])


class Sums(NamedTuple):
    """Of an objective over batches."""

    total: float
    """Of the loss."""
    measures: dict[str, float]
    """By the names of its measures, those of held-out rows last."""
    counts: list[float]
    predicted: Predicted | None


class Replica:
    """This rank's part of a model: the module that has its stages, and their numbers in the whole."""

    def __init__(
        self, model: LLM, grid: Grid, stages: Sequence[Stage], table: ParameterTable | None = None
    ) -> None:
        """model: what llm/parallel/build.py made of the units of `stages`, by its table."""
        self.model, self.grid, self.world = model, grid, grid.world
        self.stages = tuple(stages)
        self.table = table or ParameterTable.of(model.args)
        """Of the whole model."""
        is_moe = [spec.ffn == "moe" for spec in model.args.all_specs()]
        self.moe_layers = [range(sum(is_moe[: s.blocks.start]), sum(is_moe[: s.blocks.stop])) for s in stages]
        """Of each stage, its numbers among the MoE layers of the whole model."""
        self._expert_counts = torch.zeros(routing_shape(model.args), dtype=torch.int64, device=self.world.device)

    @classmethod
    def build(
        cls,
        args: ModelArgs,
        seed: int | None,
        grid: Grid,
        *,
        storage: Storage | None = None,
        seq_len: int | None = None,
        source_len: int | None = None,
        logits: bool = True,
        table: ParameterTable | None = None,
    ) -> "Replica":
        """This rank's part, with its initial values, or without a seed with none. storage: where they lie; by default
        whole, in float32. seq_len, source_len, logits: of training, by which the stages are balanced: see
        llm.parallel.stages.split. table: where some of its parameters are frozen.
        """
        every = split(args, grid.layout.stages, seq_len, logits, source_len)
        stages = [every[number] for number in grid.layout.stages_of(grid.pipeline.rank)]
        units = [unit for stage in stages for unit in stage.units]
        model = build_model(args, seed, grid, units=units, storage=storage, table=table)
        return cls(model, grid, stages, table)

    def stage_of(self, name: str) -> int:
        """Which of this rank's stages a parameter belongs to: 0 or 1."""
        owns = [stage.owns(self.table[name]) for stage in self.stages]
        return owns.index(True) if any(owns) else len(owns) - 1  # the last stage's copy of a tied table

    def to_device(self, batch: Batch) -> Batch:
        """The batch on the model's device; its images only where the tower is."""
        return (batch if self.stages[0].first else batch.without_images()).to(self.world.device)

    def through_stage(
        self,
        phase: int,
        x: Tensor | None,
        inputs: TransformerInput,
        losses: Losses | None = None,
        cache: Remembered | None = None,
        keys_N: Tensor | None = None,
    ) -> TransformerOutput:
        """What stage `phase` of this rank (0 or 1) makes of what the stage before it made: losses, else hidden states.
        """
        units = self.stages[phase].units
        return self.model(
            inputs,
            losses=losses,
            cache=cache,
            return_hidden=losses is None,
            x=x,
            units=units,
            expert_counts=self._expert_counts,
            keys_N=keys_N,
        )

    def expert_counts(self) -> Tensor:
        """(M, E) int64: assignments of the previous whole step in all layers of the whole model; 0 before the first."""
        return self._expert_counts

    def set_expert_counts(self, counts: Tensor) -> None:
        """Set them. Raises ValueError on a wrong shape."""
        expected = self._expert_counts.shape
        if counts.shape != expected:
            raise ValueError(
                f"expert counts must have shape {tuple(expected)} (MoE layers, experts); got {tuple(counts.shape)}"
            )
        self._expert_counts = counts.to(self.world.device)

    def thresholds(self) -> dict[int, float]:
        """Of the routed layers of the whole model, by their numbers, as far as a step has set them."""
        return dict(self.model.thresholds)

    def set_thresholds(self, thresholds: Mapping[int, float]) -> None:
        """Set them."""
        self.model.thresholds = dict(thresholds)

    def move_thresholds(self, routes: Mapping[int, RouteCounts]) -> None:
        """Move them by what a whole step's tokens scored."""
        route = self.model.args.route
        for layer, counts in routes.items():
            assert route is not None
            found = moved(self.model.thresholds.get(layer), counts, route)
            if found is not None:
                self.model.thresholds[layer] = found

    @torch.no_grad()
    def sum_losses(
        self,
        objectives: Sequence[Objective],
        batches: Iterator[Batch],
        counted: Sequence[Callable[[Batch], Sequence[float]]],
    ) -> list[Sums]:
        """Of each objective, with what its own function of `counted` counts in each batch, over all ranks (collective).
        Where one predicts documents, the batches must know their rows.
        """
        names = [(*objective.measures, *objective.held_out_measures) for objective in objectives]
        totals = [torch.zeros(1 + len(own), dtype=torch.float64, device=self.world.device) for own in names]
        counts: list[list[float]] = [[] for _ in objectives]
        documents: list[list[NDArray[np.float64]]] = [[] for _ in objectives]
        for batch, losses in self._losses(objectives, batches):
            for k, objective in enumerate(objectives):
                if losses is not None:
                    loss = losses[objective.name]
                    measures = loss.measures or {}
                    totals[k] += torch.stack([loss.total, *(measures[name] for name in names[k])]).double()
                    if self.grid.reports_loss and loss.predictions is not None:
                        documents[k].append(_numbered(loss.predictions, batch))
                numbers = counted[k](batch)
                counts[k] = [sum(pair) for pair in zip(counts[k], numbers, strict=True)] if counts[k] else [*numbers]
        mine = [[*total.tolist(), *count] for total, count in zip(totals, counts, strict=True)]
        flat = [number * self.grid.reports_loss for of_each in mine for number in of_each]
        every = iter(sum_over_ranks(flat, self.world))
        found = []
        for k, objective in enumerate(objectives):
            total, *rest = (next(every) for _ in mine[k])
            n = len(names[k])
            predicted = None
            if objective.predicts:
                predicted = Predicted.of(gather_rows(documents[k], self.world), objective.n_outputs(self.model.args))
            found.append(Sums(total, dict(zip(names[k], rest[:n], strict=True)), rest[n:], predicted))
        return found

    @torch.no_grad()
    def token_losses(self, objective: TokenObjective, batches: Sequence[Batch]) -> list[Tensor]:
        """An objective's part of each token of each batch, (B, T) float32, where this rank has the last stage,
        elsewhere nothing (collective).
        """
        found = [losses[objective.name] for _, losses in self._losses([objective], iter(batches)) if losses is not None]
        return [loss.per_token for loss in found if loss.per_token is not None]

    def _losses(
        self, objectives: Sequence[Objective], batches: Iterator[Batch]
    ) -> Iterator[tuple[Batch, Mapping[str, LossSum] | None]]:
        """Each batch and its losses by the objectives' names, where this rank has the last stage (collective)."""
        together = Objectives(objectives)
        ranks = self.grid.pipeline.size
        while chunk := list(islice(batches, EVALUATED_AT_ONCE * ranks if ranks > 1 else 1)):
            here = [self.to_device(batch) for batch in chunk]
            outputs = self._through_stages(
                [batch.inputs for batch in here], [together.losses_of(self.model, batch) for batch in here]
            )
            found: list[Mapping[str, LossSum] | None] = [out.losses for out in outputs if out.losses]
            yield from zip(chunk, found or [None] * len(chunk), strict=True)

    @torch.no_grad()
    def logits(
        self, inputs: TransformerInput, caches: Sequence[Remembered], at: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Float32 logits (B, V) of each row's last token, or the scaled values (B, O) of a model that predicts them, on
        all ranks of the replica (collective). The tokens continue the rows of the caches, one for each stage of this
        rank. at: rows and columns (B,) of other tokens instead.
        """
        found = self._through_stages([inputs], caches=caches)
        logits_BV = None
        if found:
            hidden_BTD = _hidden(found[0])
            logits_BV = self.model.logits(hidden_BTD[:, -1:] if at is None else hidden_BTD[at][:, None])[:, 0]
        args = self.model.args
        shape = len(inputs.tokens if at is None else at[0]), args.output_dim or args.vocab_size
        return self.from_last_stage(logits_BV, shape, torch.float32)

    @torch.no_grad()
    def hidden(self, inputs: Sequence[TransformerInput]) -> list[Tensor]:
        """Final hidden states (B, T, D) of each input, where this rank has the last stage, elsewhere nothing
        (collective). Of a pipeline, the stages work at the same time on different inputs.
        """
        return [_hidden(out) for out in self._through_stages(inputs)]

    def from_last_stage(self, made: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What the rank with the last stage has made, on all ranks of the replica (collective)."""
        if self.grid.pipeline.size == 1:
            assert made is not None
            return made
        if made is None:
            made = torch.empty(tuple(shape), dtype=dtype, device=self.world.device)
        last = self.grid.layout.holder(self.grid.layout.stages - 1)
        dist.broadcast(made, self.grid.pipeline.ranks[last], group=self.grid.pipeline.handle)
        return made

    def decoder(self) -> Decoder:
        """What continues prompts with the present weights; used by all ranks together, where one has not all of them.
        """
        return _Rows(self)

    @torch.no_grad()
    def _through_stages(
        self,
        inputs: Sequence[TransformerInput],
        losses: Sequence[Losses] | None = None,
        caches: Sequence[Remembered] | None = None,
    ) -> list[TransformerOutput]:
        """What the last stage makes of each input, where it is; elsewhere nothing (collective)."""
        if self.model.training:  # it walks through all modules
            self.model.eval()
        layout, ranks, here = self.grid.layout, self.grid.pipeline.ranks, self.grid.pipeline.rank
        results: list[TransformerOutput] = []
        turning: deque[Tensor] = deque()  # from this rank's one stage to its other
        for phase, stage in enumerate(self.stages):
            source, target = (layout.holder(stage.number + step) for step in (-1, 1))
            for i, taken in enumerate(inputs):
                x = None
                if not stage.first:
                    x = turning.popleft() if source == here else self._receive(ranks[source])
                wanted = losses[i] if losses is not None and stage.last else None
                out = self.through_stage(phase, x, taken, wanted, None if caches is None else caches[phase])
                if stage.last:
                    results.append(out)
                elif target == here:
                    turning.append(_hidden(out))
                else:
                    self._send(_hidden(out), ranks[target])
        return results

    def _send(self, x: Tensor, rank: int) -> None:
        shape = torch.tensor([*x.shape, *[-1] * (MOST_DIMENSIONS - x.dim())], device=x.device)
        dist.send(shape, rank)
        dist.send(x.contiguous(), rank)

    def _receive(self, rank: int) -> Tensor:
        shape = torch.empty(MOST_DIMENSIONS, dtype=torch.int64, device=self.world.device)
        dist.recv(shape, rank)
        dtype = next(self.model.parameters()).dtype
        x = torch.empty([size for size in shape.tolist() if size >= 0], dtype=dtype, device=self.world.device)
        dist.recv(x, rank)
        return x


def _hidden(out: TransformerOutput) -> Tensor:
    assert out.hidden is not None
    return out.hidden


class _Rows:
    """Rows that a replica continues; each rank keeps what its own stages have made of them so far."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._caches = [Cache(replica.model.args) for _ in replica.stages]

    def logits(
        self,
        tokens: NDArray[np.int64],
        positions: NDArray[np.int64],
        images: Tensor | None = None,
        source: TransformerInput | None = None,
    ) -> Tensor:
        inputs = inputs_of(tokens, positions, images, source, self._replica.world.device)
        return self._replica.logits(inputs, self._caches)

    def keep(self, rows: list[int]) -> None:
        for cache in self._caches:
            cache.reorder(rows)


def _numbered(predictions: Predictions, batch: Batch) -> NDArray[np.float64]:
    """For each document the number of its row, its place there, the outputs and the labels: (S, 2 + n + L)."""
    assert batch.rows is not None
    tokens_of_row = batch.n_tokens // len(batch.rows.global_row)
    row_S, place_S = np.divmod(predictions.places_S.cpu().numpy(), tokens_of_row)
    numbers = (x.cpu().double().numpy() for x in (predictions.outputs_Sn, predictions.labels_SL))
    return np.column_stack([batch.rows.global_row[row_S], place_S, *numbers])
