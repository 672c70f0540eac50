"""Gradients through converted hybrids equal those of transformers, as far as its rounding goes."""

import pytest
import torch.nn.functional as F
from torch import Tensor

from llm import LLM
from tests.foreign.models import CONFIGS, reference, tokens

CASES = [(family, name) for family in ("nemotron_h", "falcon_h1") for name in CONFIGS[family]]


def loss_of(logits_BTV: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("entry", CASES, ids=": ".join)
def test_gradients_equal_those_of_transformers(entry, tmp_path):
    theirs, ids = reference(*entry), tokens(2, 26)  # past three chunks of 8
    theirs.save_pretrained(tmp_path)
    ours = LLM.from_pretrained(tmp_path)
    loss_of(theirs(ids).logits, ids).backward()
    loss_of(ours(ids).logits, ids).backward()
    expected = LLM(ours.args)  # whose parameters hold gradients, in our names
    expected.load_state_dict({name: parameter.grad for name, parameter in theirs.named_parameters()})
    for (name, parameter), (_, wanted) in zip(ours.named_parameters(), expected.named_parameters(), strict=True):
        largest = wanted.abs().max()
        # float32 sums in another order, through layers of them; the recurrence goes back through exponentials
        assert (parameter.grad - wanted).abs().max() <= 1e-4 * largest, name
