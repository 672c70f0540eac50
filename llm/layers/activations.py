"""What `model.act` names: functions of the hidden units of a dense feed-forward, element by element."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from llm.args.layers import ACTIVATIONS


def register(name: str, activation: Callable[[Tensor], Tensor]) -> None:
    """Let configs name an activation: a function of each element alone, as ranks and recomputation have parts of them.

    Raises ValueError where the name is taken, TypeError for what is no function.
    """
    if not callable(activation):
        raise TypeError(f"activation {name!r}: {activation!r} is no function")
    ACTIVATIONS.register(name, activation)


def relu2(x: Tensor) -> Tensor:
    """max(x, 0) squared (So et al. 2021, arXiv:2109.08668)."""
    return F.relu(x).square()


register("silu", F.silu)
register("gelu", F.gelu)
register("gelu_tanh", partial(F.gelu, approximate="tanh"))
register("relu", F.relu)
register("relu2", relu2)
