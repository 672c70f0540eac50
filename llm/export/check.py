"""Whether a written graph computes what the model does.

Shapes: B batch, T tokens, S source tokens.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from llm.args import ModelArgs
from llm.datatypes import TransformerInput
from llm.errors import UserError
from llm.export.graphs import Encoder, Graph, Step, most_tokens, sized
from llm.export.sides import SidedStep, SourceEncoder
from llm.model import LLM

Runner = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Outputs by name of inputs by name."""
Compared = Iterator[tuple[str, Tensor, Tensor]]
"""(name, the graph's, the model's) of everything that is to be the same."""
BATCHES, LENGTHS = (1, 3), (2, 7, 33)
SOURCE_LONGER = 4
"""By how much sources are longer than targets."""
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
            for name, made, expected in _compared(model, graph, run, batch, length, drawn):
                worst = max(worst, _difference(name, made, expected, f"{batch} rows of {length}"))
    return worst


def _difference(name: str, made: Tensor, expected: Tensor, where: str) -> float:
    if made.shape != expected.shape:
        raise UserError(
            f"the graph's {name} has shape {tuple(made.shape)}, the model's {tuple(expected.shape)}, in {where}"
        )
    difference = float((made - expected).abs().max())
    if not torch.allclose(made, expected, rtol=TOLERANCE, atol=TOLERANCE):
        raise UserError(
            f"the graph's {name} differs from the model's by {difference:.2g} in {where}; at most {TOLERANCE:g}"
        )
    return difference


def _compared(
    model: LLM, graph: Graph, run: Runner, batch: int, length: int, drawn: torch.Generator
) -> Compared:
    rows = _rows(model.args, batch, length, drawn)
    source = TransformerInput.of(rows)
    if model.args.encoder_layers:
        source_length = min(length + SOURCE_LONGER, most_tokens(model.args) or length + SOURCE_LONGER)
        source = TransformerInput.of(_rows(model.args, batch, source_length, drawn))
        source.tokens_position = ragged(source.tokens)
    positions = ragged(rows)
    if isinstance(graph, SourceEncoder):
        made = run(_of_source(source))["memory"]
        there = source.tokens_position >= 0  # type: ignore[operator]  # set above
        yield "memory", made[there], model.encode(source)[there]
    elif isinstance(graph, Step):
        yield from _steps(model, graph, run, rows, positions, source)
    elif isinstance(graph, Encoder):
        made = run(dict(zip(graph.inputs, (rows, positions), strict=True)))["hidden"]
        inputs = _inputs(rows, positions, None)
        inputs.causal = False
        expected = model(inputs, return_hidden=True).hidden
        yield "hidden", made[positions >= 0], expected[positions >= 0]
    else:
        given, inputs = {}, TransformerInput.of(rows)
        if model.args.encoder_layers:
            given, inputs.source = _of_source(source), source
        [name] = graph.outputs
        made = run(given | {next(iter(graph.rows())): rows})[name]
        yield name, made, _predicted(model, inputs)


def _rows(args: ModelArgs, batch: int, length: int, drawn: torch.Generator) -> Tensor:
    if args.input_dim is not None:
        return torch.randn(batch, length, args.input_dim, generator=drawn)
    return torch.randint(args.vocab_size, (batch, length), generator=drawn)


def _inputs(rows: Tensor, positions: Tensor, source: TransformerInput | None) -> TransformerInput:
    inputs = TransformerInput.of(rows)
    inputs.tokens_position, inputs.source = positions, source
    return inputs


def _of_source(source: TransformerInput) -> dict[str, Tensor]:
    assert isinstance(source.tokens_position, Tensor)
    rows = source.tokens if source.features is None else source.features
    return {"source": rows, "source_positions": source.tokens_position}


def _predicted(model: LLM, inputs: TransformerInput) -> Tensor:
    out = model(inputs)
    found = out.logits if model.args.output_dim is None else out.outputs
    assert found is not None
    return found


def ragged(rows: Tensor) -> Tensor:
    """Positions of rows of which every second one has padding before it, as prompts of different lengths have."""
    batch, length = rows.shape[:2]
    padding = torch.arange(batch)[:, None] % 2 * (length // 2)
    return (torch.arange(length) - padding).clamp(min=-1)


def _steps(
    model: LLM, graph: Step, run: Runner, rows: Tensor, positions: Tensor, source: TransformerInput
) -> Compared:
    """All tokens but the last few together, then those one by one, after what came before: as in one forward."""
    sizes = {"batch": rows.shape[0], "past": 0}
    given = {
        name: torch.zeros(sized(port.shape, sizes), dtype=port.dtype)
        for name, port in graph.inputs.items()
        if name.startswith("past")
    }
    inputs = _inputs(rows, positions, None)
    if isinstance(graph, SidedStep):
        inputs.source = source
        graph_of_source = SourceEncoder(model)
        _, keys, values = graph_of_source(*_of_source(source).values())
        positions_of_source = _of_source(source)["source_positions"]
        given |= {"source_positions": positions_of_source, "cross_keys": keys, "cross_values": values}
    expected = _predicted(model, inputs)
    [entry], name = graph.rows(), next(iter(graph.outputs))
    first = max(rows.shape[1] - STEPS, 1)
    for low, high in [(0, first), *((i, i + 1) for i in range(first, rows.shape[1]))]:
        where = positions[:, low:high]
        made = run(given | {entry: rows[:, low:high], "positions": where})
        yield name, made[name][where >= 0], expected[:, low:high][where >= 0]
        given |= {f"past_{of.removeprefix('all_')}": made[of] for of in ("all_positions", "all_keys", "all_values")}
