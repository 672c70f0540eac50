"""A replica of one rank, without a process group: what it scores and continues is what the model does."""

import numpy as np
import pytest
import torch

from llm.args import ModelArgs
from llm.data.batch import MicroBatch
from llm.generate import generate
from llm.model import LLM
from llm.parallel.grid import make_grid
from llm.parallel.launch.world import World
from llm.parallel.replica import Replica
from tests.model.models import LLAMA4, MOE, tokens

ARGS = ModelArgs.model_validate(LLAMA4 | {"moe": MOE})
VOCAB = ARGS.vocab_size


@pytest.fixture(scope="module")
def replica() -> Replica:
    return Replica.build(ARGS, 3, make_grid(World(0, 1, 0, torch.device("cpu"))))


def batch_of(seed: int) -> MicroBatch:
    labels = tokens(2, 24, seed=seed + 50)
    labels[0, :5] = -100
    return MicroBatch(tokens(2, 24, seed=seed), labels, torch.tensor([0, 9, 24, 48], dtype=torch.int32))


def test_it_holds_the_model_that_args_and_seed_say(replica: Replica) -> None:
    expected = LLM(ARGS, seed=3).state_dict()
    found = replica.model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_scores_are_sums_over_batches_and_their_targets(replica: Replica) -> None:
    batches = [batch_of(seed) for seed in range(3)]
    sizes = np.arange(VOCAB)
    nll, n_targets, n_bytes = replica.sum_nll(iter(batches), sizes)
    assert n_targets == 3 * (48 - 5)
    assert n_bytes == sum(int(sizes[batch.labels_BT[batch.labels_BT >= 0]].sum()) for batch in batches)
    each = replica.token_nll(batches)
    # float32 sums of a batch against float64 sums of its tokens
    assert nll == pytest.approx(sum(float(part.double().sum()) for part in each), rel=1e-6)
    assert all((part[batch.labels_BT < 0] == 0).all() for part, batch in zip(each, batches, strict=True))


def test_it_continues_prompts_as_the_model_does(replica: Replica) -> None:
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    settings = {"max_new_tokens": [6, 3, 9], "temperature": 0.7, "seed": 5}
    assert generate(replica.decoder(), prompts, **settings) == generate(replica.model, prompts, **settings)  # type: ignore[arg-type]


def test_expert_counts_of_another_model_are_refused(replica: Replica) -> None:
    with pytest.raises(ValueError, match=r"must have shape \(\d+, \d+\)"):
        replica.set_expert_counts(torch.zeros(9, 9, dtype=torch.int64))
