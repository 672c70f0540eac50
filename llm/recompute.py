"""Activation checkpointing: forget what a block's forward made, make it again when the backward needs it (Chen et al.
2016, arXiv:1604.06174).

"full" keeps a block's input alone and repeats its whole forward. "selective" (Korthikanti et al. 2022,
arXiv:2205.05198) also keeps the results of matrix products and of attention, which are nearly all of the work, and
repeats what costs memory but little time: norms, rotations, activations, casts. What is repeated are the same
operations, so losses and gradients keep their bits. In compiled blocks the products inside a graph are out of sight:
there "selective" keeps the results of attention and experts, and repeats the rest.
"""

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint, noop_context_fn

Recompute = Literal["none", "selective", "full"]
Result = TypeVar("Result")

PRODUCTS = frozenset(("aten::mm", "aten::addmm", "aten::_grouped_mm", "llm::grouped_matmul"))
"""Products with weights. Not bmm: in attention that is not fused its results are (T, T)."""
ATTENTION = frozenset(
    ["torch_attn::_varlen_attn"]
    + [
        f"aten::_scaled_dot_product_{kind}"
        for kind in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
    ]
)


def recomputed(mode: Recompute, block: Callable[..., Result], *args: Any) -> Result:
    """block(*args), forgetting what `mode` says. The block must use no random numbers: they would be drawn anew."""
    if mode == "none" or not torch.is_grad_enabled():
        return block(*args)
    return checkpoint(
        block,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=_keep_products if mode == "selective" else noop_context_fn,
    )


def _keep_products() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What the forward and its repetition run under: the first keeps results, the second takes them.

    As torch's own create_selective_checkpoint_contexts, but blind to all operations that are not kept, where that one
    counts them: the hooks of ZeRO-3 gather weights at other places of the repetition.
    """
    kept: deque[_Kept] = deque()
    return _Keep(kept), _Take(kept)


class _Kept:
    """The result of an operation, which must not change afterwards."""

    def __init__(self, operation: str, result: Any) -> None:
        self.operation = operation
        self.result = _detached(result)
        self.versions = _versions(result)

    def take(self, operation: str) -> Any:
        if operation != self.operation or _versions(self.result) != self.versions:
            raise RuntimeError(
                f"selective checkpointing: the result of {self.operation} was changed in place, or its place in the "
                f"repetition taken by {operation}"
            )
        return _detached(self.result)


def _detached(result: Any) -> Any:
    """Views without autograd history that share the version counters, as torch.utils.checkpoint makes them: a plain
    detach, this far below autograd, would count on its own and so hide later changes in place."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tree_map_only(Tensor, Tensor.detach, result)


def _versions(result: Any) -> list[int]:
    return [x._version for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, Tensor)]


class _Watch(TorchDispatchMode):
    def __init__(self, kept: deque[_Kept]) -> None:
        super().__init__()
        self.kept = kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Without this, compiled blocks would quietly run uncompiled."""
        return True


class _Keep(_Watch):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name() in PRODUCTS or func.name() in ATTENTION:
            self.kept.append(_Kept(func.name(), result))
        return result

    def __exit__(self, *error: Any) -> None:
        # a block's last product goes into a sum, and no gradient needs it; where one does, it is computed again
        if self.kept and self.kept[-1].operation in PRODUCTS:
            self.kept.pop()
        super().__exit__(*error)


class _Take(_Watch):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.kept and (func.name() in PRODUCTS or func.name() in ATTENTION):
            return self.kept.popleft().take(func.name())
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        self.kept.clear()  # the repetition stops when it has what was asked for; a second backward computes all anew
        super().__exit__(*error)
