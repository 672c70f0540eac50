"""A replica of one rank, without a process group: what it scores and continues is what the model does."""

import pytest
import torch

from llm.args import ModelArgs
from llm.batch import IGNORE, Batch, Targets
from llm.datatypes import TransformerInput
from llm.generate import generate
from llm.model import LLM
from llm.parallel.grid import make_grid
from llm.parallel.launch.world import World
from llm.parallel.replica import Replica
from tests.data.helpers import LM, labels_of
from tests.model.models import LLAMA4, MOE, tokens

ARGS = ModelArgs.model_validate(LLAMA4 | {"moe": MOE})


@pytest.fixture(scope="module")
def replica() -> Replica:
    return Replica.build(ARGS, 3, make_grid(World(0, 1, 0, torch.device("cpu"))))


def batch_of(seed: int) -> Batch:
    labels = tokens(2, 24, seed=seed + 50)
    labels[0, :5] = IGNORE
    bounds = torch.tensor([0, 9, 24, 48], dtype=torch.int32)
    return Batch(TransformerInput(tokens(2, 24, seed=seed), cu_seqlens=bounds), {"lm": Targets(labels)})


def test_it_holds_the_model_that_args_and_seed_say(replica: Replica) -> None:
    expected = LLM(ARGS, seed=3).state_dict()
    found = replica.model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_scores_are_sums_over_batches_and_their_counts(replica: Replica) -> None:
    batches = [batch_of(seed) for seed in range(3)]
    (sums,) = replica.sum_losses(
        [LM.main], iter(batches), [lambda batch: [LM.main.count(batch), batch.n_tokens]]
    )
    assert sums.counts == [3 * (48 - 5), 3 * 48]
    each = replica.token_losses(LM.main, batches)
    # float32 sums of a batch against float64 sums of its tokens
    assert sums.total == pytest.approx(sum(float(part.double().sum()) for part in each), rel=1e-6)
    assert all((part[labels_of(batch) < 0] == 0).all() for part, batch in zip(each, batches, strict=True))


def test_it_continues_prompts_as_the_model_does(replica: Replica) -> None:
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    settings = {"max_new_tokens": [6, 3, 9], "temperature": 0.7, "seed": 5}
    assert generate(replica.decoder(), prompts, **settings) == generate(replica.model, prompts, **settings)  # type: ignore[arg-type]


def test_expert_counts_of_another_model_are_refused(replica: Replica) -> None:
    with pytest.raises(ValueError, match=r"must have shape \(\d+, \d+\)"):
        replica.set_expert_counts(torch.zeros(9, 9, dtype=torch.int64))
