"""Our Llama 4 with vision equals transformers' Llama4ForConditionalGeneration, given the same random weights."""

import pytest
import torch

from llm.datatypes import TransformerInput
from tests.vision.llama4 import foreign, named_as_ours, ours, pictures, row
from vision.levels import normalised

transformers = pytest.importorskip("transformers")

EVEN = dict(image_size=8, patch_size=2, dim=16, n_layers=2, n_heads=2, pixel_shuffle_ratio=0.5)
ODD = dict(image_size=18, patch_size=3, dim=24, n_layers=3, n_heads=3, pixel_shuffle_ratio=1 / 3)
WIDE = dict(image_size=10, patch_size=1, dim=12, n_layers=1, n_heads=1, pixel_shuffle_ratio=0.5)
CASES = {
    "one tile, and a row of text": (EVEN, 1, 1, [(1,), ()]),
    "three tiles, top 2": (EVEN, 2, 2, [(3,), (1,)]),
    "several images a row, odd sizes": (ODD, 1, 2, [(1, 3), (3, 1, 1)]),
    "pixels as patches, one head": (WIDE, 2, 1, [(1,), ()]),
}


def both(vision, top_k, interleave, images):
    theirs = foreign(transformers, vision, top_k, interleave)
    slots = (vision["image_size"] // vision["patch_size"] // round(1 / vision["pixel_shuffle_ratio"])) ** 2
    length = 4 + max(sum(n * slots + 2 for n in tiles) for tiles in images)
    ids = torch.stack([row(length, *tiles, slots=slots, seed=b) for b, tiles in enumerate(images)])
    return theirs, ours(theirs, vision, top_k, interleave), ids, pictures(sum(map(sum, images)), vision["image_size"])


def assert_near(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_logits_and_the_towers_states_equal_those_of_transformers(case):
    theirs, model, ids, tiles = both(*case)
    states = []
    for layer in model.vision_embeddings.layers:
        layer.register_forward_hook(lambda _, __, out: states.append(out[0]))
    with torch.no_grad():
        seen = theirs.vision_model(normalised(tiles), output_hidden_states=True)
        expected = theirs(input_ids=ids, pixel_values=normalised(tiles)).logits
        actual = model(TransformerInput(ids, images=tiles)).logits
    # both sum the same float32 terms in another order
    for mine, other in zip(states, seen.hidden_states[1:], strict=True):
        assert_near(mine, other, 1e-5)
    assert_near(actual, expected, 1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_of_all_parameters_equal_those_of_transformers(case):
    theirs, model, ids, tiles = both(*case)
    labels = ids.roll(-1, dims=1)
    logits = theirs(input_ids=ids, pixel_values=normalised(tiles)).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    model(TransformerInput(ids, images=normalised(tiles)), labels=labels).loss_sum.backward()
    expected = named_as_ours({name: p.grad for name, p in theirs.named_parameters()})
    assert expected.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        # sums over all tokens, in another order
        assert_near(parameter.grad, expected[name], 1e-4)
