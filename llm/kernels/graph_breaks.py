"""Where torch.compile breaks its graphs: code that it leaves as it is.

What depends on the contents of a batch, such as how documents are packed or which experts tokens chose, would be
compiled anew for every batch.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])
_in_graphs: dict[str, Callable[..., Any]] = {}


def graph_break(function: Function) -> Function:
    """A compiled caller calls `function` uncompiled, between two of its graphs.

    The same as torch.compiler.disable, which would import the compiler (1.4 s, measured) even where nothing is
    compiled; `keep_graph_breaks` does that where something is.
    """
    name = f"{function.__module__}.{function.__qualname__}"
    _in_graphs[name] = function

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return _in_graphs[name](*args, **kwargs)
        return function(*args, **kwargs)

    return cast(Function, call)


@cache
def keep_graph_breaks() -> None:
    """Must come before the first compilation."""
    for name, function in _in_graphs.items():
        _in_graphs[name] = torch.compiler.disable(function)
