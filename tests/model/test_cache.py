"""Decoding through the cache equals the full forward, wherever the text is cut."""

import pytest
import torch

from llm.cache import Cache
from llm.datatypes import TransformerInput
from tests.model.models import MOE, llama4, tokens

TOLERANCE = dict(rtol=1e-5, atol=1e-5)  # float32 sums in another order; logits are about 3


@pytest.mark.parametrize("moe", [None, MOE | {"top_k": 2}], ids=["dense", "moe"])
@pytest.mark.parametrize("cuts", [[1] * 40, [5] + [1] * 35, [8, 8, 8, 8, 8], [13, 1, 1, 18, 1, 6], [40]])
def test_cached_decoding_equals_the_full_forward_past_chunk_boundaries(moe, cuts):
    model, ids = llama4(moe=moe), tokens(2, 40)
    cache = Cache(model.args)
    pieces = [model(piece, cache=cache).logits for piece in ids.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids).logits, **TOLERANCE)
    assert cache.length == 40


@pytest.mark.parametrize("changes", [dict(), dict(attn_softcap=0.5), dict(score_scale=0.9)], ids=str)
@pytest.mark.parametrize("cuts", [[1] * 40, [5, 13, 1, 1, 20], [40]], ids=len)
def test_cached_decoding_with_a_window_equals_the_full_forward(cuts, changes):
    pattern = ["attn:window", "attn:full"]
    model, ids = llama4(sliding_window=6, layer_pattern=pattern, rope_pct=0.5, **changes), tokens(2, 40)
    cache = Cache(model.args)
    pieces = [model(piece, cache=cache).logits for piece in ids.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids).logits, **TOLERANCE)


@pytest.mark.parametrize("window", [None, 6], ids=["chunks", "windows"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_ragged_rows_decode_as_if_alone(padding, window):
    other = {} if window is None else dict(sliding_window=window, attention_chunk_size=None)
    model, ids, lengths = llama4(moe=MOE, **other), tokens(3, 34), [5, 14, 1]
    longest = max(lengths)
    prompt, positions = torch.zeros(3, longest, dtype=torch.int64), torch.full((3, longest), -1)
    for row, n in enumerate(lengths):
        where = slice(longest - n, None) if padding == "left" else slice(0, n)
        prompt[row, where], positions[row, where] = ids[row, :n], torch.arange(n)
    cache = Cache(model.args)
    model(TransformerInput(prompt, tokens_position=positions), cache=cache)
    position = torch.tensor(lengths)
    for n_new in (1, 1, 1, 3, 5, 9):  # each row passes chunk boundaries at its own time
        new = position[:, None] + torch.arange(n_new)
        logits = model(TransformerInput(ids.gather(1, new), tokens_position=new), cache=cache).logits
        position += n_new
        for row in range(3):
            alone = model(ids[row : row + 1, : position[row]]).logits[:, -n_new:]
            torch.testing.assert_close(logits[row : row + 1], alone, **TOLERANCE)


def test_rows_continue_at_their_own_positions_by_default():
    model, ids = llama4(), tokens(2, 12)
    cache = Cache(model.args)
    positions = torch.tensor([[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]])
    model(TransformerInput(ids[:, :5], tokens_position=positions), cache=cache)
    given = model(ids[:, 5:6], cache=cache).logits
    alone = model(ids[:1, 2:6]).logits[:, -1:]
    torch.testing.assert_close(given[:1], alone, **TOLERANCE)


def test_chunked_layers_forget_earlier_chunks():
    model, ids = llama4(layer_pattern="attn:chunk", attention_chunk_size=16), tokens(1, 600)
    cache, sizes = Cache(model.args), []
    model(ids[:, :300], cache=cache)
    for i in range(300, 600):
        model(ids[:, i : i + 1], cache=cache)
        sizes.append(cache.nbytes)
    bytes_per_slot = 4 * 2 * 2 * 12 * 4  # layers x (key, value) x kv heads x head width x float32
    assert max(sizes) <= 160 * bytes_per_slot  # a chunk, spare room and what waits to be moved; not 600


def test_layers_with_a_window_forget_what_has_left_it():
    model, ids = llama4(layer_pattern="attn:window", sliding_window=16), tokens(1, 600)
    cache, sizes = Cache(model.args), []
    model(ids[:, :300], cache=cache)
    for i in range(300, 600):
        model(ids[:, i : i + 1], cache=cache)
        sizes.append(cache.nbytes)
    assert max(sizes) <= 160 * 4 * 2 * 2 * 12 * 4  # as above


NO_CHUNKS = dict(attention_chunk_size=None)


@pytest.mark.parametrize("cuts", [[1] * 40, [5, 13, 1, 1, 20], [40]], ids=len)
@pytest.mark.parametrize("wider", [None, 20], ids=["full layers", "full and wider windows"])
def test_a_sliding_cache_is_a_window_mask_of_its_width(wider, cuts):
    pattern = ["attn:full", "attn:window" if wider else "attn:full"]
    model, ids = llama4(layer_pattern=pattern, sliding_window=wider, **NO_CHUNKS), tokens(2, 40)
    masked = llama4(layer_pattern="attn:window", sliding_window=6, **NO_CHUNKS)
    cache = Cache(model.args, window=6)
    pieces = [model(piece, cache=cache).logits for piece in ids.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), masked(ids).logits, **TOLERANCE)
    assert cache.next_position.tolist() == [40, 40]  # positions count on


def test_ragged_rows_slide_each_along_its_own_positions():
    model, ids = llama4(layer_pattern="attn:full", **NO_CHUNKS), tokens(2, 30)
    masked = llama4(layer_pattern="attn:window", sliding_window=6, **NO_CHUNKS)
    cache = Cache(model.args, window=6)
    prompt = torch.stack([torch.cat([ids[0, :0], torch.zeros(8, dtype=torch.int64), ids[0, :3]]), ids[1, :11]])
    positions = torch.stack([torch.cat([torch.full((8,), -1), torch.arange(3)]), torch.arange(11)])
    model(TransformerInput(prompt, tokens_position=positions), cache=cache)
    for step in range(15):
        logits = model(torch.stack([ids[0, 3 + step : 4 + step], ids[1, 11 + step : 12 + step]]), cache=cache).logits
        for row, length in enumerate((4 + step, 12 + step)):
            torch.testing.assert_close(logits[row, 0], masked(ids[row : row + 1, :length]).logits[0, -1], **TOLERANCE)


def test_layers_that_see_less_than_a_sliding_cache_see_what_they_saw():
    ids = tokens(2, 40)
    for changes in (dict(), dict(layer_pattern="attn:window", sliding_window=6, **NO_CHUNKS)):
        model = llama4(**changes)
        sliding, growing = Cache(model.args, window=40), Cache(model.args)
        for piece in ids.split([7, 1, 1, 20, 11], dim=1):
            found, expected = (model(piece, cache=cache).logits for cache in (sliding, growing))
            assert torch.equal(found, expected)


def test_a_cache_that_slid_grows_again_from_what_it_still_has():
    model, ids = llama4(n_layers=1, layer_pattern="attn:full", nope_layer_interval=None, **NO_CHUNKS), tokens(1, 30)
    cache = Cache(model.args)
    model(ids[:, :20], cache=cache)
    cache.window = 4
    model(ids[:, 20:21], cache=cache)
    cache.window = None
    found = torch.cat([model(ids[:, i : i + 1], cache=cache).logits for i in range(21, 30)], dim=1)
    # in one layer, what is seen decides alone: positions from 18 on, those that 21 would have seen
    positions = torch.arange(18, 30)
    expected = model(TransformerInput(ids[:, 18:], tokens_position=positions)).logits[:, 3:]
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_a_sliding_cache_holds_no_more_than_its_window():
    model, ids = llama4(layer_pattern="attn:full", **NO_CHUNKS), tokens(1, 600)
    cache, sizes = Cache(model.args, window=16), []
    for i in range(600):
        model(ids[:, i : i + 1], cache=cache)
        sizes.append(cache.nbytes)
    assert max(sizes) <= 160 * 4 * 2 * 2 * 12 * 4  # as above


def test_windows_that_a_cache_cannot_have_are_refused():
    with pytest.raises(ValueError, match="a cache's window of 0 must be at least 1"):
        Cache(llama4().args, window=0)
    with pytest.raises(ValueError, match="window of 7 is shorter than the chunks of 8"):
        Cache(llama4().args).window = 7


def test_reordered_rows_take_their_memory_along():
    model, ids = llama4(), tokens(3, 20)
    cache = Cache(model.args)
    model(ids[:, :13], cache=cache)
    cache.reorder([2, 0, 2])
    logits = model(ids[[2, 0, 2], 13:], cache=cache).logits
    torch.testing.assert_close(logits, model(ids[[2, 0, 2]]).logits[:, 13:], **TOLERANCE)


def test_a_long_continuation_is_masked_in_blocks(monkeypatch):
    monkeypatch.setattr("llm.cache.QUERY_BLOCK", 5)
    model, ids = llama4(), tokens(2, 40)
    cache = Cache(model.args)
    pieces = [model(piece, cache=cache).logits for piece in ids.split([3, 37], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids).logits, **TOLERANCE)


@pytest.mark.parametrize("tie", [False, True], ids=["output", "tied"])
@pytest.mark.parametrize("asked", [dict(), dict(labels=tokens(1, 4)), dict(return_hidden=True)], ids=str)
def test_a_forward_with_a_cache_builds_no_graph(asked, tie):
    model = llama4(tie_embeddings=tie, moe=MOE | dict(aux_alpha=0.1, z_alpha=0.1))
    out = model(tokens(1, 4), cache=Cache(model.args), **asked)
    made = [value for value in vars(out).values() if value is not None]
    assert len(made) >= 4 and not any(value.requires_grad for value in made)
    assert model(tokens(1, 4)).logits.requires_grad  # gradients are as they were afterwards


def test_what_does_not_continue_the_rows_is_refused():
    model, ids = llama4(), tokens(2, 6)
    cache = Cache(model.args)
    with pytest.raises(ValueError, match="cu_seqlens cannot be used with a cache"):
        model(TransformerInput(ids, cu_seqlens=torch.tensor([0, 3, 6, 12])), cache=cache)
    with pytest.raises(ValueError, match="the cache is empty"):
        cache.reorder([0])
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="the cache holds 2 rows, the input has 1"):
        model(ids[:1], cache=cache)
    with pytest.raises(ValueError, match="row 0 continues at 3, but the cache goes on at 6"):
        model(TransformerInput(ids, tokens_position=3), cache=cache)


def test_a_cache_that_knows_its_length_takes_memory_for_no_more():
    model, ids = llama4(layer_pattern="attn:full", attention_chunk_size=None), tokens(2, 150)
    known, unknown = Cache(model.args, longest=150), Cache(model.args)
    for cache in (known, unknown):
        model(ids[:, :100], cache=cache)
        logits = [model(ids[:, i : i + 1], cache=cache).logits for i in range(100, 150)]
    assert known.nbytes == 2 * 150 * 4 * 2 * 2 * 12 * 4  # rows x slots, then as above
    assert unknown.nbytes > known.nbytes
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits[:, 100:], **TOLERANCE)
