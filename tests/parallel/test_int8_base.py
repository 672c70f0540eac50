"""A replica whose frozen matrices are int8 computes what a model with the rounded weights does."""

import pytest
import torch

from llm.adapters.int8 import Rounded, int8_weights
from llm.args import ModelArgs
from llm.batch import IGNORE, Batch, Targets
from llm.boxes import whole
from llm.datatypes import TransformerInput
from llm.model import LLM
from llm.parallel.build import drawn, fill_int8
from llm.parallel.engine.build import build_replica
from llm.parallel.grid import make_grid
from llm.parallel.launch.world import World
from llm.parallel.replica import Replica
from llm.parameters import ParameterTable
from llm.pretrained import tokenizer_of, weights_of
from tests.data.helpers import LM
from tests.model.models import LLAMA4, MOE, tokens
from tests.shared import SHARED, needs_shared

ARGS = ModelArgs.model_validate(LLAMA4 | {"moe": MOE, "lora": {"rank": 2, "base": "int8"}})
GRID = make_grid(World(0, 1, 0, torch.device("cpu")))
STORIES = SHARED / "data/weights/stories260K-hf"
N_STORIES = 40
MOST_CHANGED = 1e-3
"""Of a trained model's loss, relatively: 3e-4 was measured."""


def replica_of(args: ModelArgs, precision: str = "fp32") -> Replica:
    table = ParameterTable.of(args).adapters_alone(int8=True)
    return build_replica(args, 3, GRID, zero_stage=1, precision=precision, table=table)


def loss_of(replica: Replica, ids: torch.Tensor) -> float:
    batch = Batch(TransformerInput(ids[:, :-1].clamp(min=0)), {"lm": Targets(ids[:, 1:])})
    (sums,) = replica.sum_losses([LM.main], iter([batch]), [lambda batch: [LM.main.count(batch)]])
    return sums.total / sums.counts[0]


def test_matrices_and_experts_are_int8_and_tables_norms_and_routers_are_not() -> None:
    replica = replica_of(ARGS)
    held = dict(int8_weights(replica.model))
    kinds = {name: row.kind for name, row in replica.table.items() if row.kind != "adapter"}
    assert held.keys() == {name for name, kind in kinds.items() if kind in ("matrix", "expert")}
    assert not held.keys() & dict(replica.model.named_parameters()).keys()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_computes_with_the_initial_values_rounded(precision: str) -> None:
    replica = replica_of(ARGS, precision)
    plain = ARGS.merged  # adapters begin at nothing
    table = ParameterTable.of(plain)
    shapes = {name: row.shape for name, row in table.items() if row.may_be_int8}
    rounded, model = Rounded(drawn(table, 3), shapes), LLM(plain)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rounded.read(name, whole(tuple(parameter.shape)), parameter)
    inputs = TransformerInput(tokens(2, 24))
    expected = model(inputs).logits
    if precision == "fp32":  # before an engine draws them, other parameters of a bf16 run have no values
        torch.testing.assert_close(replica.model(inputs).logits, expected)  # experts' products one at a time
    for name, weight in int8_weights(replica.model):
        assert torch.equal(weight.dequantised(), dict(model.named_parameters())[name])


@needs_shared
def test_the_loss_of_a_trained_model_hardly_changes() -> None:
    args, weights = weights_of(STORIES)
    assert args.lora is None
    int8 = args.model_copy(update={"lora": ARGS.lora})
    replica = replica_of(int8)
    plain = Replica.build(args, None, GRID)
    with torch.no_grad():
        for built in (plain, replica):
            for name, parameter in built.model.named_parameters():
                if built.table[name].kind != "adapter":
                    weights.read(name, whole(tuple(parameter.shape)), parameter)
    fill_int8(replica.model, replica.table, GRID, weights.read)
    stories = (SHARED / "data/text/tinystories_sample.txt").read_text().split("<|endoftext|>")[:N_STORIES]
    tokenizer, rows = tokenizer_of(STORIES, None), torch.full((N_STORIES, 257), IGNORE)
    for row, story in zip(rows, stories, strict=True):
        ids = torch.tensor(tokenizer.prompt_ids(story.strip())[: len(row)])
        row[: len(ids)] = ids
    assert loss_of(replica, rows) == pytest.approx(loss_of(plain, rows), rel=MOST_CHANGED)
