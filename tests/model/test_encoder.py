"""Encoder-decoders: which tokens see which of the source, what passes between units, and what cannot be so."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llm import LLM, ModelArgs
from llm.datatypes import TransformerInput
from llm.model import unit_names
from llm.parameters import ParameterTable
from tests.model.models import VOCAB, tokens

BASE = dict(dim=32, n_layers=2, encoder_layers=3, n_heads=4, n_kv_heads=2, vocab_size=VOCAB, ffn_hidden=48)
KINDS = {
    "pre": dict(),
    "post_add": dict(norm_place="post_add", norm="layer", pos="learned", qkv_bias=True, o_bias=True),
    "sandwich": dict(norm_place="sandwich", pos="sinusoidal", qk_norm="head"),
    "capped": dict(norm_place="post", attn_softcap=3.0, qk_norm="full", attn_gate=True),
    "local": dict(qk_norm="l2", nope_layer_interval=2, attention_chunk_size=4, attn_temperature_tuning=True),
    "experts": dict(moe=dict(n_experts=3, hidden=24)),
}
PAIRS = ((5, 4), (7, 11), (1, 2))
"""Tokens and source tokens of some documents."""


def encoder_decoder(**changes: object) -> LLM:
    return LLM(ModelArgs.model_validate(BASE | dict(init_std=0.15, max_seq_len=64) | changes))


def pair(target: int, source: int, seed: int = 0) -> TransformerInput:
    return TransformerInput(tokens(1, target, seed=seed), source=TransformerInput(tokens(1, source, seed=seed + 100)))


def with_source(inputs: TransformerInput, **changes: object) -> TransformerInput:
    assert inputs.source is not None
    return replace(inputs, source=replace(inputs.source, **changes))  # type: ignore[arg-type]


def hidden(model: LLM, inputs: TransformerInput) -> Tensor:
    found = model(inputs, return_hidden=True).hidden
    assert found is not None
    return found


def packed(padding: int = 0) -> TransformerInput:
    """PAIRS in one row, with padding behind them on both sides."""
    single = [pair(target, source, seed=number) for number, (target, source) in enumerate(PAIRS)]

    def side(parts: list[TransformerInput]) -> TransformerInput:
        positions = [torch.arange(part.tokens.shape[1]) for part in parts]
        bounds = torch.tensor([0, *(len(places) for places in positions)]).cumsum(0)
        ids = torch.cat([*(part.tokens for part in parts), torch.zeros(1, padding, dtype=torch.int64)], dim=1)
        if not padding:
            return TransformerInput(ids, cu_seqlens=bounds)
        places = torch.cat([*positions, torch.full((padding,), -1)])[None]
        return TransformerInput(ids, places, torch.cat([bounds, bounds[-1:] + padding]))

    return replace(side(single), source=side([part.source for part in single if part.source is not None]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", [0, 3])
def test_pairs_in_one_row_are_what_each_is_alone(kind: str, padding: int) -> None:
    model, inputs, first = encoder_decoder(**KINDS[kind]), packed(padding), 0
    together = hidden(model, inputs)
    for number, (target, source) in enumerate(PAIRS):
        alone = hidden(model, pair(target, source, seed=number))
        # products over other sizes round otherwise
        torch.testing.assert_close(together[:, first : first + target], alone, rtol=1e-5, atol=1e-5)
        first += target


@pytest.mark.parametrize("kind", KINDS)
def test_padding_between_and_before_tokens_of_a_source_is_not_there(kind: str) -> None:
    model, inputs = encoder_decoder(**KINDS[kind]), pair(6, 5)
    assert inputs.source is not None
    ids = torch.zeros(1, 8, dtype=torch.int64)
    places = torch.tensor([[-1, 0, 1, -1, -1, 2, 3, 4]])
    ids[places >= 0] = inputs.source.tokens[0]
    other = hidden(model, replace(inputs, source=TransformerInput(ids, places)))
    torch.testing.assert_close(other, hidden(model, inputs), rtol=1e-5, atol=1e-5)


def test_ragged_rows_of_a_batch_are_what_each_is_alone() -> None:
    model, lengths = encoder_decoder(), [(6, 3), (2, 9)]
    single = [pair(*both, seed=number) for number, both in enumerate(lengths)]

    def padded(sides: list[Tensor], width: int) -> TransformerInput:
        ids, places = torch.zeros(2, width, dtype=torch.int64), torch.full((2, width), -1)
        for row, side in enumerate(sides):
            ids[row, : side.shape[1]], places[row, : side.shape[1]] = side[0], torch.arange(side.shape[1])
        return TransformerInput(ids, places)

    source = padded([one.source.tokens for one in single if one.source is not None], 9)
    together = hidden(model, replace(padded([one.tokens for one in single], 6), source=source))
    for row, one in enumerate(single):
        torch.testing.assert_close(together[row, : lengths[row][0]], hidden(model, one)[0], rtol=1e-5, atol=1e-5)


def test_a_source_changes_its_own_document_alone_and_all_of_its_tokens_count() -> None:
    model, inputs = encoder_decoder(), packed()
    assert inputs.source is not None
    before = hidden(model, inputs)
    for place, changed in ((4, slice(5, 12)), (14, slice(5, 12)), (0, slice(0, 5))):
        ids = inputs.source.tokens.clone()
        ids[0, place] = (ids[0, place] + 1) % VOCAB
        same = (hidden(model, with_source(inputs, tokens=ids)) == before).all(-1)[0]
        assert not same[changed].any()
        assert same.sum() == same.numel() - (changed.stop - changed.start)


def test_a_target_sees_no_token_behind_its_own() -> None:
    model, inputs = encoder_decoder(), pair(6, 5)
    ids = inputs.tokens.clone()
    ids[0, 3] = (ids[0, 3] + 1) % VOCAB
    changed = (hidden(model, replace(inputs, tokens=ids)) != hidden(model, inputs)).any(-1)[0]
    assert changed.tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_units_one_by_one_hand_both_sides_on_in_one_tensor(kind: str) -> None:
    model, inputs = encoder_decoder(**KINDS[kind]), packed(padding=2)
    assert inputs.source is not None
    x: Tensor | None = None
    for unit in unit_names(model.args):
        if x is not None and unit != "output":
            assert x.shape == (inputs.tokens.numel() + inputs.source.tokens.numel(), model.args.dim)
        x = model(inputs, units=[unit], x=x, return_hidden=True).hidden
    assert x is not None and torch.equal(x, hidden(model, inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_a_memory_stands_for_the_encoder(kind: str) -> None:
    model, inputs = encoder_decoder(**KINDS[kind]), packed(padding=2)
    assert inputs.source is not None
    memory = model.encode(inputs.source)
    found = model(inputs, memory=memory, return_hidden=True).hidden
    assert torch.equal(found, hidden(model, inputs))


def test_a_memory_without_a_source_is_one_document_a_row() -> None:
    model, inputs = encoder_decoder(), pair(4, 6)
    assert inputs.source is not None
    found = model(inputs.tokens, memory=model.encode(inputs.source.tokens), return_hidden=True).hidden
    assert torch.equal(found, hidden(model, inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_declared_and_has_a_gradient(kind: str) -> None:
    model, inputs = encoder_decoder(**KINDS[kind]), packed(padding=1)
    table = ParameterTable.of(model.args)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == table.shapes
    assert list(table) == [name for name, _ in model.named_parameters()]
    loss = model(inputs, labels=inputs.tokens).loss_sum
    assert loss is not None
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_layers_of_both_sides_keep_bits(mode: str) -> None:
    inputs, found = packed(padding=1), []
    for activation_checkpointing in ("none", mode):
        model = encoder_decoder(attn_dropout=0.2, resid_dropout=0.1).train()
        model.activation_checkpointing = activation_checkpointing  # type: ignore[assignment]
        loss = model(inputs, labels=inputs.tokens, keys_N=torch.arange(inputs.tokens.numel())).loss_sum
        assert loss is not None
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", ["attn_dropout", "resid_dropout", "embed_dropout", "ffn_dropout"])
def test_what_is_dropped_follows_row_and_place_not_the_batch(rate: str) -> None:
    model = encoder_decoder(**{rate: 0.3}).train()
    ids, source, keys = tokens(2, 6), tokens(2, 9, seed=5), torch.arange(12) * 7919
    together = model(TransformerInput(ids, source=TransformerInput(source)), keys_N=keys, return_hidden=True).hidden
    for row in range(2):
        one = TransformerInput(ids[row : row + 1], source=TransformerInput(source[row : row + 1]))
        alone = model(one, keys_N=keys[row * 6 : row * 6 + 6], return_hidden=True).hidden
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together, hidden(model.eval(), TransformerInput(ids, source=TransformerInput(source))))


def test_half_precision_stays_close_to_float32() -> None:
    model, inputs = encoder_decoder(), packed(padding=2)
    wide = hidden(model, inputs)
    narrow = hidden(model.bfloat16(), inputs).float()
    valid = slice(0, sum(target for target, _ in PAIRS))
    # 8 bits of a mantissa through five layers
    torch.testing.assert_close(narrow[:, valid], wide[:, valid], rtol=0.1, atol=0.1)


WRONG = {
    "documents": (with_source(packed(), cu_seqlens=torch.tensor([0, 4, 17])), "row 0 has 3 of them, and 2 sources"),
    "rows": (with_source(pair(3, 3), tokens=tokens(2, 3)), "inputs.source has 2 rows, and inputs 1"),
    "causal": (with_source(pair(3, 3), causal=True), "the encoder reads both ways"),
    "parents": (with_source(packed(), parents=torch.tensor([-1, 0, -1])), "inputs.source.parents"),
    "none": (TransformerInput(tokens(1, 3)), "needs inputs.source"),
    "long": (pair(3, 65), "position 64 of row 0"),
    "padding": (with_source(pair(3, 3), tokens_position=torch.tensor([[-1, -1, -1]])), "has 1 of them, and 0 sources"),
}


@pytest.mark.parametrize("case", WRONG)
def test_sources_that_do_not_fit_are_refused(case: str) -> None:
    inputs, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        hidden(encoder_decoder(pos="learned"), inputs)


def test_a_model_without_an_encoder_takes_no_source() -> None:
    model = encoder_decoder(encoder_layers=0)
    with pytest.raises(ValueError, match="no encoder"):
        hidden(model, pair(3, 3))
    with pytest.raises(ValueError, match="no encoder"):
        model.encode(tokens(1, 3))


@pytest.mark.parametrize("key", ["parallel_residual", "vision"])
def test_an_encoder_refuses_keys_that_it_does_not_go_with(key: str) -> None:
    vision = dict(
        image_size=8, patch_size=4, dim=16, n_layers=1, n_heads=2, output_dim=16, patch_token_id=1,
        pixel_shuffle_ratio=0.5,
    )  # fmt: skip
    with pytest.raises(ValueError, match=rf"model.encoder_layers=3.*model.{key}"):
        encoder_decoder(**{key: True if key == "parallel_residual" else vision})


def test_keys_of_a_model_without_an_encoder_are_as_they_were() -> None:
    args = ModelArgs.model_validate(BASE | dict(encoder_layers=0))
    assert "encoder_layers" not in args.model_dump()
    assert not any(spec.cross for spec in args.layer_specs())


def test_a_model_of_values_reads_each_side_by_a_map_of_its_own() -> None:
    model = encoder_decoder(input_dim=3, output_dim=2, vocab_size=-1)
    drawn = torch.Generator().manual_seed(0)
    target, source = (torch.randn(2, length, 3, generator=drawn) for length in (4, 6))
    inputs = replace(TransformerInput.of(target), source=TransformerInput.of(source))
    found = model(inputs).outputs
    assert found is not None and found.shape == (2, 4, 2)
    assert torch.equal(found, model(target, memory=model.encode(source)).outputs)
    before = model.encode(source)
    with torch.no_grad():
        model.tok_embeddings.weight.zero_()
        assert torch.equal(model.encode(source), before)
        model.encoder.tok_embeddings.weight.zero_()
    assert not torch.equal(model.encode(source), before)
