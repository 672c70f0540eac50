"""Gradients of parameters that tensor-parallel ranks hold alike, of which each rank makes one term: norms where the
sequence is cut, routers, biases, keys and values of fewer heads than ranks.

Their sum is taken once in a step, in one flat buffer, before DeepSpeed sums over data-parallel ranks. ZeRO 2 and 3 do
that in the backward of each micro-batch, parameter by parameter, so there each gradient is summed as it comes.
"""

from typing import Any

from llm.parallel.engine import deepspeed_private as private
from llm.parallel.replica import Replica
from llm.parallel.tensor import is_partial, sum_each, sum_together


class PartialGradients:
    """Those of a replica's model, inside `deepspeed`."""

    def __init__(self, replica: Replica, deepspeed: Any, zero_stage: int) -> None:
        layout, self._group, self._deepspeed = replica.grid.layout, replica.grid.tensor, deepspeed
        named = replica.model.named_parameters()
        self._parameters = [p for name, p in named if p.requires_grad and is_partial(replica.table[name], layout)]
        if zero_stage >= 2:
            for parameter in self._parameters:
                sum_each(parameter, self._group)
            self._parameters = []

    def sum(self) -> None:
        """To be called once in a step, after its last backward (collective)."""
        found = (private.gradient(self._deepspeed, parameter) for parameter in self._parameters)
        gradients = [gradient for gradient in found if gradient is not None]
        if gradients:
            sum_together(gradients, self._group)
