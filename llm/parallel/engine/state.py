"""What an engine keeps from step to step on a rank: masters, optimizer state and averages, as fragments of a
checkpoint.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm import init
from llm.boxes import Box
from llm.parallel.engine import deepspeed_private as private
from llm.parallel.engine.averages import Averages
from llm.parallel.engine.build import frozen_parameters
from llm.parallel.muon import Muon
from llm.parallel.replica import Replica


class OwnedFragment(NamedTuple):
    """Elements [start, start + len(values)) of a flattened box of a parameter, and where they live on this rank."""

    name: str
    kind: str
    box: Box
    start: int
    values: Tensor


class TrainState:
    """The state of one rank: the flat partitions that its optimizer steps on, and what lies where in them."""

    def __init__(
        self,
        deepspeed: Any,
        replica: Replica,
        *,
        zero_stage: int,
        seed: int | None,
        ema_decay: float | None,
        without_update: set[str],
        of_muon: set[str],
    ) -> None:
        """seed: where masters are to be drawn anew from it, in float32; DeepSpeed starts from rounded parameters.
        without_update, of_muon: names of the parameters whose learning rate is 0, and of those that Muon steps on.
        """
        self._deepspeed, self._grid, self._zero_stage = deepspeed, replica.grid, zero_stage
        self._frozen = frozen_parameters(replica.model)
        self._without_update, self._of_muon = without_update, of_muon
        self.table = replica.table
        self.shapes = {name: row.shape for name, row in self.table.items() if row.trainable}
        """Whole shapes of what trains, all that a checkpoint holds."""
        self.boxes = {name: replica.grid.box(row) for name, row in self.table.items()}
        """What this rank has of each before ZeRO cuts it."""
        self.owned_ranges = private.owned_ranges(deepspeed, replica.model)
        self.partitions = private.partitions(deepspeed)
        if seed is not None:
            self._draw_masters(seed)
        self.averages = Averages(self.partitions, ema_decay)

    @property
    def n_parameters(self) -> int:
        """Elements of all parameters of the whole model."""
        return sum(row.numel for row in self.table.values())

    @torch.no_grad()
    def _draw_masters(self, seed: int) -> None:
        for owned in self.owned_ranges:
            row, stop = self.table[owned.name], owned.start + owned.length
            place = row.shape, self.boxes[owned.name], owned.start, stop
            owned.of(owned.flat).copy_(init.values_in_box(row.init, owned.name, seed, *place))

    def fragments(self) -> Iterator[OwnedFragment]:
        """What a checkpoint must fill on this rank."""
        for owned in self.owned_ranges:
            place = (self.boxes[owned.name], owned.start)
            yield OwnedFragment(owned.name, "master", *place, owned.of(owned.flat.data))
            for key, values in private.states(self._deepspeed, owned.flat):
                yield OwnedFragment(owned.name, key, *place, owned.of(values))
            average = self.averages.of(owned.flat)
            if average is not None:
                yield OwnedFragment(owned.name, "ema", *place, owned.of(average))

    def frozen_fragments(self) -> Iterator[OwnedFragment]:
        """What this rank has of the parameters that do not train, as the forward reads it; not what a checkpoint holds.
        """
        for name, parameter in self._frozen.items():
            start, values = private.share(parameter) if self._zero_stage == 3 else (0, parameter.data.view(-1))
            yield OwnedFragment(name, "frozen", self.boxes[name], start, values)

    def owned_fragments(self) -> Iterator[OwnedFragment]:
        """Masters, optimizer states and averages for a checkpoint; over all ranks each element exactly once."""
        for fragment in self.fragments():
            cut = self.table[fragment.name].cut(self._grid.layout.tensor) is not None
            # at stage 0 every rank has it all; what is not cut, every tensor-parallel rank
            if self._grid.world.is_main or (self._zero_stage and (cut or self._grid.leads)):
                yield fragment

    def scalars(self) -> dict[str, float]:
        """State that is one number: AdamW's step count, fp16's loss scaler."""
        scaler = private.loss_scaler_state(self._deepspeed)
        return private.optimizer_scalars(self._deepspeed) | {f"loss_scaler.{k}": v for k, v in scaler.items()}

    def prepare_load(self, kinds: dict[str, set[str]], scalars: dict[str, float]) -> None:
        """Create optimizer state, so that `fragments` lists everything that a checkpoint must fill.

        kinds: for each parameter the kinds of fragments that the checkpoint has. On a new optimizer state all are zero;
        so is what the checkpoint lacks because it had no update then. What has none now has no state.
        """
        base = private.base_optimizer(self._deepspeed)
        foreign = "exp_avg" if isinstance(base, Muon) else "momentum_buffer"
        anew = any(foreign in kept and (name in self._of_muon or not self._of_muon) for name, kept in kinds.items())
        if anew:
            kinds = {name: {"master"} for name in kinds}  # of another optimizer
        state_of = base.state
        for number, flat in enumerate(self.partitions):
            # a partition of padding alone keeps step with the others
            names = [owned.name for owned in self.owned_ranges if owned.partition == number] or list(kinds)
            keys = set().union(*(kinds[name] for name in names if name not in self._without_update)) - {"master", "ema"}
            if not keys and "step" in scalars and not anew and not self._without_update.issuperset(names):  # until now
                keys = {"momentum_buffer"} if self._of_muon.issuperset(names) else {"exp_avg", "exp_avg_sq"}
            held = state_of.get(flat, {})  # new memory would be there twice, and costs more than what is read into it
            state: dict[str, Tensor] = {
                key: held[key].zero_() if key in held else torch.zeros_like(flat, requires_grad=False)
                for key in sorted(keys)
            }
            if "exp_avg" in keys:
                state["step"] = torch.tensor(scalars["step"], device=flat.device)
            state_of[flat] = state
        scaler = {k.removeprefix("loss_scaler."): v for k, v in scalars.items() if k.startswith("loss_scaler.")}
        private.set_loss_scaler_state(self._deepspeed, scaler)
