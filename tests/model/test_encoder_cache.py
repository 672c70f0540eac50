"""Decoding of encoder-decoders: through the cache as without one, the source read once."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llm import LLM
from llm.cache import Cache
from llm.datatypes import TransformerInput
from llm.decoder import left_padded, right_padded
from llm.model import unit_names
from llm.row_cache import RowCache
from tests.model.models import tokens
from tests.model.test_encoder import KINDS, encoder_decoder, pair

TOLERANCE = dict(rtol=1e-5, atol=1e-5)  # float32 sums in another order
TARGETS, SOURCES = (3, 1, 6), (5, 11, 1)
"""Tokens of each row, and of its source."""


def side(rows: list[list[int]], left: bool = False) -> TransformerInput:
    ids, places = (left_padded if left else right_padded)(rows)
    return TransformerInput(torch.from_numpy(ids), torch.from_numpy(places))


def listed(n_tokens: tuple[int, ...], more: int, seed: int) -> list[list[int]]:
    return [row[: n + more].tolist() for row, n in zip(tokens(3, 20, seed=seed), n_tokens, strict=True)]


def alone(model: LLM, target: list[int], source: list[int]) -> Tensor:
    """Logits of each token of one row, without a cache."""
    inputs = TransformerInput(torch.tensor([target]), source=TransformerInput(torch.tensor([source])))
    logits = model(inputs).logits
    assert logits is not None
    return logits[0]


@pytest.mark.parametrize(("kind", "cuts"), [("pre", [1] * 6), *((kind, [3, 1, 2]) for kind in KINDS)], ids=str)
def test_decoding_through_the_cache_is_the_full_forward(kind: str, cuts: list[int]) -> None:
    model, inputs = encoder_decoder(**KINDS[kind]), pair(6, 7)
    cache = Cache(model.args)
    source, pieces = inputs.source, []
    for piece in inputs.tokens.split(cuts, dim=1):
        pieces.append(model(TransformerInput(piece, source=source), cache=cache).logits)
        source = None
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(inputs).logits, **TOLERANCE)


@pytest.mark.parametrize("kind", ["post_add", "local", "experts"])
def test_ragged_rows_and_sources_decode_as_if_alone(kind: str) -> None:
    model = encoder_decoder(**KINDS[kind])
    cache = Cache(model.args)
    targets, sources = listed(TARGETS, 4, seed=1), listed(SOURCES, 0, seed=2)
    begun = side([row[:-4] for row in targets], left=True)
    found = [model(replace(begun, source=side(sources)), cache=cache).logits[:, -1]]
    for step in range(-4, 0):
        found.append(model(torch.tensor([[row[step]] for row in targets]), cache=cache).logits[:, -1])
    for number, (target, source) in enumerate(zip(targets, sources, strict=True)):
        together = torch.stack([logits[number] for logits in found])
        torch.testing.assert_close(together, alone(model, target, source)[-5:], **TOLERANCE)


def test_rows_that_move_take_their_sources_along() -> None:
    model = encoder_decoder()
    cache = Cache(model.args)
    targets, sources = listed((4, 4, 4), 2, seed=1), listed(SOURCES, 0, seed=2)
    model(replace(side([row[:4] for row in targets]), source=side(sources)), cache=cache)
    for rows in ([2, 0, 0, 1], [0, 2, 3], [1, 1]):  # within the copies of a source, and among others
        cache.reorder(rows)
        targets, sources = [targets[i] for i in rows], [sources[i] for i in rows]
    found = model(torch.tensor([[row[4]] for row in targets]), cache=cache).logits[:, 0]
    expected = torch.stack([alone(model, row[:5], of)[-1] for row, of in zip(targets, sources, strict=True)])
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_encoder_and_keys_of_the_source_are_computed_with_the_first_tokens_alone() -> None:
    model, inputs = encoder_decoder(), pair(1, 7)
    cache, ran = Cache(model.args), []
    for module in (*model.encoder.layers, *(block.cross.wk for block in model.layers)):
        module.register_forward_hook(lambda *_: ran.append(1))
    model(inputs, cache=cache)
    assert len(ran) == model.args.encoder_layers + model.args.n_layers
    held = cache.nbytes
    model(tokens(1, 3), cache=cache)
    assert len(ran) == model.args.encoder_layers + model.args.n_layers
    across = 2 * model.args.n_layers * 7 * model.args.kv_heads * model.args.head_width * 4
    assert held == across + across // 7  # of one token


def test_a_memory_stands_for_the_source_there_too() -> None:
    model, inputs = encoder_decoder(), pair(5, 7)
    assert inputs.source is not None
    cache = Cache(model.args)
    first = model(inputs.tokens[:, :2], memory=model.encode(inputs.source), cache=cache).logits
    rest = model(inputs.tokens[:, 2:], cache=cache).logits
    torch.testing.assert_close(torch.cat([first, rest], dim=1), model(inputs).logits, **TOLERANCE)


def test_a_sliding_cache_sees_all_of_the_source() -> None:
    model, inputs = encoder_decoder(), pair(12, 9)
    assert inputs.source is not None
    masked = encoder_decoder(layer_pattern="attn:window", sliding_window=3)
    # the encoder of the other reads through windows, so it is given this one's memory
    expected = masked(inputs.tokens, memory=model.encode(inputs.source)).logits
    cache = Cache(model.args, window=3)
    found = [model(replace(inputs, tokens=inputs.tokens[:, :1]), cache=cache).logits]
    found += [model(inputs.tokens[:, i : i + 1], cache=cache).logits for i in range(1, 12)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, **TOLERANCE)


@pytest.mark.parametrize("kind", ["post_add", "experts"])
def test_units_one_by_one_decode_with_a_cache_of_each(kind: str) -> None:
    model, inputs = encoder_decoder(**KINDS[kind]), pair(6, 5)
    units = [unit for unit in unit_names(model.args) if unit != "output"]
    caches = {unit: Cache(model.args) for unit in units}
    found = []
    first, *rest = inputs.tokens.split([4, 1, 1], dim=1)
    for given in (replace(inputs, tokens=first), *map(TransformerInput, rest)):
        x: Tensor | None = None
        for unit in units:
            x = model(given, units=[unit], x=x, cache=caches[unit], return_hidden=True).hidden
        found.append(x)
    expected = model(inputs, return_hidden=True).hidden
    torch.testing.assert_close(torch.cat(found, dim=1), expected, **TOLERANCE)


def test_sources_that_come_late_or_not_at_all_are_refused() -> None:
    model, inputs = encoder_decoder(), pair(2, 3)
    assert inputs.source is not None
    cache = Cache(model.args)
    with pytest.raises(ValueError, match="the first tokens of its rows need inputs.source"):
        model(inputs.tokens, cache=cache)
    packed = replace(inputs.source, cu_seqlens=torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match="each row has one source"):
        model(replace(inputs, source=packed), cache=cache)
    padding = replace(inputs.source, tokens_position=torch.full((1, 3), -1))
    with pytest.raises(ValueError, match="row 0 has 1 of them, and 0 sources"):
        model(replace(inputs, source=padding), cache=cache)
    model(inputs, cache=cache)  # nothing of what was refused is in it
    with pytest.raises(ValueError, match="rows go on without inputs.source"):
        model(inputs, cache=cache)
    with pytest.raises(ValueError, match="sources of their own"):
        RowCache(model.args)
