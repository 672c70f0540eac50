"""Transformer Components' models: what they compute against the parts, caches against whole rows, the experts' losses,
classes of one's own, folders."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llm.errors import UserError
from llm.siblings.components import (
    AutoregressiveTransformerModel,
    EncoderDecoder,
    FeedForward,
    FFNConfig,
    GroupQueryAttention,
    MultiHeadAttention,
    MultiQueryAttention,
    PositionalEncoding,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
    TransformerModel,
)
from tests.siblings.test_components_layers import CLOSE, layer_into_torch, spread, states

SIZE = dict(input_dim=3, embed_dim=16, ffn_latent_dim=24, num_heads=4, output_dim=2, max_seq_len=8)
KINDS = ("mha", "gqa", "mqa")


def regression(**changes: object) -> TransformerModel:
    return spread(TransformerModel(**SIZE | dict(num_layers=2) | changes))


def autoregressive(**changes: object) -> AutoregressiveTransformerModel:
    return spread(AutoregressiveTransformerModel(**SIZE | dict(num_layers=2) | changes))


def encoder_decoder(**changes: object) -> EncoderDecoder:
    return spread(EncoderDecoder(**SIZE | dict(num_encoder_layers=2, num_decoder_layers=1) | changes))


MODELS = {"regression": regression, "autoregressive": autoregressive, "encoder-decoder": encoder_decoder}


def called(model: nn.Module, x: Tensor) -> Tensor:
    return model(x, x[:, :4]) if isinstance(model, EncoderDecoder) else model(x)


def torch_layers(layers: nn.ModuleList, kind: type) -> list[nn.Module]:
    return [layer_into_torch(kind(16, 4, 24, 0.0, batch_first=True), layer) for layer in layers]


def embedded(linear: nn.Module, x: Tensor) -> Tensor:
    return PositionalEncoding(16)(nn.functional.linear(x, linear.weight, linear.bias))


def test_regression_is_linear_positions_layers_mean_and_linear():
    model, x = regression(), states(2, 6, 3)
    h = embedded(model.llm.tok_embeddings, x)
    for layer in torch_layers(model.llm.layers, nn.TransformerEncoderLayer):
        h = layer(h)
    expected = nn.functional.linear(h.mean(1), model.llm.output.weight, model.llm.output.bias)
    torch.testing.assert_close(model(x), expected, **CLOSE)


def test_the_mean_of_a_row_leaves_out_its_padding():
    model, x = regression(), states(2, 6, 3)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    torch.testing.assert_close(model(x, mask=mask)[1:], model(x[1:, :4]), **CLOSE)


def test_autoregressive_is_causal_layers_and_a_linear_at_every_position():
    model, x = autoregressive(), states(2, 6, 3)
    h, unseen = embedded(model.llm.tok_embeddings, x), torch.ones(6, 6).triu(1).bool()
    for layer in torch_layers(model.llm.layers, nn.TransformerEncoderLayer):
        h = layer(h, src_mask=unseen)
    torch.testing.assert_close(
        model(x), nn.functional.linear(h, model.llm.output.weight, model.llm.output.bias), **CLOSE
    )


def test_an_encoder_decoder_is_torchs_layers_on_both_sides():
    model, source, target = encoder_decoder(), states(2, 6, 3), states(2, 5, 3, seed=1)
    memory = embedded(model.llm.encoder.tok_embeddings, source)
    for layer in torch_layers(model.llm.encoder.layers, nn.TransformerEncoderLayer):
        memory = layer(memory)
    torch.testing.assert_close(model.encode(source), memory, **CLOSE)
    h, unseen = embedded(model.llm.tok_embeddings, target), torch.ones(5, 5).triu(1).bool()
    for layer in torch_layers(model.llm.layers, nn.TransformerDecoderLayer):
        h = layer(h, memory, tgt_mask=unseen)
    expected = nn.functional.linear(h, model.llm.output.weight, model.llm.output.bias)
    torch.testing.assert_close(model(source, target), expected, **CLOSE)
    torch.testing.assert_close(model.decode(target, model.encode(source)), expected, **CLOSE)


def test_padding_of_a_source_is_seen_by_nothing():
    model, source, target = encoder_decoder(), states(2, 6, 3), states(2, 5, 3, seed=1)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    found = model(source, target, source_mask=mask)
    torch.testing.assert_close(found[1:], model(source[1:, :4], target[1:]), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_calls_that_continue_each_other_equal_the_whole_row(kind):
    model, x = autoregressive(attention_type=kind, use_kv_cache=True).eval(), states(2, 13, 3)
    whole = autoregressive(attention_type=kind)
    whole.load_state_dict(model.state_dict())
    found = torch.cat([model(part, expanding_context=True) for part in x.split([5, 1, 1, 6], dim=1)], dim=1)
    torch.testing.assert_close(found, whole(x), **CLOSE)  # past max_seq_len, too: positions count on
    model.reset_cache()
    torch.testing.assert_close(model(x[:, :5]), whole(x[:, :5]), **CLOSE)
    torch.testing.assert_close(model(x[:1]), whole(x[:1]), **CLOSE)  # another number of rows begins anew


def test_a_sliding_context_sees_the_newest_positions_alone():
    model = autoregressive(num_layers=1, use_kv_cache=True, max_seq_len=4).eval()
    x = states(1, 9, 3)
    changed = torch.cat([states(1, 5, 3, seed=7), x[:, 5:]], dim=1)
    expanding = []
    for rows in (x, changed):
        model.reset_cache()
        sliding = [model(part, expanding_context=False) for part in rows.split(1, dim=1)]
        expanding.append(sliding[-1])
    torch.testing.assert_close(*expanding, **CLOSE)


def test_a_sliding_context_takes_no_more_memory_the_longer_it_goes_on():
    model, taken = autoregressive(num_layers=1, use_kv_cache=True, max_seq_len=4).eval(), {}
    for expanding in (False, True):
        model.reset_cache()
        for step in range(3):
            for part in states(1, 100, 3).split(1, dim=1):
                model(part, expanding_context=expanding)
            taken[expanding, step] = model._cache.nbytes
    assert taken[False, 0] == taken[False, 2] < taken[True, 0] < taken[True, 2]


def test_training_sees_whole_rows_and_has_gradients_whatever_the_cache():
    model, x = autoregressive(use_kv_cache=True).train(), states(2, 6, 3)
    torch.testing.assert_close(model(x), model(x))
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_next_value_is_the_last_prediction_as_in_evaluation():
    model, x = autoregressive(dropout=0.5).train(), states(2, 6, 3)
    found = model.generate_next_token(x)
    assert found.shape == (2, 1, 2) and model.training and not found.requires_grad
    torch.testing.assert_close(found, model.eval()(x)[:, -1:])


@pytest.mark.parametrize("causal", [True, False])
def test_generated_values_are_each_the_next_input(causal):
    model, x = autoregressive(output_dim=3, apply_causal_mask=causal), states(2, 4, 3)
    found = model.generate(x, 3)
    for _ in range(3):
        x = torch.cat([x, model(x)[:, -1:]], dim=1)
    torch.testing.assert_close(found, x[:, 4:], **CLOSE)


@pytest.mark.parametrize("make", [autoregressive, encoder_decoder])
def test_values_of_another_width_cannot_be_the_next_input(make):
    model = make()
    given = (states(1, 2, 3), 2) if make is autoregressive else (states(1, 2, 3), states(1, 1, 3), 2)
    with pytest.raises(ValueError, match="output_dim=2 is not input_dim=3"):
        model.generate(*given)


FULL = FFNConfig(16, 24, True, num_experts=4, capacity=3, alpha=0.01, topk=2)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_models_with_experts_say_their_loss_and_how_much_overflowed(make):
    model, x = make(ffn_config=FULL).train(), states(2, 6, 3)
    called(model, x)
    # of four layers at most, each about alpha / experts
    assert 0.0025 < model.aux_loss.item() < 0.02 and model.aux_loss.requires_grad
    assert 0 < model.overflow_rate < 1
    model.eval()
    called(model, x)
    assert model.overflow_rate == 0


def test_the_loss_of_both_sides_is_that_of_encode_and_decode_one_after_the_other():
    model, x = encoder_decoder(ffn_config=FULL), states(2, 6, 3)
    model(x, x[:, :4])
    both = model.aux_loss
    memory = model.encode(x)
    of_encoder = model.aux_loss
    model.decode(x[:, :4], memory)
    torch.testing.assert_close(model.aux_loss, both)
    assert 0 < of_encoder.item() < both.item()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_loop_of_torch_trains_in_mixed_precision_with_experts_and_without(make):
    for changes in ({}, {"ffn_config": FULL}):
        model, x = make(**changes).train(), states(2, 6, 3)
        with torch.amp.autocast("cpu", dtype=torch.bfloat16):
            loss = called(model, x).float().square().mean()
        (loss if model.aux_loss is None else loss + model.aux_loss).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        torch.testing.assert_close(loss, called(model, x).square().mean(), rtol=0.1, atol=0)  # of bfloat16 products


def test_without_experts_there_is_no_such_loss():
    model = regression()
    model(states(2, 6, 3))
    assert model.aux_loss is None and model.overflow_rate is None


class Halved(MultiHeadAttention):
    """In the document's way of calling, with a parameter of its own."""

    def __init__(self, embed_dim, num_heads, **more):
        super().__init__(embed_dim, num_heads, **more)
        self.share = nn.Parameter(torch.tensor(0.5))

    def forward(self, query, key, value):
        return self.share * super().forward(query, key, value)


class HalvedGroups(GroupQueryAttention):
    def forward(self, query, key, value):
        return 0.5 * super().forward(query, key, value)


class Squared(FeedForward):
    def __init__(self, embed_dim, ffn_latent_dim):
        super().__init__(embed_dim, ffn_latent_dim)
        self.scale = nn.Parameter(torch.ones(embed_dim))

    def forward(self, x):
        return self.scale * super().forward(x) ** 2


class Doubled(TransformerEncoderLayer):
    def forward(self, x):
        return 2 * super().forward(x)


class Remembering(TransformerDecoderLayer):
    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.shift = nn.Parameter(torch.ones(16))

    def forward(self, x, memory):
        return super().forward(x, memory) + self.shift


GIVEN = [
    (regression, dict(attention=Halved)),
    (autoregressive, dict(attention=HalvedGroups)),
    (regression, dict(feed_forward=Squared)),
    (autoregressive, dict(encoder_layer=Doubled)),
    (encoder_decoder, dict(attention=Halved, feed_forward=Squared)),
    (encoder_decoder, dict(encoder_layer=Doubled, decoder_layer=Remembering)),
]


@pytest.mark.parametrize(("make", "parts"), GIVEN)
def test_classes_of_ones_own_are_used_trained_and_saved(tmp_path, make, parts):
    model, x = make(**parts), states(2, 6, 3)
    plain = make(attention_type=model.config.attention_type)
    plain.load_state_dict(model.state_dict(), strict=False)
    before = called(model, x)
    assert not torch.allclose(before, called(plain, x))
    before.square().sum().backward()
    torch.optim.SGD(model.parameters(), 0.01).step()
    for module in model.modules():
        if type(module) in parts.values():
            assert all(parameter.grad is not None for parameter in module.parameters(recurse=False))
    model.save_pretrained(tmp_path / "kept")
    again = type(model).from_pretrained(tmp_path / "kept", **parts)
    torch.testing.assert_close(called(again, x), called(model.eval(), x), rtol=0, atol=0)
    with pytest.raises(UserError, match="was saved with"):
        type(model).from_pretrained(tmp_path / "kept")


def test_half_of_attention_is_what_half_of_its_last_matrix_makes():
    model, x = regression(attention=Halved), states(2, 6, 3)
    plain = regression()
    plain.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for halved, layer in zip(model.llm.layers, plain.llm.layers, strict=True):
            layer.attention.wo.weight *= halved.attention.share
            layer.attention.wo.bias *= halved.attention.share
    torch.testing.assert_close(model(x), plain(x), **CLOSE)


def test_a_class_of_ones_own_works_with_experts_and_a_cache():
    model, x = autoregressive(encoder_layer=Doubled, ffn_config=FULL, use_kv_cache=True), states(2, 6, 3)
    model.train()(x)
    assert model.aux_loss is not None and model.overflow_rate > 0
    model.eval()
    found = torch.cat([model(part) for part in x.split(2, dim=1)], dim=1)
    model.reset_cache()
    torch.testing.assert_close(found, model(x), **CLOSE)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_copy_is_the_same_model_without_what_calls_have_left(make):
    model, x = make(ffn_config=FULL, use_kv_cache=True), states(2, 6, 3)
    called(model.train(), x)
    called(model.eval(), x)
    copied = copy.deepcopy(model)
    assert copied.aux_loss is None and copied._cache is None
    model.reset_cache()
    torch.testing.assert_close(called(copied, x), called(model, x), rtol=0, atol=0)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_what_was_saved_comes_back_bit_by_bit(tmp_path, make):
    model, x = make(ffn_config=FULL, attention_type="gqa", num_groups=2), states(2, 6, 3)
    model.save_pretrained(tmp_path / "kept")
    again = type(model).from_pretrained(tmp_path / "kept")
    assert again.config == model.config and not again.training
    torch.testing.assert_close(called(again, x), called(model.eval(), x), rtol=0, atol=0)


def test_a_folder_of_another_kind_or_with_an_unknown_key_is_refused(tmp_path: Path):
    regression().save_pretrained(tmp_path / "kept")
    with pytest.raises(UserError, match="holds a model of kind regression"):
        AutoregressiveTransformerModel.from_pretrained(tmp_path / "kept")
    config = tmp_path / "kept" / "config.json"
    config.write_text(config.read_text().replace('"num_heads"', '"n_heads"'))
    with pytest.raises(UserError, match="unknown key n_heads"):
        TransformerModel.from_pretrained(tmp_path / "kept")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: regression(embed_dim=18), "num_heads=4 does not divide embed_dim=18"),
        (lambda: regression(ffn_config=FFNConfig(8, 24)), "embed_dim=16 and ffn_config.embed_dim=8 must be the same"),
        (lambda: regression(ffn_config=FFNConfig(16, 8)), "ffn_latent_dim=24 and ffn_config.latent_dim=8 must be"),
        (lambda: regression(attention_type="flash"), "attention_type='flash' is not known"),
        (lambda: regression(input_dim=0), "input_dim=0: expected a whole number, 1 or more"),
        (lambda: regression(feed_forward=nn.Linear), "feed_forward=.*expected a subclass of FeedForward"),
        (lambda: regression(attention=MultiQueryAttention, attention_type="gqa"), "give attention_type=mqa"),
        (lambda: regression()(torch.ones(2, 3, dtype=torch.int64)), "x must be floats of shape"),
        (lambda: regression()(states(2, 6, 4)), r"values must be floats of shape \(B, T, model.input_dim\)"),
        (lambda: encoder_decoder().decode(states(2, 3, 3), states(1, 4, 16)), "with the 2 rows of the target"),
        (
            lambda: autoregressive(use_kv_cache=True).eval()(states(1, 3, 3), mask=torch.ones(1, 3)),
            "mask: rows that a cache continues have no padding",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(make, said):
    with pytest.raises(ValueError, match=said):
        make()
