"""Initial weights: the same bits everywhere, any range alone, and really normal."""

import hashlib
import math

import numpy as np
import pytest
import torch

from llm import LLM
from llm.init import InverseSoftplus, LogUniform, Normal, normal
from llm.parameters import ParameterTable
from tests.model.models import MOE, llama4

GOLDEN = {
    (0, "tok_embeddings.weight"): "d7acf7373e2451eebaeabeab8fd2b31b",
    (7, "layers.3.attention.wq.weight"): "e6307bae37cda5ce6e95f93ef8199a75",
}


def digest(values) -> str:
    return hashlib.blake2b(np.ascontiguousarray(values, dtype="<f4").tobytes(), digest_size=16).hexdigest()


@pytest.mark.parametrize(("seed", "name"), GOLDEN)
def test_values_are_the_same_bits_on_every_machine(seed, name):
    assert digest(normal(seed, name, 0, 100_000)) == GOLDEN[seed, name]


def test_a_whole_model_has_the_golden_initial_weights():
    weights = [p.detach().flatten() for _, p in sorted(llama4(moe=MOE).named_parameters())]
    assert digest(torch.cat(weights)) == "f7876e59194f05a442b99aa8acc163a2"


RANGES = [(0, 1), (1, 2), (3, 300_001), (262_143, 262_145), (299_999, 600_000)]


@pytest.mark.parametrize(("start", "stop"), RANGES)
def test_any_range_equals_the_slice_of_the_whole(start, stop):
    assert np.array_equal(normal(3, "x", start, stop), normal(3, "x", 0, 600_000)[start:stop])


def test_seeds_and_names_give_unrelated_values():
    streams = [normal(seed, name, 0, 100_000) for seed, name in ((0, "a"), (1, "a"), (0, "b"))]
    correlation = np.corrcoef(streams) - np.eye(3)
    assert np.abs(correlation).max() < 5 / math.sqrt(100_000)  # five standard deviations of chance


def test_values_are_standard_normal():
    x = normal(0, "normality", 0, 1_000_000).astype(np.float64)
    n = x.size
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n)
    # Kolmogorov-Smirnov: the largest gap between distribution functions passes 1.95 / sqrt(n) once in a thousand
    expected = torch.special.ndtr(torch.from_numpy(np.sort(x))).numpy()
    assert np.abs(expected - (np.arange(n) + 0.5) / n).max() < 1.95 / math.sqrt(n)


def test_norms_start_at_one_and_depth_scaling_lowers_what_writes_into_the_residual():
    args = llama4(moe=MOE, init_depth_scale=True).args
    table = ParameterTable.of(args)
    name = "layers.0.ffn_norm.weight"
    assert (table[name].init.values(0, name, 0, 5) == 1).all()
    lowered = args.init_std / math.sqrt(2 * args.n_layers)
    for name in ("attention.wo.weight", "feed_forward.shared_expert.w2.weight", "feed_forward.experts.w2"):
        assert table[f"layers.1.{name}"].init == Normal(lowered)
    assert table["layers.1.feed_forward.experts.w1"].init == Normal(args.init_std)


def test_a_meta_model_is_counted_without_values():
    model = LLM(llama4().args, device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())


def test_decays_and_time_steps_of_state_space_layers_begin_as_their_authors_say():
    decays = LogUniform(1.0, 16.0).values(0, "a", 0, 4000).double().exp()
    steps = torch.nn.functional.softplus(InverseSoftplus(1e-3, 1e-1).values(0, "b", 0, 4000).double())
    for found, low, high in ((decays, 1.0, 16.0), (steps.log10(), -3.0, -1.0)):
        assert low < found.min() and found.max() < high
        # within four standard errors of a mean of 4,000 values spread evenly
        assert abs(found.mean() - (low + high) / 2) < 4 * (high - low) / (12 * 4000) ** 0.5
