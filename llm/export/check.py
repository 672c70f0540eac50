"""Whether a written graph computes what the model does.

Shapes: B batch, T tokens, L layers, K kv heads, d head width.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from llm.cache import Cache
from llm.datatypes import TransformerInput
from llm.errors import UserError
from llm.export.graphs import Encoder, Graph, Step, most_tokens, sized
from llm.model import LLM

Runner = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Outputs by name of inputs by name."""
BATCHES, LENGTHS = (1, 3), (2, 7, 33)
TOLERANCE = 1e-4
"""Of float32: beyond numbers of about 1, as large a share of them. Other programs sum in another order."""
STEPS = 3


@torch.no_grad()
def largest_difference(model: LLM, graph: Graph, run: Runner) -> float:
    """Between what the graph and the model make of random tokens, at LENGTHS and BATCHES. UserError where it is more
    than rounding."""
    longest = most_tokens(model.args)
    drawn = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch in BATCHES:
        for length in dict.fromkeys(min(length, longest or length) for length in LENGTHS):
            tokens = torch.randint(model.args.vocab_size, (batch, length), generator=drawn)
            for name, made, expected in _compared(model, graph, run, tokens):
                if made.shape != expected.shape:
                    raise UserError(
                        f"the graph's {name} has shape {tuple(made.shape)}, the model's {tuple(expected.shape)}, of "
                        f"{batch} rows of {length} tokens"
                    )
                difference = float((made - expected).abs().max())
                if not torch.allclose(made, expected, rtol=TOLERANCE, atol=TOLERANCE):
                    raise UserError(
                        f"the graph's {name} differs from the model's by {difference:.2g} (at most {TOLERANCE:g}) in "
                        f"{batch} rows of {length} tokens"
                    )
                worst = max(worst, difference)
    return worst


Compared = Iterator[tuple[str, Tensor, Tensor]]


def _compared(model: LLM, graph: Graph, run: Runner, tokens: Tensor) -> Compared:
    """(name, the graph's, the model's) of everything that is to be the same."""
    if isinstance(graph, Step):
        yield from _steps(model, graph, run, tokens)
    elif isinstance(graph, Encoder):
        positions = ragged(tokens)
        made = run({"tokens": tokens, "positions": positions})["hidden"]
        inputs = TransformerInput(tokens, tokens_position=positions, causal=False)
        expected = model(inputs, return_hidden=True).hidden
        yield "hidden", made[positions >= 0], expected[positions >= 0]
    else:
        yield "logits", run({"tokens": tokens})["logits"], model(tokens).logits


def ragged(tokens: Tensor) -> Tensor:
    """Positions of rows of which every second one has padding before it, as prompts of different lengths have."""
    batch, length = tokens.shape
    padding = torch.arange(batch)[:, None] % 2 * (length // 2)
    return (torch.arange(length) - padding).clamp(min=-1)


def _steps(model: LLM, graph: Step, run: Runner, tokens: Tensor) -> Compared:
    """All tokens but the last few together, then those one by one, after what came before."""
    positions = ragged(tokens)
    sizes = {"batch": tokens.shape[0], "past": 0}
    past = {
        name: torch.zeros(sized(port.shape, sizes), dtype=port.dtype)
        for name, port in graph.inputs.items()
        if name.startswith("past")
    }
    cache = Cache(model.args)
    first = max(tokens.shape[1] - STEPS, 1)
    for low, high in [(0, first), *((i, i + 1) for i in range(first, tokens.shape[1]))]:
        now, where = tokens[:, low:high], positions[:, low:high]
        made = run({"tokens": now, "positions": where, **past})
        expected = model(TransformerInput(now, tokens_position=where), cache=cache).logits
        yield "logits", made["logits"][where >= 0], expected[where >= 0]
        past = {f"past_{name.removeprefix('all_')}": made[name] for name in ("all_positions", "keys", "values")}
