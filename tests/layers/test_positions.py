"""Positions that are added to token vectors: their values, and where they are counted from."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llm import LLM, ModelArgs
from llm.args.layers import POSITIONS
from llm.cache import Cache
from llm.datatypes import TransformerInput
from llm.errors import UserError
from llm.foreign.export import written_config
from llm.foreign.family import family_named
from llm.layers.positions import PositionKind, register, sinusoids
from llm.parameters import ParameterTable
from tests.model.models import llama4, tokens

PLAIN = dict(nope_layer_interval=None, attn_temperature_tuning=False, qk_norm=None, max_seq_len=24)
ADDED = ("sinusoidal", "learned")


def model_of(pos: str, **changes: object) -> LLM:
    return llama4(**PLAIN | dict(pos=pos) | changes)


def hidden(model: LLM, ids: Tensor, **given: object) -> Tensor:
    return model(TransformerInput(ids, **given), return_hidden=True).hidden  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("dim", [8, 7])
def test_sinusoids_are_sines_at_even_places_and_cosines_at_odd_ones(dim: int) -> None:
    positions = torch.tensor([[0, 1, 5, 9000]])
    found = sinusoids(positions, dim)
    assert found.shape == (1, 4, dim) and found.dtype == torch.float32
    for t, p in enumerate(positions[0].tolist()):
        for place in range(dim):
            angle = p / 10000 ** ((place - place % 2) / dim)
            expected = math.cos(angle) if place % 2 else math.sin(angle)
            # an angle of 9000 in float32 is exact to 5e-4
            assert found[0, t, place].item() == pytest.approx(expected, abs=1e-3 if p > 1000 else 1e-6)


@pytest.mark.parametrize("pos", ADDED)
def test_vectors_of_positions_are_added_to_those_of_tokens(pos: str) -> None:
    model, ids = model_of(pos, embed_scale=3.0), tokens(2, 9)
    made = model(ids, units=["tok_embeddings"], return_hidden=True).hidden
    table = model.pos_embeddings.weight if pos == "learned" else sinusoids(torch.arange(24), model.args.dim)
    torch.testing.assert_close(made, model.tok_embeddings(ids) * 3 + table[:9])


@pytest.mark.parametrize("pos", ADDED)
def test_a_document_is_the_same_wherever_it_stands(pos: str) -> None:
    model, ids = model_of(pos), tokens(1, 20)
    packed = hidden(model, ids, cu_seqlens=torch.tensor([0, 8, 20]))
    alone = hidden(model, ids[:, 8:])
    torch.testing.assert_close(packed[:, 8:], alone, rtol=1e-5, atol=1e-5)  # float32 sums in another order
    padding = torch.cat([torch.full((3,), -1), torch.arange(12)])
    padded = hidden(model, torch.cat([ids[:, :3], ids[:, 8:]], dim=1), tokens_position=padding)
    torch.testing.assert_close(padded[:, 3:], alone, rtol=1e-5, atol=1e-5)
    moved = hidden(model, ids[:, 8:], tokens_position=4)
    assert not torch.allclose(moved, alone, atol=1e-3)


@pytest.mark.parametrize("pos", [*ADDED, "none"])
def test_a_cache_goes_on_counting(pos: str) -> None:
    model, ids = model_of(pos), tokens(2, 12)
    cache = Cache(model.args)
    parts = [model(part, cache=cache).logits for part in ids.split([5, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, rtol=1e-4, atol=1e-5)


def test_without_positions_the_order_of_earlier_tokens_does_not_matter() -> None:
    model, ids = model_of("none", attention_chunk_size=None), tokens(1, 9)
    turned = torch.cat([ids[:, :8].flip(1), ids[:, 8:]], dim=1)
    one_layer = model_of("none", attention_chunk_size=None, n_layers=1)
    torch.testing.assert_close(hidden(one_layer, ids)[:, 8], hidden(one_layer, turned)[:, 8], rtol=1e-5, atol=1e-5)
    assert not any(spec.attention.rope for spec in model.specs if spec.attention is not None)


def test_chunks_stay_where_nothing_is_rotated() -> None:
    model = model_of("learned")
    assert {spec.attention.mask for spec in model.specs if spec.attention is not None} == {"chunk"}


def test_a_table_has_no_position_past_its_last() -> None:
    model = model_of("learned", max_seq_len=8)
    with pytest.raises(ValueError, match=r"position 8 of row 0: model.pos=learned has positions 0 to 7"):
        model(tokens(2, 9))
    positions = torch.tensor([[0, 1], [6, 30]])
    with pytest.raises(ValueError, match="position 30 of row 1"):
        model(TransformerInput(tokens(2, 2), tokens_position=positions))
    cache = Cache(model.args)
    model(tokens(1, 8), cache=cache)
    with pytest.raises(ValueError, match="position 8 of row 0"):
        model(tokens(1, 1), cache=cache)
    assert cache.length == 8


def test_the_table_is_a_parameter_beside_the_token_table() -> None:
    model = model_of("learned")
    table = ParameterTable.of(model.args)
    row = table["pos_embeddings.weight"]
    assert (row.shape, row.unit, row.kind, row.decay) == ((24, 48), "tok_embeddings", "embedding", False)
    assert list(table) == [name for name, _ in model.named_parameters()]
    model(tokens(2, 9), labels=tokens(2, 9)).loss_sum.backward()
    gradient = model.pos_embeddings.weight.grad
    assert gradient[:9].abs().sum(1).min() > 0 and gradient[9:].abs().max() == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(pos="rotary"), "model.pos=rotary: unknown kind of position; use rope, sinusoidal, learned or none"),
        (dict(pos="none", qk_norm="l2"), "model.qk_norm=l2 is of models with model.pos=rope; got none"),
        (dict(pos="learned", nope_layer_interval=2), "model.nope_layer_interval is of models with model.pos=rope"),
        (dict(pos="learned", layer_pattern="attn:rope"), "'attn:rope': :rope needs model.pos=rope; got learned"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(changes: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        ModelArgs.model_validate(dict(dim=8, n_layers=2, n_heads=2, vocab_size=9) | changes)


def test_odd_heads_can_be_where_nothing_is_rotated() -> None:
    odd = dict(dim=9, n_layers=1, n_heads=3, vocab_size=9, ffn_hidden=8)
    with pytest.raises(ValueError, match="RoPE rotates pairs"):
        ModelArgs.model_validate(odd)
    assert LLM(ModelArgs.model_validate(odd | dict(pos="sinusoidal")))(torch.tensor([[1, 2]])).logits.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(pos="sinusoidal"), r"pos \(sinusoidal\)"),
        (dict(pos="learned"), r"pos \(learned\)"),
        (dict(causal=False), r"causal \(False\)"),
        (dict(norm_place="post_add"), r"norm_place \(post_add\)"),
    ],
)
def test_families_say_what_they_cannot_hold(changes: dict, expected: str) -> None:
    args = ModelArgs.model_validate(dict(dim=8, n_layers=2, n_heads=2, vocab_size=9, ffn_hidden=8) | changes)
    with pytest.raises(UserError, match=f"a llama config cannot say .*{expected}"):
        written_config(family_named("llama"), args)


def test_a_kind_of_ones_own_is_named_by_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(POSITIONS, "_entries", dict(POSITIONS))

    def halves(args: ModelArgs) -> Callable[[Tensor], Tensor]:
        return lambda positions: sinusoids(positions, args.dim) / 2

    register("halves", PositionKind(build=halves))
    ids = tokens(1, 5)
    made = [model_of(pos)(ids, units=["tok_embeddings"], return_hidden=True).hidden for pos in ("halves", "none")]
    torch.testing.assert_close(made[0] - made[1], sinusoids(torch.arange(5), 48)[None] / 2, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="kind of position 'rope' exists already"):
        register("rope", PositionKind())
